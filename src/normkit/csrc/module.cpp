// The Python module normkit._core: addresses, strides and shapes come in as integers, and the GIL is released.
// kernels/cpu.py is its only caller and checks what it passes; its signatures are in _core.pyi.
// Read next: core.h.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <stdexcept>
#include <string>

#include "calls.h"
#include "memory.h"

namespace nb = nanobind;

namespace normkit {
namespace {

using Address = uintptr_t;  // 0: absent

template <class T = void>
T* at(Address address) {
    return reinterpret_cast<T*>(address);
}

void forward_rows(int dtype, int64_t rows, int64_t size,                                       //
                  Address x, int64_t x_inner, int64_t x_outer_stride, int64_t x_inner_stride,  //
                  Address residual, int64_t residual_inner, int64_t residual_outer_stride,
                  int64_t residual_inner_stride, Address weight, int weight_dtype, Address bias, int bias_dtype,  //
                  double eps, bool centered, double weight_offset,                                                //
                  Address out, Address total, Address mean, Address rstd, int threads) {
    RowsForward args{};
    args.rows = rows;
    args.size = size;
    args.x = {at(x), x_inner, x_outer_stride, x_inner_stride};
    args.residual = {at(residual), residual_inner, residual_outer_stride, residual_inner_stride};
    args.weight = {at(weight), weight_dtype, weight_offset};
    args.bias = {at(bias), bias_dtype, 0};
    args.eps = eps;
    args.centered = centered;
    args.out = at(out);
    args.total = at(total);
    args.mean = at(mean);
    args.rstd = at(rstd);
    rows_forward(args, dtype, threads);
}

void backward_rows(int dtype, int64_t rows, int64_t size,  //
                   Address dout, int64_t dout_inner, int64_t dout_outer_stride, int64_t dout_inner_stride,
                   Address dtotal, int64_t dtotal_inner, int64_t dtotal_outer_stride, int64_t dtotal_inner_stride,
                   Address total, int64_t total_inner, int64_t total_outer_stride, int64_t total_inner_stride,
                   Address mean, Address rstd, Address weight, int weight_dtype, double weight_offset,  //
                   Address dx, Address dweight, Address dbias, int threads) {
    RowsBackward args{};
    args.rows = rows;
    args.size = size;
    args.dout = {at(dout), dout_inner, dout_outer_stride, dout_inner_stride};
    args.dtotal = {at(dtotal), dtotal_inner, dtotal_outer_stride, dtotal_inner_stride};
    args.total = {at(total), total_inner, total_outer_stride, total_inner_stride};
    args.mean = at(mean);
    args.rstd = at(rstd);
    args.weight = {at(weight), weight_dtype, weight_offset};
    args.dx = at(dx);
    rows_backward(args, dtype, {at(dweight), at(dbias), false}, threads);
}

ChannelsShape shape_of(int64_t batch, int64_t channels, int64_t space, bool channels_last, Address mask) {
    return {batch, channels, space, channels_last, at<const uint8_t>(mask)};
}

void moments(int dtype, int64_t batch, int64_t channels, int64_t space, bool channels_last, Address mask,
             bool per_sample, Address x, int64_t x_batch_stride, int64_t x_line_stride, Address mean, Address m2,
             int threads) {
    ChannelsReduction args{};
    args.shape = shape_of(batch, channels, space, channels_last, mask);
    args.x = {at(x), x_batch_stride, x_line_stride};
    args.result_first = at<double>(mean);
    args.result_second = at<double>(m2);
    channels_moments(args, dtype, per_sample, threads);
}

void backward_moments(int dtype, int64_t batch, int64_t channels, int64_t space, bool channels_last, Address mask,
                      bool per_sample, Address dout, int64_t dout_batch_stride, int64_t dout_line_stride, Address x,
                      int64_t x_batch_stride, int64_t x_line_stride, Address center, int64_t center_stride, Address sum,
                      Address product, int threads) {
    ChannelsReduction args{};
    args.shape = shape_of(batch, channels, space, channels_last, mask);
    args.dout = {at(dout), dout_batch_stride, dout_line_stride};
    args.x = {at(x), x_batch_stride, x_line_stride};
    args.center = {at(center), center_stride};
    args.result_first = at<double>(sum);
    args.result_second = at<double>(product);
    channels_backward_moments(args, dtype, per_sample, threads);
}

void affine(int dtype, int64_t batch, int64_t channels, int64_t space, bool channels_last, Address mask, Address x,
            int64_t x_batch_stride, int64_t x_line_stride, Address center, int64_t center_stride, Address scale,
            int64_t scale_stride, Address shift, int64_t shift_stride, Address out, int64_t out_batch_stride,
            int64_t out_line_stride, int threads) {
    ChannelsAffine args{};
    args.shape = shape_of(batch, channels, space, channels_last, mask);
    args.x = {at(x), x_batch_stride, x_line_stride};
    args.center = {at(center), center_stride};
    args.scale = {at(scale), scale_stride};
    args.shift = {at(shift), shift_stride};
    args.out = at(out);
    args.out_batch_stride = out_batch_stride;
    args.out_line_stride = out_line_stride;
    channels_affine(args, dtype, threads);
}

void backward_affine(int dtype, int64_t batch, int64_t channels, int64_t space, bool channels_last, Address mask,
                     Address dout, int64_t dout_batch_stride, int64_t dout_line_stride, Address x,
                     int64_t x_batch_stride, int64_t x_line_stride, Address center, int64_t center_stride, Address a,
                     int64_t a_stride, Address b, int64_t b_stride, Address c, int64_t c_stride, Address out,
                     int64_t out_batch_stride, int64_t out_line_stride, int threads) {
    ChannelsAffine args{};
    args.shape = shape_of(batch, channels, space, channels_last, mask);
    args.dout = {at(dout), dout_batch_stride, dout_line_stride};
    args.x = {at(x), x_batch_stride, x_line_stride};
    args.center = {at(center), center_stride};
    args.a = {at(a), a_stride};
    args.b = {at(b), b_stride};
    args.c = {at(c), c_stride};
    args.out = at(out);
    args.out_batch_stride = out_batch_stride;
    args.out_line_stride = out_line_stride;
    channels_backward_affine(args, dtype, threads);
}

void forward_columns(int dtype, int64_t batch, int64_t channels, int64_t space, Address x, int64_t x_batch_stride,
                     int64_t x_line_stride, Address weight, int weight_dtype, Address bias, int bias_dtype, double eps,
                     Address out, Address mean, Address rstd, int threads) {
    ColumnsForward args{};
    args.batch = batch;
    args.channels = channels;
    args.space = space;
    args.x = {at(x), x_batch_stride, x_line_stride};
    args.weight = {at(weight), weight_dtype, 0};
    args.bias = {at(bias), bias_dtype, 0};
    args.eps = eps;
    args.out = at(out);
    args.mean = at(mean);
    args.rstd = at(rstd);
    columns_forward(args, dtype, threads);
}

void backward_columns(int dtype, int64_t batch, int64_t channels, int64_t space, Address dout,
                      int64_t dout_batch_stride, int64_t dout_line_stride, Address x, int64_t x_batch_stride,
                      int64_t x_line_stride, Address mean, Address rstd, Address weight, int weight_dtype, Address dx,
                      Address dweight, Address dbias, int threads) {
    ColumnsBackward args{};
    args.batch = batch;
    args.channels = channels;
    args.space = space;
    args.dout = {at(dout), dout_batch_stride, dout_line_stride};
    args.x = {at(x), x_batch_stride, x_line_stride};
    args.mean = at(mean);
    args.rstd = at(rstd);
    args.weight = {at(weight), weight_dtype, 0};
    args.dx = at(dx);
    columns_backward(args, dtype, at(dweight), at(dbias), threads);
}

// New memory of a dense tensor's shape, dtype and strides: a block of memory.h where it is large. None as in calls.h.
nb::object new_like(nb::handle x) {
    TensorView view;
    void* data = nullptr;
    return bound() && view_tensor(x, &view) ? empty_like(x, view, &data) : nb::none();
}

nb::list isas() {
    nb::list names;
    for (int i = 0; i < isa_count(); ++i) names.append(isa_name(i));
    return names;
}

void choose_isa(const std::string& name) {
    if (set_isa(name.c_str())) return;
    std::string known;
    for (int i = 0; i < isa_count(); ++i) known += std::string(i > 0 ? ", " : "") + isa_name(i);
    throw nb::value_error(("set_isa: name must be one of " + known + ", got " + name).c_str());
}

}  // namespace
}  // namespace normkit

NB_MODULE(_core, m) {
    using namespace normkit;
    const auto release = nb::call_guard<nb::gil_scoped_release>();
    m.def("rows_forward", &forward_rows, release);
    m.def("rows_backward", &backward_rows, release);
    m.def("channels_moments", &moments, release);
    m.def("channels_affine", &affine, release);
    m.def("channels_backward_moments", &backward_moments, release);
    m.def("channels_backward_affine", &backward_affine, release);
    m.def("columns_forward", &forward_columns, release);
    m.def("columns_backward", &backward_columns, release);
    m.def("empty_like", &new_like);
    const auto none = nb::arg().none();
    m.def("bind_torch", &bind_torch);
    m.def("norm_now", &norm_now, none, none, none, none, none, none, nb::arg(), nb::arg());
    m.def("norm_recorded", &norm_recorded, none, none, none, none, nb::arg(), nb::arg(), nb::arg());
    m.def("norm_backward", &norm_backward, none, none, none, none, none, none, nb::arg(), nb::arg(), nb::arg(),
          nb::arg(), nb::arg());
    m.def("norm_backward_now", &norm_backward_now, none, none, none, none, none, none, nb::arg(), nb::arg(), nb::arg(),
          nb::arg(), nb::arg());
    m.def("set_block_limit", &set_block_limit);
    m.def("kept_bytes", &kept_bytes);
    m.def("batch_norm_now", &batch_norm_now, none, none, none, none, none, none, none, none, nb::arg());
    m.def("sample_norm_now", &sample_norm_now, none, none, none, none, none);
    m.def("batch_norm_backward_now", &batch_norm_backward_now, none, none, none, none, none, nb::arg(), nb::arg(),
          nb::arg());
    m.def("isa", [] { return kernels().name; });
    m.def("isas", &isas);
    m.def("set_isa", &choose_isa);
    m.def("openmp", &has_openmp);
}

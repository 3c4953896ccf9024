// Whole calls on torch's tensors, see calls.h.
// Read next: rows.cpp, channels.cpp.
#include "calls.h"

#include <float.h>
#include <math.h>

#include <vector>

namespace normkit {
namespace {

int accumulation_dtype(int dtype) { return dtype == kFloat64 ? kFloat64 : kFloat32; }

// A weight or bias beside x: (D,) or (C,) numbers, contiguous, in x's dtype or its accumulation dtype; or None.
bool view_weight(nb::handle tensor, int dtype, TensorView* view, Weight* weight) {
    *weight = {};
    if (tensor.is_none()) return true;
    if (!view_tensor(tensor, view) || !view->contiguous()) return false;
    if (view->dtype != dtype && view->dtype != accumulation_dtype(dtype)) return false;
    *weight = {view->data(), view->dtype, 0};
    return true;
}

// Whether `tensor` ends with `shape`, an int or a tuple of them; *dims is how many there are.
bool ends_with(const TensorView& tensor, nb::handle shape, int* dims) {
    PyObject* given = shape.ptr();
    const auto is = [&](PyObject* size, int axis) {
        int overflow = 0;
        return PyLong_CheckExact(size) && PyLong_AsLongLongAndOverflow(size, &overflow) == tensor.size(axis);
    };
    if (PyLong_CheckExact(given)) {
        *dims = 1;
        return tensor.ndim() >= 1 && is(given, tensor.ndim() - 1);
    }
    if (!PyTuple_Check(given)) return false;
    *dims = int(PyTuple_GET_SIZE(given));
    if (*dims < 1 || *dims > tensor.ndim()) return false;
    for (int i = 0; i < *dims; ++i)
        if (!is(PyTuple_GET_ITEM(given, i), tensor.ndim() - *dims + i)) return false;
    return true;
}

bool same_shape(const TensorView& a, const TensorView& b) {
    if (a.ndim() != b.ndim()) return false;
    for (int i = 0; i < a.ndim(); ++i)
        if (a.size(i) != b.size(i)) return false;
    return true;
}

StridedRows rows_of(const TensorView& tensor, int64_t size) {
    return {tensor.data(), int64_t(1) << 62, 0, size};  // one stride: there are fewer rows than that
}

// What can be read in place here: contiguous, with elements.
bool view_plain(nb::handle tensor, TensorView* view) {
    return view_tensor(tensor, view) && view->contiguous() && view->numel() > 0;
}

// x and residual, for rows of `size` elements.
bool set_inputs(RowsForward* args, const TensorView& x, nb::handle residual, int64_t size) {
    args->size = size;
    args->rows = x.numel() / size;
    args->x = rows_of(x, size);
    if (residual.is_none()) return true;
    TensorView view;
    if (!view_plain(residual, &view) || view.dtype != x.dtype || !same_shape(x, view)) return false;
    args->residual = rows_of(view, size);
    return true;
}

void compute(const RowsForward& args, int dtype, int threads) {
    nb::gil_scoped_release release;
    rows_forward(args, dtype, threads);
}

// (out, total, mean, rstd) of rows along the last axis of x.
nb::object recorded(RowsForward args, const TensorView& view, nb::handle x) {
    TensorView saved;
    const nb::object out = empty_like(x, view, &args.out);
    const nb::object total = args.residual.data == nullptr ? nb::borrow(x) : empty_like(x, view, &args.total);
    const int dtype = accumulation_dtype(view.dtype), outer = view.ndim() - 1;
    const nb::object rstd = empty(dtype, outer, view.dl.shape, &saved);
    args.rstd = saved.data();
    nb::object mean = nb::none();
    if (args.centered) {
        mean = empty(dtype, outer, view.dl.shape, &saved);
        args.mean = saved.data();
    }
    compute(args, view.dtype, num_threads());
    return nb::make_tuple(out, total, mean, rstd);
}

}  // namespace

// out, or (out, total) with a residual; None where something is active or an argument is not plain and right:
// functional/rows.py then finds out what. Where a gradient is wanted, autograd.py records what was computed.
nb::object norm_now(nb::handle x, nb::handle residual, nb::handle normalized_shape, nb::handle weight, nb::handle bias,
                    nb::handle eps, bool centered, double weight_offset) {
    TensorView view, weight_view, bias_view;
    RowsForward args{};
    int dims = 0;
    if (!bound() || !nothing_active() || !view_plain(x, &view) || !ends_with(view, normalized_shape, &dims))
        return nb::none();
    int64_t size = 1;
    for (int i = view.ndim() - dims; i < view.ndim(); ++i) size *= view.size(i);
    if (!set_inputs(&args, view, residual, size)) return nb::none();
    if (!view_weight(weight, view.dtype, &weight_view, &args.weight)) return nb::none();
    if (!view_weight(bias, view.dtype, &bias_view, &args.bias)) return nb::none();
    for (const TensorView* one : {weight.is_none() ? nullptr : &weight_view, bias.is_none() ? nullptr : &bias_view}) {
        int of = 0;
        if (one != nullptr && (one->ndim() != dims || !ends_with(*one, normalized_shape, &of))) return nb::none();
    }
    if (eps.is_none()) {
        args.eps = view.dtype == kFloat64 ? DBL_EPSILON : double(FLT_EPSILON);
    } else {
        args.eps = PyFloat_CheckExact(eps.ptr()) ? PyFloat_AS_DOUBLE(eps.ptr()) : -1;
    }
    if (!(args.eps >= 0)) return nb::none();
    args.weight.offset = weight_offset;
    args.centered = centered;
    if (wants_gradient(x, residual, weight, bias)) {
        if (dims != 1) return nb::none();  // backward sees one normalized axis: functional/rows.py folds them
        const nb::object computed = recorded(args, view, x);
        return record_norm(x, residual, weight, bias, computed, args.eps, centered, weight_offset);
    }
    const nb::object out = empty_like(x, view, &args.out);
    if (residual.is_none()) {
        compute(args, view.dtype, num_threads());
        return out;
    }
    const nb::object total = empty_like(x, view, &args.total);
    compute(args, view.dtype, num_threads());
    return nb::make_tuple(out, total);
}

// (out, total, mean, rstd) of rows along the last axis, for a forward that backward will follow.
nb::object norm_recorded(nb::handle x, nb::handle residual, nb::handle weight, nb::handle bias, double eps,
                         bool centered, double weight_offset) {
    TensorView view, weight_view, bias_view;
    RowsForward args{};
    if (!bound() || !view_plain(x, &view) || !set_inputs(&args, view, residual, view.size(view.ndim() - 1)))
        return nb::none();
    if (!view_weight(weight, view.dtype, &weight_view, &args.weight)) return nb::none();
    if (!view_weight(bias, view.dtype, &bias_view, &args.bias)) return nb::none();
    args.weight.offset = weight_offset;
    args.eps = eps;
    args.centered = centered;
    return recorded(args, view, x);
}

// (dx, dweight, dbias), None for what is not wanted; dweight and dbias in the accumulation dtype or, if `narrow`, in
// the weight's.
nb::object norm_backward(nb::handle dout, nb::handle dtotal, nb::handle total, nb::handle mean, nb::handle rstd,
                         nb::handle weight, double weight_offset, bool dx, bool dweight, bool dbias, bool narrow) {
    TensorView view, other, saved, weight_view;
    RowsBackward args{};
    if (!bound() || !view_plain(total, &view)) return nb::none();
    args.size = view.size(view.ndim() - 1);
    args.rows = view.numel() / args.size;
    args.total = rows_of(view, args.size);
    // What was saved may come back changed: by saved_tensors_hooks, or a weight whose data was replaced.
    if (!view_plain(dout, &other) || other.dtype != view.dtype || !same_shape(view, other)) return nb::none();
    args.dout = rows_of(other, args.size);
    if (!dtotal.is_none() && dx) {
        if (!view_plain(dtotal, &other) || other.dtype != view.dtype || !same_shape(view, other)) return nb::none();
        args.dtotal = rows_of(other, args.size);
    }
    const int dtype = accumulation_dtype(view.dtype);
    const auto view_saved = [&](nb::handle tensor) {
        return view_plain(tensor, &saved) && saved.dtype == dtype && saved.numel() == args.rows;
    };
    if (!view_saved(rstd)) return nb::none();
    args.rstd = saved.data();
    if (!mean.is_none()) {
        if (!view_saved(mean)) return nb::none();
        args.mean = saved.data();
    }
    if (!view_weight(weight, view.dtype, &weight_view, &args.weight)) return nb::none();
    if (!weight.is_none() && weight_view.numel() != args.size) return nb::none();
    args.weight.offset = weight_offset;
    nb::object results[3] = {nb::none(), nb::none(), nb::none()};
    RowsBackwardResult sums{};
    if (dx) {
        results[0] = empty_like(total, view, &args.dx);
    }
    // These become a parameter's .grad: torch's own memory, where the dtype will not be changed anyway.
    narrow = narrow && !weight.is_none() && weight_view.ndim() == 1;
    const bool like_weight = !weight.is_none() && (narrow || weight_view.dtype == dtype) && weight_view.ndim() == 1;
    sums.narrow = narrow && weight_view.dtype != dtype;
    const auto parameter_gradient = [&](void** data) {
        if (like_weight) return empty_like(weight, weight_view, data);
        nb::object made = empty(dtype, 1, &args.size, &saved);
        *data = saved.data();
        return made;
    };
    if (dweight) results[1] = parameter_gradient(&sums.dweight);
    if (dbias) results[2] = parameter_gradient(&sums.dbias);
    const int threads = num_threads();
    {
        nb::gil_scoped_release release;
        rows_backward(args, view.dtype, sums, threads);
    }
    return nb::make_tuple(results[0], results[1], results[2]);
}

// The same, unless this backward is itself recorded, or something is active.
nb::object norm_backward_now(nb::handle dout, nb::handle dtotal, nb::handle total, nb::handle mean, nb::handle rstd,
                             nb::handle weight, double weight_offset, bool dx, bool dweight, bool dbias, bool narrow) {
    if (!bound() || records_gradient() || !nothing_traced()) return nb::none();
    return norm_backward(dout, dtotal, total, mean, rstd, weight, weight_offset, dx, dweight, dbias, narrow);
}

// ------------------------------------------------------------------------------------------ channels

namespace {

// x (B, C, ...), dense in one of the two memory formats.
bool view_channels(nb::handle tensor, TensorView* view, ChannelsShape* shape, Lines* lines) {
    if (!view_tensor(tensor, view) || view->ndim() < 2 || view->numel() == 0) return false;
    const int64_t batch = view->size(0), channels = view->size(1), space = view->numel() / batch / channels;
    shape->batch = batch;
    shape->channels = channels;
    shape->space = space;
    shape->channels_last = space == 1;
    if (!view->contiguous()) {
        int64_t expected = channels;
        if (channels != 1 && view->stride(1) != 1) return false;
        for (int i = view->ndim() - 1; i >= 0; --i) {
            if (i == 1) continue;
            if (view->size(i) != 1 && view->stride(i) != expected) return false;
            expected *= view->size(i);
        }
        shape->channels_last = true;
    }
    *lines = {view->data(), channels * space, shape->channels_last ? channels : space};
    return true;
}

bool view_per_channel(nb::handle tensor, int64_t channels, TensorView* view) {
    return view_tensor(tensor, view) && view->ndim() == 1 && view->size(0) == channels && view->contiguous();
}

bool view_affine(nb::handle weight, nb::handle bias, int64_t channels, int dtype, ChannelsNorm* args) {
    TensorView view;
    if (!view_weight(weight, dtype, &view, &args->weight)) return false;
    if (!weight.is_none() && (view.ndim() != 1 || view.size(0) != channels)) return false;
    if (!view_weight(bias, dtype, &view, &args->bias)) return false;
    return bias.is_none() || (view.ndim() == 1 && view.size(0) == channels);
}

// A running average: (C,) numbers of any dtype, to be updated in place.
bool view_running(nb::handle tensor, int64_t channels, TensorView* view) {
    return view_per_channel(tensor, channels, view) && !refuses_update(tensor);
}

// The magnitude from which on a number becomes infinite in a dtype.
double first_infinite(int dtype) {
    constexpr double kSingle = 0x1.ffffffp127, kBrain = 0x1.ffp127;  // half a unit above the largest number
    return dtype == kFloat16 ? 65520.0 : dtype == kBFloat16 ? kBrain : dtype == kFloat32 ? kSingle : HUGE_VAL;
}

// Whether the batch's mean and unbiased variance are finite numbers of the running averages' dtypes.
bool all_finite(const ChannelsNorm& args, int64_t channels, double count, int mean_dtype, int var_dtype) {
    const double mean_end = first_infinite(mean_dtype), var_end = first_infinite(var_dtype);
    for (int64_t c = 0; c < channels; ++c)
        if (!(__builtin_fabs(args.mean[c]) < mean_end && args.m2[c] / (count - 1) < var_end)) return false;
    return true;
}

}  // namespace

// BatchNorm's out; None where something is active, an argument is not plain or not right, or a gradient with fixed
// statistics is wanted. In training the running averages are updated; if `guarded`, None for a batch that would bring
// NaN or infinity into them.
nb::object batch_norm_now(nb::handle x, nb::handle running_mean, nb::handle running_var, nb::handle weight,
                          nb::handle bias, nb::handle in_training, nb::handle momentum, nb::handle eps, bool guarded) {
    TensorView view, mean_view, var_view;
    ChannelsNorm args{};
    if (!bound() || !nothing_active() || !view_channels(x, &view, &args.shape, &args.x)) return nb::none();
    if (!PyBool_Check(in_training.ptr()) || !PyFloat_CheckExact(momentum.ptr())) return nb::none();
    const bool training = in_training.ptr() == Py_True;
    const int64_t channels = args.shape.channels, count = args.shape.batch * args.shape.space;
    if (!view_affine(weight, bias, channels, view.dtype, &args) || !PyFloat_CheckExact(eps.ptr())) return nb::none();
    args.eps = PyFloat_AS_DOUBLE(eps.ptr());
    const bool tracked = !running_mean.is_none(), gradient = wants_gradient(x, weight, bias, nb::none());
    if (tracked == running_var.is_none()) return nb::none();
    if (training) {
        if (count < 2 || !(args.eps > 0)) return nb::none();
        if (tracked &&
            !(view_running(running_mean, channels, &mean_view) && view_running(running_var, channels, &var_view)))
            return nb::none();
    } else {
        if (gradient || !tracked || !(args.eps >= 0)) return nb::none();
        if (!view_per_channel(running_mean, channels, &mean_view) ||
            !view_per_channel(running_var, channels, &var_view))
            return nb::none();
        if (!view_weight(running_mean, view.dtype, &mean_view, &args.fixed_mean)) return nb::none();
        if (!view_weight(running_var, view.dtype, &var_view, &args.fixed_var)) return nb::none();
    }
    const nb::object out = empty_like(x, view, &args.out);
    nb::object mean, rstd;
    std::vector<double> vectors;  // what no backward will read
    if (gradient) {
        TensorView vector;
        mean = empty(kFloat64, 1, &channels, &vector);
        args.mean = static_cast<double*>(vector.data());
        rstd = empty(kFloat64, 1, &channels, &vector);
        args.rstd = static_cast<double*>(vector.data());
    }
    if (training) {
        vectors.resize(size_t(channels) * 3);
        args.m2 = vectors.data();
        if (!gradient) {
            args.mean = args.m2 + channels;
            args.rstd = args.mean + channels;
        }
    }
    const int threads = num_threads();
    {
        nb::gil_scoped_release release;
        channels_normalize(args, view.dtype, threads);
    }
    if (guarded && training && tracked && !all_finite(args, channels, double(count), mean_view.dtype, var_view.dtype))
        return nb::none();
    // Recording may refuse (an inference tensor, a hook on saved tensors): before the running averages have moved.
    const nb::object result =
        gradient ? record_batch_norm(x, weight, bias, mean, rstd, count, args.eps, out) : nb::object(out);
    if (training && tracked) {
        const double share = PyFloat_AS_DOUBLE(momentum.ptr());
        update_running(mean_view.data(), mean_view.dtype, args.mean, 1, share, channels);
        update_running(var_view.data(), var_view.dtype, args.m2, double(count - 1), share, channels);
        count_update(running_mean, running_var);
    }
    return result;
}

// GroupNorm's out, InstanceNorm's with a group per channel; None as above.
nb::object sample_norm_now(nb::handle x, nb::handle groups, nb::handle weight, nb::handle bias, nb::handle eps) {
    TensorView view, vector;
    ChannelsNorm args{};
    if (!bound() || !nothing_active() || !view_channels(x, &view, &args.shape, &args.x)) return nb::none();
    if (!PyLong_CheckExact(groups.ptr()) || !PyFloat_CheckExact(eps.ptr())) return nb::none();
    int overflow = 0;
    const int64_t channels = args.shape.channels, wanted = PyLong_AsLongLongAndOverflow(groups.ptr(), &overflow);
    args.eps = PyFloat_AS_DOUBLE(eps.ptr());
    if (overflow != 0 || wanted < 1 || channels % wanted != 0 || !(args.eps > 0)) return nb::none();
    const int64_t count = channels / wanted * args.shape.space;
    const int threads = num_threads();
    if (count < 2) return nb::none();
    if (!view_affine(weight, bias, channels, view.dtype, &args)) return nb::none();
    const nb::object out = empty_like(x, view, &args.out);
    const int64_t sizes[2] = {args.shape.batch, wanted};
    const nb::object mean = empty(kFloat64, 2, sizes, &vector);
    args.mean = static_cast<double*>(vector.data());
    const nb::object rstd = empty(kFloat64, 2, sizes, &vector);
    args.rstd = static_cast<double*>(vector.data());
    {
        nb::gil_scoped_release release;
        samples_normalize(args, wanted, view.dtype, threads);
    }
    if (!wants_gradient(x, weight, bias, nb::none())) return out;
    return record_batch_norm(x, weight, bias, mean, rstd, count, args.eps, out);
}

// (dx, dweight, dbias) where the statistics are the batch's own, (C,), or each sample's groups', (B, groups); None for
// what is not wanted; the last two in float64, or in weight's dtype if `narrow`. None alone if this backward is itself
// recorded, or as above.
nb::object batch_norm_backward_now(nb::handle dout, nb::handle x, nb::handle mean, nb::handle rstd, nb::handle weight,
                                   bool dx, bool parameters, bool narrow) {
    TensorView view, dout_view, mean_view, rstd_view;
    ChannelsNorm args{};
    ChannelsShape dout_shape{};
    if (!bound() || records_gradient() || !nothing_traced()) return nb::none();
    if (!view_channels(x, &view, &args.shape, &args.x)) return nb::none();
    if (!view_channels(dout, &dout_view, &dout_shape, &args.dout)) return nb::none();
    if (dout_view.dtype != view.dtype || !same_shape(view, dout_view)) return nb::none();
    if (dout_shape.channels_last != args.shape.channels_last) return nb::none();
    const int64_t channels = args.shape.channels;
    if (!view_affine(weight, nb::none(), channels, view.dtype, &args)) return nb::none();
    if (!view_tensor(mean, &mean_view) || !mean_view.contiguous() || mean_view.dtype != kFloat64) return nb::none();
    if (!view_tensor(rstd, &rstd_view) || !rstd_view.contiguous() || rstd_view.dtype != kFloat64) return nb::none();
    const int64_t statistics = mean_view.size(mean_view.ndim() - 1);  // per channel, or each sample's groups
    const bool of_samples = mean_view.ndim() == 2;
    if (rstd_view.numel() != mean_view.numel() || channels % statistics != 0) return nb::none();
    if (mean_view.numel() != (of_samples ? args.shape.batch * statistics : channels)) return nb::none();
    const int threads = num_threads();
    args.count = args.shape.batch * args.shape.space;
    args.mean = static_cast<double*>(mean_view.data());
    args.rstd = static_cast<double*>(rstd_view.data());
    nb::object results[3] = {nb::none(), nb::none(), nb::none()};
    if (dx) results[0] = empty_like(x, view, &args.out);
    std::vector<double> sums(size_t(channels) * 2);
    args.dweight = sums.data();
    args.dbias = args.dweight + channels;
    void* targets[2] = {nullptr, nullptr};
    const int dtype = narrow ? args.weight.dtype : kFloat64;
    for (int i = 0; parameters && i < 2; ++i) {
        TensorView made;
        results[i + 1] = empty(dtype, 1, &channels, &made);
        targets[i] = made.data();
    }
    {
        nb::gil_scoped_release release;
        if (of_samples) {
            samples_gradients(args, statistics, view.dtype, threads);
        } else {
            channels_gradients(args, view.dtype, threads);
        }
        if (parameters) {
            kernels().narrow[dtype](args.dweight, targets[0], channels);
            kernels().narrow[dtype](args.dbias, targets[1], channels);
        }
    }
    return nb::make_tuple(results[0], results[1], results[2]);
}

}  // namespace normkit

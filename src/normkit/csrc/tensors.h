// torch's tensors without torch's headers: their memory through DLPack's C exchange API, and torch's own functions for
// what only torch can say or make. Where this torch has no such API (2.13 has it, 2.8 does not), or a tensor is not
// plain, there is no view, and the caller takes the way through Python. May include: core.h, CPython, nanobind. Read
// next: calls.cpp, the calls that go this way.
#pragma once

#include <nanobind/nanobind.h>

#include "core.h"

namespace normkit {

namespace nb = nanobind;

// DLPack 1.x, as in its specification.
struct DLTensor {
    void* data;
    struct {
        int32_t type, id;
    } device;
    int32_t ndim;
    struct {
        uint8_t code, bits;
        uint16_t lanes;
    } dtype;
    const int64_t *shape, *strides;
    uint64_t byte_offset;
};

// A plain CPU tensor of one of the four dtypes, borrowed for the length of a call.
struct TensorView {
    DLTensor dl;
    int dtype;  // core.h's Dtype

    void* data() const { return static_cast<char*>(dl.data) + dl.byte_offset; }
    int ndim() const { return dl.ndim; }
    int64_t size(int i) const { return dl.shape[i]; }
    int64_t stride(int i) const { return dl.strides[i]; }
    int64_t numel() const;
    bool contiguous() const;
};

// kernels/cpu.py hands torch's functions over once; see there for each of them.
void bind_torch(nb::dict functions);
bool bound();

// False: not exactly a Tensor or Parameter, or not plain strided CPU memory of a kernel's dtype.
bool view_tensor(nb::handle tensor, TensorView* view);

// Whether no tracer, transform or dispatch mode is active; and besides no function mode, profiler or other backend.
bool nothing_traced();
bool nothing_active();
bool records_gradient();
bool wants_gradient(nb::handle a, nb::handle b, nb::handle c, nb::handle d);  // None stands for an absent tensor

// autograd.py's record_computed: a row norm that was computed becomes a node of the graph.
nb::object record_norm(nb::handle x, nb::handle residual, nb::handle weight, nb::handle bias, nb::handle computed,
                       double eps, bool centered, double weight_offset);

// autograd.py's record_channel_norm in the same way: `out` becomes a node.
nb::object record_batch_norm(nb::handle x, nb::handle weight, nb::handle bias, nb::handle mean, nb::handle rstd,
                             int64_t count, double eps, nb::handle out);

// Of torch's rules for writing to a tensor in place: inference tensors only in inference mode, and autograd is told.
bool refuses_update(nb::handle tensor);
void count_update(nb::handle a, nb::handle b);

// New memory of the tensor's shape, dtype and memory format, and where it lies. Large ones are blocks of memory.h.
nb::object empty_like(nb::handle tensor, const TensorView& view, void** data);
// New memory of torch's; the dtypes are core.h's.
nb::object empty(int dtype, int ndim, const int64_t* shape, TensorView* view);

int num_threads();

}  // namespace normkit

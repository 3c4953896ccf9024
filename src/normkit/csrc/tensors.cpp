// What tensors.h promises.
// Read next: calls.cpp.
#include "tensors.h"

#include "memory.h"

namespace normkit {
namespace {

constexpr int kMostDims = 8;  // of a tensor in a block; torch makes the others

struct ManagedTensor {  // DLManagedTensorVersioned
    struct {
        uint32_t major, minor;
    } version;
    void* context;
    void (*deleter)(ManagedTensor*);
    uint64_t flags;
    DLTensor dl;
};

// A tensor whose memory is a block, which goes back when the tensor does.
struct BlockTensor {
    ManagedTensor managed;
    Block block;
    int64_t sizes[2 * kMostDims];

    static void drop(ManagedTensor* managed) {
        auto* tensor = static_cast<BlockTensor*>(managed->context);
        give_block(tensor->block);
        delete tensor;
    }
};

struct ExchangeApi {
    struct {
        uint32_t major, minor;
        void* previous;
    } header;
    int (*allocate)(DLTensor* like, ManagedTensor** out, void* context,
                    void (*set_error)(void* context, const char* kind, const char* message));
    int (*from_python)(void* object, ManagedTensor** out);
    int (*to_python)(ManagedTensor* tensor, void** object);
    int (*view)(void* object, DLTensor* out);
    int (*stream)(int32_t device_type, int32_t device_id, void** stream);
};

// References that are never given back: the module lives as long as the process.
struct Torch {
    const ExchangeApi* api;
    PyTypeObject *tensor, *parameter;
    PyObject *is_grad_enabled, *dispatch_modes, *function_modes, *transforms, *tracing, *num_threads, *empty_like;
    PyObject *forward_ad, *profiler, *forced, *recorders, *increment_version, *is_inference_enabled;
    PyObject *is_neg, *is_inference, *requires_grad, *level, *profiling, *get;  // names
} torch;

PyObject* call(PyObject* function) { return PyObject_CallNoArgs(function); }

bool is_true(PyObject* owned) {
    if (owned == nullptr) throw nb::python_error();
    const bool value = owned == Py_True;
    Py_DECREF(owned);
    return value;
}

bool is_none(PyObject* owned) {
    if (owned == nullptr) throw nb::python_error();
    const bool value = owned == Py_None;
    Py_DECREF(owned);
    return value;
}

// use_backend's name: none is in force, or "cpu" is.
bool allows_cpu(PyObject* owned) {
    if (owned == nullptr) throw nb::python_error();
    const bool value =
        owned == Py_None || (PyUnicode_Check(owned) && PyUnicode_CompareWithASCIIString(owned, "cpu") == 0);
    Py_DECREF(owned);
    return value;
}

long number(PyObject* owned) {
    if (owned == nullptr) throw nb::python_error();
    const long value = PyLong_AsLong(owned);
    Py_DECREF(owned);
    return value;
}

}  // namespace

int64_t TensorView::numel() const {
    int64_t n = 1;
    for (int i = 0; i < ndim(); ++i) n *= size(i);
    return n;
}

bool TensorView::contiguous() const {
    int64_t expected = 1;
    for (int i = ndim() - 1; i >= 0; --i) {
        if (size(i) != 1 && stride(i) != expected) return false;
        expected *= size(i);
    }
    return true;
}

bool bound() { return torch.api != nullptr; }

void bind_torch(nb::dict functions) {
    const auto take = [&](const char* name) { return functions[name].inc_ref().ptr(); };
    PyObject* capsule = take("exchange_api");
    const auto* api = static_cast<const ExchangeApi*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
    if (api == nullptr) throw nb::python_error();
    if (api->header.major != 1 || api->view == nullptr) return;  // a layout that is not the one above
    torch.tensor = reinterpret_cast<PyTypeObject*>(take("Tensor"));
    torch.parameter = reinterpret_cast<PyTypeObject*>(take("Parameter"));
    torch.is_grad_enabled = take("is_grad_enabled");
    torch.dispatch_modes = take("dispatch_modes");
    torch.function_modes = take("function_modes");
    torch.transforms = take("transforms");
    torch.tracing = take("tracing");
    torch.num_threads = take("num_threads");
    torch.empty_like = take("empty_like");
    torch.forward_ad = take("forward_ad");
    torch.profiler = take("profiler");
    torch.forced = take("forced");
    torch.recorders = take("recorders");
    torch.increment_version = take("increment_version");
    torch.is_inference_enabled = take("is_inference_enabled");
    torch.is_inference = PyUnicode_InternFromString("is_inference");
    torch.is_neg = PyUnicode_InternFromString("is_neg");
    torch.requires_grad = PyUnicode_InternFromString("requires_grad");
    torch.level = PyUnicode_InternFromString("_current_level");
    torch.profiling = PyUnicode_InternFromString("_is_profiler_enabled");
    torch.get = PyUnicode_InternFromString("get");
    torch.api = api;
}

bool view_tensor(nb::handle tensor, TensorView* view) {
    constexpr int kCpu = 1, kFloat = 2, kBrain = 4;
    PyTypeObject* type = Py_TYPE(tensor.ptr());
    if (torch.api == nullptr || (type != torch.tensor && type != torch.parameter)) return false;
    if (torch.api->view(tensor.ptr(), &view->dl) != 0) {  // sparse, nested, on meta, ...
        PyErr_Clear();
        return false;
    }
    const DLTensor& dl = view->dl;
    if (dl.device.type != kCpu || dl.dtype.lanes != 1) return false;
    if (dl.dtype.code == kFloat && dl.dtype.bits == 32) {
        view->dtype = kFloat32;
    } else if (dl.dtype.code == kFloat && dl.dtype.bits == 64) {
        view->dtype = kFloat64;
    } else if (dl.dtype.code == kFloat && dl.dtype.bits == 16) {
        view->dtype = kFloat16;
    } else if (dl.dtype.code == kBrain && dl.dtype.bits == 16) {
        view->dtype = kBFloat16;
    } else {
        return false;
    }
    if (dl.data == nullptr && view->numel() > 0) return false;  // a stand-in without memory
    return !is_true(PyObject_CallMethodNoArgs(tensor.ptr(), torch.is_neg));
}

bool nothing_traced() {
    return number(call(torch.dispatch_modes)) == 0 && is_none(call(torch.transforms)) && is_none(call(torch.tracing)) &&
           number(PyObject_GetAttr(torch.forward_ad, torch.level)) < 0;
}

bool nothing_active() {
    return number(call(torch.function_modes)) == 0 && nothing_traced() &&
           !is_true(PyObject_GetAttr(torch.profiler, torch.profiling)) &&
           allows_cpu(PyObject_CallMethodNoArgs(torch.forced, torch.get));
}

bool records_gradient() { return is_true(call(torch.is_grad_enabled)); }

bool wants_gradient(nb::handle a, nb::handle b, nb::handle c, nb::handle d) {
    if (!records_gradient()) return false;
    for (const nb::handle tensor : {a, b, c, d})
        if (!tensor.is_none() && is_true(PyObject_GetAttr(tensor.ptr(), torch.requires_grad))) return true;
    return false;
}

nb::object record_norm(nb::handle x, nb::handle residual, nb::handle weight, nb::handle bias, nb::handle computed,
                       double eps, bool centered, double weight_offset) {
    const nb::object recorder = nb::borrow(torch.recorders)["norm"];
    return recorder(x, residual, weight, bias, computed, eps, centered, weight_offset);
}

nb::object record_batch_norm(nb::handle x, nb::handle weight, nb::handle bias, nb::handle mean, nb::handle rstd,
                             int64_t count, double eps, nb::handle out) {
    const nb::object recorder = nb::borrow(torch.recorders)["batch_norm"];
    return recorder(x, weight, bias, mean, rstd, count, eps, out);
}

bool refuses_update(nb::handle tensor) {
    return is_true(PyObject_CallMethodNoArgs(tensor.ptr(), torch.is_inference)) &&
           !is_true(call(torch.is_inference_enabled));
}

void count_update(nb::handle a, nb::handle b) { (void)nb::borrow(torch.increment_version)(nb::make_tuple(a, b)); }

// A tensor of this shape, these strides and dtype in the block.
static nb::object block_tensor(const DLTensor& like, Block block) {
    auto* made = new BlockTensor{};
    made->block = block;
    made->managed.version = {1, 0};
    made->managed.context = made;
    made->managed.deleter = BlockTensor::drop;
    made->managed.dl = like;
    made->managed.dl.data = block.data;
    made->managed.dl.byte_offset = 0;
    const int dims = like.ndim;
    for (int i = 0; i < dims; ++i) made->sizes[i] = like.shape[i];
    for (int i = 0; i < dims; ++i) made->sizes[dims + i] = like.strides[i];
    made->managed.dl.shape = made->sizes;
    made->managed.dl.strides = made->sizes + dims;
    void* object = nullptr;
    if (torch.api->to_python(&made->managed, &object) != 0) throw nb::python_error();
    return nb::steal(static_cast<PyObject*>(object));
}

nb::object empty_like(nb::handle tensor, const TensorView& view, void** data) {
    const int64_t bytes = view.numel() * (view.dl.dtype.bits / 8);
    const Block block = bytes < kLeastBlock || view.ndim() > kMostDims ? Block{} : take_block(bytes);
    if (block.data == nullptr) {
        PyObject* made = PyObject_CallOneArg(torch.empty_like, tensor.ptr());
        if (made == nullptr) throw nb::python_error();
        TensorView made_view;
        if (torch.api->view(made, &made_view.dl) != 0) throw nb::python_error();
        *data = made_view.data();
        return nb::steal(made);
    }
    *data = block.data;
    return block_tensor(view.dl, block);
}

nb::object empty(int dtype, int ndim, const int64_t* shape, TensorView* view) {
    DLTensor like{};
    like.device.type = 1;
    like.ndim = ndim;
    like.dtype.code = dtype == kBFloat16 ? 4 : 2;
    like.dtype.bits = uint8_t(dtype == kFloat64 ? 64 : dtype == kFloat32 ? 32 : 16);
    like.dtype.lanes = 1;
    like.shape = shape;
    const int64_t one = 1, bytes = ndim == 1 ? shape[0] * (like.dtype.bits / 8) : 0;
    const Block block = bytes < kLeastBlock ? Block{} : take_block(bytes);  // dweight of a row of millions
    if (block.data != nullptr) {
        like.strides = &one;
        nb::object tensor = block_tensor(like, block);
        if (torch.api->view(tensor.ptr(), &view->dl) != 0) throw nb::python_error();
        view->dtype = dtype;
        return tensor;
    }
    ManagedTensor* managed = nullptr;
    const auto set_error = [](void*, const char*, const char* message) {
        PyErr_SetString(PyExc_RuntimeError, message);
    };
    void* made = nullptr;
    if (torch.api->allocate(&like, &managed, nullptr, set_error) != 0 || torch.api->to_python(managed, &made) != 0)
        throw nb::python_error();
    nb::object tensor = nb::steal(static_cast<PyObject*>(made));
    if (torch.api->view(made, &view->dl) != 0) throw nb::python_error();
    view->dtype = dtype;
    return tensor;
}

int num_threads() { return int(number(call(torch.num_threads))); }

}  // namespace normkit

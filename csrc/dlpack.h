// Conversion of PyTorch's tensors by DLPack's C exchange API: views without copies or reference counts.
// Declared as in dlpack.h 1.3 (https://github.com/dmlc/dlpack), so one build without PyTorch serves all its
// releases.
#ifndef IMF_DLPACK
#define IMF_DLPACK

#include <pybind11/gil_safe_call_once.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>

#include "tensor.h"

namespace imf {

struct DLDataType {
  std::uint8_t code, bits;
  std::uint16_t lanes;
};

struct DLTensor {
  void* data;
  std::int32_t device_type, device_id;
  std::int32_t ndim;
  DLDataType dtype;
  std::int64_t *shape, *strides;
  std::uint64_t byte_offset;
};

struct DLPackExchangeAPI {
  std::uint32_t major, minor;
  void* previous;
  void* managed_tensor_allocator;
  void* managed_tensor_from_py_object_no_sync;
  void* managed_tensor_to_py_object_no_sync;
  int (*dltensor_from_py_object_no_sync)(void* object, DLTensor* out);
  int (*current_work_stream)(std::int32_t device_type, std::int32_t device_id, void** stream);
};

constexpr std::int32_t dl_cpu = 1, dl_cuda = 2;

// Python objects and functions of PyTorch, looked up at the first call.
struct PyTorch {
  PyObject *tensor, *parameter, *dtype;
  const DLPackExchangeAPI* api;
  PyObject *num_threads, *autocast, *transforms, *dispatch_modes, *grad_enabled, *tracing, *profiling,
      *is_neg;

  static const PyTorch& instance() {
    // Python may hand the interpreter lock to another thread meanwhile, which must not wait for this one with
    // it.
    PYBIND11_CONSTINIT static pybind11::gil_safe_call_once_and_store<PyTorch> found;
    return found.call_once_and_store_result(find).get_stored();
  }

  // The answer of one of the functions above as a number: None is 0.
  static long ask(PyObject* function) {
    PyObject* const answer = PyObject_CallNoArgs(function);
    if (!answer) throw pybind11::error_already_set();
    const long number = answer == Py_None ? 0 : PyLong_Check(answer) ? PyLong_AsLong(answer) : 1;
    Py_DECREF(answer);
    return number;
  }

 private:
  static PyTorch find() {
    namespace py = pybind11;
    const py::module_ torch = py::module_::import("torch"), c = py::module_::import("torch._C");
    const py::object tensor = torch.attr("Tensor");
    if (!py::hasattr(tensor, "__dlpack_c_exchange_api__")) {
      throw std::runtime_error(
          "imf_kernels: the kernels take tensors by torch.Tensor.__dlpack_c_exchange_api__, which "
          "PyTorch has from 2.11 on, got PyTorch " +
          py::str(torch.attr("__version__")).cast<std::string>());
    }
    const py::object capsule = tensor.attr("__dlpack_c_exchange_api__");
    const auto* api =
        static_cast<DLPackExchangeAPI*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
    if (!api) throw py::error_already_set();
    while (api && api->major != 1) api = static_cast<const DLPackExchangeAPI*>(api->previous);
    if (!api)
      throw std::runtime_error(
          "imf_kernels: the kernels take tensors by version 1 of DLPack's C exchange API");
    const auto kept = [](py::object x) { return x.release().ptr(); };
    return {kept(tensor),
            kept(torch.attr("nn").attr("Parameter")),
            kept(torch.attr("dtype")),
            api,
            kept(torch.attr("get_num_threads")),
            kept(c.attr("_is_any_autocast_enabled")),
            kept(c.attr("_are_functorch_transforms_active")),
            kept(c.attr("_len_torch_dispatch_stack")),
            kept(torch.attr("is_grad_enabled")),
            kept(c.attr("_get_tracing_state")),
            kept(c.attr("_autograd").attr("_profiler_enabled")),
            kept(py::str("is_neg"))};
  }
};

inline DType dtype_of(DLDataType type) {
  constexpr std::uint8_t floating = 2, bfloat = 4, boolean = 6;
  if (type.lanes != 1) return DType::other;
  if (type.code == floating && type.bits == 32) return DType::float32;
  if (type.code == bfloat && type.bits == 16) return DType::bfloat16;
  if (type.code == floating && type.bits == 16) return DType::float16;
  return type.code == boolean ? DType::boolean : DType::other;
}

inline bool has_elements(const DLTensor& x) {
  return std::find(x.shape, x.shape + x.ndim, 0) == x.shape + x.ndim;
}

// Returns the view of a tensor in memory; throws Python's exception for any other object. Sizes and strides
// are those that the tensor itself holds.
inline Tensor tensor_of(PyObject* object) {
  const PyTorch& torch = PyTorch::instance();
  if (!PyObject_TypeCheck(object, reinterpret_cast<PyTypeObject*>(torch.tensor))) {
    throw pybind11::type_error(std::string("imf_kernels: the kernels take tensors, got ") +
                               Py_TYPE(object)->tp_name);
  }
  DLTensor x;
  if (torch.api->dltensor_from_py_object_no_sync(object, &x)) throw pybind11::error_already_set();
  if (x.device_type != dl_cpu && x.device_type != dl_cuda) {
    throw std::invalid_argument("imf_kernels: the kernels take tensors on CPUs and on CUDA devices");
  }
  const int device = x.device_type == dl_cpu ? cpu_device : x.device_id;
  if (!x.data && has_elements(x)) {
    throw std::invalid_argument("imf_kernels: the kernels take tensors that lie in memory");
  }
  void* const data = x.data ? static_cast<char*>(x.data) + x.byte_offset : nullptr;
  return {data, dtype_of(x.dtype), device, x.ndim, x.shape, x.strides};
}

// Returns PyTorch's current stream on `device`, or its number of threads on the CPU.
inline Place place_of(int device) {
  const PyTorch& torch = PyTorch::instance();
  Place place{device, nullptr, 1};
  if (device == cpu_device) {
    place.threads = static_cast<int>(PyTorch::ask(torch.num_threads));
  } else if (torch.api->current_work_stream(dl_cuda, device, &place.stream)) {
    throw pybind11::error_already_set();
  }
  return place;
}

}  // namespace imf

namespace pybind11::detail {

template <>
struct type_caster<imf::Tensor> {
  PYBIND11_TYPE_CASTER(imf::Tensor, const_name("torch.Tensor"));
  bool load(handle object, bool) {
    value = imf::tensor_of(object.ptr());
    return true;
  }
};

template <>
struct type_caster<imf::Optional<imf::Tensor>> {
  PYBIND11_TYPE_CASTER(imf::Optional<imf::Tensor>, const_name("torch.Tensor | None"));
  bool load(handle object, bool) {
    value = {object.is_none() ? imf::Tensor{nullptr, imf::DType::other, imf::cpu_device, -1, nullptr, nullptr}
                              : imf::tensor_of(object.ptr())};
    return true;
  }
};

}  // namespace pybind11::detail

#endif

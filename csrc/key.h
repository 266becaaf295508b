// Cache keys, as bytes: of the choice of a kernel, and of a compiled Triton kernel.
#ifndef IMF_KEY
#define IMF_KEY

#include <pybind11/pybind11.h>

#include <array>
#include <string>

#include "dlpack.h"

namespace imf {

class Key {
 public:
  Key() { bytes_.reserve(512); }
  template <typename T>
  void add(const T& value) {
    const auto* bytes = reinterpret_cast<const char*>(&value);
    bytes_.append(bytes, sizeof(T));
  }

  // Appends a tensor's dtype, device, sizes, strides and alignment to 16 bytes, or the value of a number,
  // string or dtype; returns false for anything else.
  bool add(PyObject* x, const PyTorch& torch) {
    if (x == Py_None) {
      add('0');
    } else if (Py_TYPE(x) == reinterpret_cast<PyTypeObject*>(torch.tensor) ||
               Py_TYPE(x) == reinterpret_cast<PyTypeObject*>(torch.parameter)) {
      return add_tensor(x, torch);
    } else if (PyFloat_CheckExact(x)) {
      add('f');
      add(PyFloat_AS_DOUBLE(x));
    } else if (PyLong_CheckExact(x) || PyBool_Check(x)) {
      add(PyBool_Check(x) ? 'b' : 'i');
      int overflow = 0;
      add(PyLong_AsLongLongAndOverflow(x, &overflow));
      return !overflow;
    } else if (Py_TYPE(x) == reinterpret_cast<PyTypeObject*>(torch.dtype)) {
      add('d');
      add(x);  // a singleton
    } else if (PyUnicode_CheckExact(x)) {
      Py_ssize_t length = 0;
      const char* const text = PyUnicode_AsUTF8AndSize(x, &length);
      if (!text) {
        PyErr_Clear();  // half a surrogate pair
        return false;
      }
      add('s');
      add(length);
      bytes_.append(text, static_cast<std::size_t>(length));
    } else if (PyTuple_CheckExact(x)) {
      add('t');
      add(PyTuple_GET_SIZE(x));
      for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(x); ++i) {
        if (!add(PyTuple_GET_ITEM(x, i), torch)) return false;
      }
    } else {
      return false;
    }
    return true;
  }

  pybind11::object made() const { return pybind11::bytes(bytes_); }

 private:
  bool add_tensor(PyObject* object, const PyTorch& torch) {
    PyObject* const negated = PyObject_CallMethodNoArgs(object, torch.is_neg);
    if (!negated) throw pybind11::error_already_set();
    Py_DECREF(negated);
    if (negated == Py_True) return false;
    DLTensor x;
    if (torch.api->dltensor_from_py_object_no_sync(object, &x)) {
      PyErr_Clear();  // a tensor without memory
      return false;
    }
    add('T');
    add(std::array<std::int32_t, 4>{x.device_type, x.device_id, x.ndim,
                                    x.dtype.code | x.dtype.bits << 8 | x.dtype.lanes << 16});
    add(static_cast<char>((reinterpret_cast<std::uintptr_t>(x.data) + x.byte_offset) % 16));
    const auto bytes = static_cast<std::size_t>(x.ndim) * sizeof(std::int64_t);
    bytes_.append(reinterpret_cast<const char*>(x.shape), bytes);
    bytes_.append(reinterpret_cast<const char*>(x.strides), bytes);
    return x.data || !has_elements(x);
  }

  std::string bytes_;
};

// Returns the key of a call's arguments and PyTorch's settings; None if the choice must not be cached: for
// tensor subclasses, tensors without memory, transforms of torch.func and dispatch modes.
inline pybind11::object key(const pybind11::tuple& arguments) {
  const PyTorch& torch = PyTorch::instance();
  if (PyTorch::ask(torch.transforms) || PyTorch::ask(torch.dispatch_modes) || PyTorch::ask(torch.tracing)) {
    return pybind11::none();
  }
  Key key;
  key.add(static_cast<char>(PyTorch::ask(torch.autocast) | PyTorch::ask(torch.grad_enabled) << 1 |
                            PyTorch::ask(torch.profiling) << 2));
  if (!key.add(arguments.ptr(), torch)) return pybind11::none();
  return key.made();
}

// Returns what a launch of a Triton kernel needs: its kind, the device (-1: the CPU), and its arguments.
//
// The kind is all that Triton specialises the kernel on: each tensor's dtype and alignment to 16 bytes, which
// tensors are None, and which integers need 64 bits. The arguments are the tensors' addresses, `fixed` and
// `numbers`.
inline pybind11::tuple launch(const pybind11::tuple& tensors, const pybind11::tuple& fixed,
                              const pybind11::tuple& numbers) {
  const PyTorch& torch = PyTorch::instance();
  pybind11::tuple arguments(tensors.size() + fixed.size() + numbers.size());
  std::size_t place = 0;
  const auto give = [&](PyObject* stolen) {
    if (!stolen) throw pybind11::error_already_set();
    PyTuple_SET_ITEM(arguments.ptr(), static_cast<Py_ssize_t>(place++), stolen);
  };
  std::string kind;
  int device = -1;
  for (const pybind11::handle tensor : tensors) {
    if (tensor.is_none()) {
      kind += '0';
      give(tensor.inc_ref().ptr());
      continue;
    }
    DLTensor x;
    if (torch.api->dltensor_from_py_object_no_sync(tensor.ptr(), &x)) throw pybind11::error_already_set();
    if (x.device_type != dl_cpu) device = x.device_id;
    const std::uintptr_t address = x.data ? reinterpret_cast<std::uintptr_t>(x.data) + x.byte_offset : 0;
    kind += static_cast<char>(x.dtype.code);
    kind += static_cast<char>(address % 16 ? -x.dtype.bits : x.dtype.bits);
    give(PyLong_FromSize_t(address));
  }
  for (const pybind11::handle x : fixed) give(x.inc_ref().ptr());
  for (const pybind11::handle x : numbers) {
    if (PyLong_CheckExact(x.ptr())) kind += PyLong_AsLongLong(x.ptr()) >> 31 ? 'l' : 'i';
    give(x.inc_ref().ptr());
  }
  return pybind11::make_tuple(pybind11::bytes(kind), device, arguments);
}

}  // namespace imf

#endif

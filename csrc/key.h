// Cache keys of calls, as bytes.
#ifndef IMF_KEY
#define IMF_KEY

#include <pybind11/pybind11.h>

#include <array>
#include <string>

#include "dlpack.h"

namespace imf {

inline std::uintptr_t address_of(const DLTensor& x) {
  return x.data ? reinterpret_cast<std::uintptr_t>(x.data) + x.byte_offset : 0;
}

class Key {
 public:
  // The last tensor's address and device, -1 for the CPU.
  std::uintptr_t address = 0;
  int device = -1;

  // resolved: no tensor is negated lazily.
  explicit Key(bool resolved) : resolved_(resolved) { bytes_.reserve(512); }
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

  const std::string& bytes() const { return bytes_; }

 private:
  bool add_tensor(PyObject* object, const PyTorch& torch) {
    if (!resolved_) {
      PyObject* const negated = PyObject_CallMethodNoArgs(object, torch.is_neg);
      if (!negated) throw pybind11::error_already_set();
      Py_DECREF(negated);
      if (negated == Py_True) return false;
    }
    DLTensor x;
    if (torch.api->dltensor_from_py_object_no_sync(object, &x)) {
      PyErr_Clear();  // a tensor without memory
      return false;
    }
    add('T');
    add(std::array<std::int32_t, 4>{x.device_type, x.device_id, x.ndim,
                                    x.dtype.code | x.dtype.bits << 8 | x.dtype.lanes << 16});
    address = address_of(x);
    device = x.device_type == dl_cpu ? -1 : x.device_id;
    add(static_cast<char>(address % 16));
    const auto bytes = static_cast<std::size_t>(x.ndim) * sizeof(std::int64_t);
    bytes_.append(reinterpret_cast<const char*>(x.shape), bytes);
    bytes_.append(reinterpret_cast<const char*>(x.strides), bytes);
    return x.data || !has_elements(x);
  }

  bool resolved_;
  std::string bytes_;
};

// Returns the key of a call's arguments and PyTorch's settings; None if the choice must not be cached: for
// tensor subclasses, tensors without memory, transforms of torch.func and dispatch modes.
inline pybind11::object key(const pybind11::tuple& arguments) {
  const PyTorch& torch = PyTorch::instance();
  if (PyTorch::ask(torch.transforms) || PyTorch::ask(torch.dispatch_modes) || PyTorch::ask(torch.tracing)) {
    return pybind11::none();
  }
  Key key(false);
  key.add(static_cast<char>(PyTorch::ask(torch.autocast) | PyTorch::ask(torch.grad_enabled) << 1 |
                            PyTorch::ask(torch.profiling) << 2));
  if (!key.add(arguments.ptr(), torch)) return pybind11::none();
  return pybind11::bytes(key.bytes());
}

}  // namespace imf

#endif

// imf_kernels._C: what Python may call. Pointers are integers (torch.Tensor.data_ptr()), sizes and
// strides count elements; nothing is checked here, the operation's file in imf_kernels/ops does that.
// The interpreter lock is released while a kernel runs. _C.pyi names every argument.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/isa.h"
#include "cpu/rms_norm.h"

namespace py = pybind11;
using imf::DType;
using imf::index_t;
using pointer = std::uintptr_t;

namespace {

template <typename T = void>
T* at(pointer p) {
  return reinterpret_cast<T*>(p);
}

using unlocked = py::call_guard<py::gil_scoped_release>;

void register_isa(py::module_& m) {
  m.def("supported_isas", &imf::supported_isas);
  m.def("isa_unavailable", &imf::isa_unavailable);
  m.def("set_isa", &imf::set_isa);
  m.def("get_isa", &imf::get_isa);
#if defined(_OPENMP)
  m.attr("openmp") = true;
#else
  m.attr("openmp") = false;
#endif
#if defined(IMF_CUDA_ARCHITECTURES)
  m.attr("cuda_architectures") = IMF_CUDA_ARCHITECTURES;
#else
  m.attr("cuda_architectures") = "";
#endif
}

void register_rms_norm(py::module_& m) {
  using namespace imf;
  m.def(
      "rms_norm_forward",
      [](int x_type, int y_type, pointer x, pointer x_dot, pointer weight, pointer y, pointer y_dot,
         pointer rstd, index_t rows, index_t tangent_rows, index_t width, index_t x_stride,
         index_t x_dot_stride, float eps, int threads) {
        IMF_CALL(rms_norm_forward,
                 {DType(x_type), DType(y_type), at(x), at(x_dot), at<float>(weight), at(y), at(y_dot),
                  at<float>(rstd), rows, tangent_rows, width, x_stride, x_dot_stride, eps, threads});
      },
      unlocked());
  m.def(
      "rms_norm_backward",
      [](int x_type, int y_type, pointer x, pointer dy, pointer weight, pointer rstd, pointer dx,
         pointer dweight, index_t rows, index_t width, index_t x_stride, index_t dy_stride, int threads) {
        IMF_CALL(rms_norm_backward,
                 {DType(x_type), DType(y_type), at(x), at(dy), at<float>(weight), at<float>(rstd), at(dx),
                  at<float>(dweight), rows, width, x_stride, dy_stride, threads});
      },
      unlocked());
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of imf_kernels";
  register_isa(m);
  register_rms_norm(m);
}

// What Python may call of the CUDA kernels, in the manner of csrc/bindings.cpp: in place of a number of
// threads they take a device and a stream of it. imf_kernels/_C.pyi names every argument.
#include "cuda/bindings.h"

#include <pybind11/stl.h>

#include <array>

#include "cuda/gated_residual.h"
#include "cuda/gelu.h"
#include "cuda/layer_norm.h"
#include "cuda/qk_norm_rope.h"
#include "cuda/rms_norm.h"
#include "cuda/runtime.h"
#include "cuda/silu.h"
#include "cuda/swiglu.h"

namespace imf::cuda {
namespace {

namespace py = pybind11;
using pointer = std::uintptr_t;
using Strides = std::array<index_t, 3>;
using unlocked = py::call_guard<py::gil_scoped_release>;

template <typename T = void>
T* at(pointer p) {
  return reinterpret_cast<T*>(p);
}

void register_rms_norm(py::module_& m) {
  m.def(
      "rms_norm_forward_cuda",
      [](int x_type, int y_type, pointer x, pointer x_dot, pointer weight, pointer y, pointer y_dot,
         pointer rstd, index_t rows, index_t tangent_rows, index_t width, index_t x_stride,
         index_t x_dot_stride, float eps, int device, pointer stream) {
        rms_norm_forward({DType(x_type),
                          DType(y_type),
                          at(x),
                          at(x_dot),
                          at<float>(weight),
                          at(y),
                          at(y_dot),
                          at<float>(rstd),
                          rows,
                          tangent_rows,
                          width,
                          x_stride,
                          x_dot_stride,
                          eps,
                          {device, at(stream)}});
      },
      unlocked());
  m.def(
      "rms_norm_backward_cuda",
      [](int x_type, int y_type, pointer x, pointer dy, pointer weight, pointer rstd, pointer dx,
         pointer partial, pointer dweight, index_t rows, index_t width, index_t x_stride, index_t dy_stride,
         index_t shares, int device, pointer stream) {
        rms_norm_backward({DType(x_type),
                           DType(y_type),
                           at(x),
                           at(dy),
                           at<float>(weight),
                           at<float>(rstd),
                           at(dx),
                           at<float>(partial),
                           at<float>(dweight),
                           rows,
                           width,
                           x_stride,
                           dy_stride,
                           shares,
                           {device, at(stream)}});
      },
      unlocked());
}

void register_layer_norm(py::module_& m) {
  m.def(
      "layer_norm_forward_cuda",
      [](int x_type, int y_type, pointer x, pointer x_dot, pointer scale, pointer scale_dot, pointer shift,
         pointer shift_dot, pointer y, pointer y_dot, pointer statistics, index_t rows, index_t tangent_rows,
         index_t length, index_t width, index_t x_stride, index_t x_dot_stride, float one, float eps,
         int device, pointer stream) {
        layer_norm_forward({DType(x_type),
                            DType(y_type),
                            at(x),
                            at(x_dot),
                            at<float>(scale),
                            at<float>(scale_dot),
                            at<float>(shift),
                            at<float>(shift_dot),
                            at(y),
                            at(y_dot),
                            at<float>(statistics),
                            rows,
                            tangent_rows,
                            length,
                            width,
                            x_stride,
                            x_dot_stride,
                            one,
                            eps,
                            {device, at(stream)}});
      },
      unlocked());
  m.def(
      "layer_norm_backward_cuda",
      [](int x_type, int y_type, pointer x, pointer dy, pointer scale, pointer statistics, pointer dx,
         pointer partial, pointer sums, index_t groups, index_t length, index_t width, index_t x_stride,
         index_t dy_stride, index_t shares, float one, int device, pointer stream) {
        layer_norm_backward({DType(x_type),
                             DType(y_type),
                             at(x),
                             at(dy),
                             at<float>(scale),
                             at<float>(statistics),
                             at(dx),
                             at<float>(partial),
                             at<float>(sums),
                             groups,
                             length,
                             width,
                             x_stride,
                             dy_stride,
                             shares,
                             one,
                             {device, at(stream)}});
      },
      unlocked());
}

void register_elementwise(py::module_& m) {
  m.def(
      "gelu_forward_cuda",
      [](int type, pointer x, pointer x_dot, pointer y, pointer y_dot, index_t elements,
         index_t tangent_elements, bool by_tanh, int device, pointer stream) {
        gelu_forward({DType(type),
                      at(x),
                      at(x_dot),
                      at(y),
                      at(y_dot),
                      elements,
                      tangent_elements,
                      {device, at(stream)}},
                     by_tanh);
      },
      unlocked());
  m.def(
      "gelu_backward_cuda",
      [](int type, pointer x, pointer dy, pointer dx, index_t elements, bool by_tanh, int device,
         pointer stream) {
        gelu_backward({DType(type), at(x), at(dy), at(dx), elements, {device, at(stream)}}, by_tanh);
      },
      unlocked());
  m.def(
      "silu_forward_cuda",
      [](int type, pointer x, pointer x_dot, pointer y, pointer y_dot, index_t elements,
         index_t tangent_elements, int device, pointer stream) {
        silu_forward({DType(type),
                      at(x),
                      at(x_dot),
                      at(y),
                      at(y_dot),
                      elements,
                      tangent_elements,
                      {device, at(stream)}});
      },
      unlocked());
  m.def(
      "silu_backward_cuda",
      [](int type, pointer x, pointer dy, pointer dx, index_t elements, int device, pointer stream) {
        silu_backward({DType(type), at(x), at(dy), at(dx), elements, {device, at(stream)}});
      },
      unlocked());
}

void register_swiglu(py::module_& m) {
  m.def(
      "swiglu_forward_cuda",
      [](int type, pointer x, pointer x_dot, pointer y, pointer y_dot, index_t rows, index_t tangent_rows,
         index_t width, index_t x_stride, index_t x_dot_stride, int device, pointer stream) {
        swiglu_forward({DType(type),
                        at(x),
                        at(x_dot),
                        at(y),
                        at(y_dot),
                        rows,
                        tangent_rows,
                        width,
                        x_stride,
                        x_dot_stride,
                        {device, at(stream)}});
      },
      unlocked());
  m.def(
      "swiglu_backward_cuda",
      [](int type, pointer x, pointer dy, pointer dx, index_t rows, index_t width, index_t x_stride,
         index_t dy_stride, int device, pointer stream) {
        swiglu_backward(
            {DType(type), at(x), at(dy), at(dx), rows, width, x_stride, dy_stride, {device, at(stream)}});
      },
      unlocked());
}

void register_gated_residual(py::module_& m) {
  m.def(
      "gated_residual_forward_cuda",
      [](int x_type, int branch_type, pointer x, pointer x_dot, pointer branch, pointer branch_dot,
         pointer gate, pointer gate_dot, pointer y, pointer y_dot, index_t rows, index_t tangent_rows,
         index_t length, index_t width, index_t x_stride, index_t x_dot_stride, index_t branch_stride,
         index_t branch_dot_stride, int device, pointer stream) {
        gated_residual_forward({DType(x_type),
                                DType(branch_type),
                                at(x),
                                at(x_dot),
                                at(branch),
                                at(branch_dot),
                                at<float>(gate),
                                at<float>(gate_dot),
                                at(y),
                                at(y_dot),
                                rows,
                                tangent_rows,
                                length,
                                width,
                                x_stride,
                                x_dot_stride,
                                branch_stride,
                                branch_dot_stride,
                                {device, at(stream)}});
      },
      unlocked());
  m.def(
      "gated_residual_backward_cuda",
      [](int x_type, int branch_type, pointer dy, pointer branch, pointer gate, pointer dbranch,
         pointer partial, pointer dgate, index_t groups, index_t length, index_t width, index_t dy_stride,
         index_t branch_stride, index_t shares, int device, pointer stream) {
        gated_residual_backward({DType(x_type),
                                 DType(branch_type),
                                 at(dy),
                                 at(branch),
                                 at<float>(gate),
                                 at(dbranch),
                                 at<float>(partial),
                                 at<float>(dgate),
                                 groups,
                                 length,
                                 width,
                                 dy_stride,
                                 branch_stride,
                                 shares,
                                 {device, at(stream)}});
      },
      unlocked());
}

void register_qk_norm_rope(py::module_& m) {
  m.def(
      "qk_norm_rope_forward_cuda",
      [](int type, pointer x, pointer x_dot, pointer weight, pointer cos, pointer sin, pointer y,
         pointer y_dot, pointer rstd, index_t batch, index_t tangent_batch, index_t heads, index_t length,
         index_t width, Strides xs, Strides ts, float eps, int device, pointer stream) {
        qk_norm_rope_forward({DType(type),
                              at(x),
                              at(x_dot),
                              at<float>(weight),
                              at<float>(cos),
                              at<float>(sin),
                              at(y),
                              at(y_dot),
                              at<float>(rstd),
                              batch,
                              tangent_batch,
                              heads,
                              length,
                              width,
                              {xs[0], xs[1], xs[2]},
                              {ts[0], ts[1], ts[2]},
                              eps,
                              {device, at(stream)}});
      },
      unlocked());
  m.def(
      "qk_norm_rope_backward_cuda",
      [](int type, pointer x, pointer dy, pointer weight, pointer cos, pointer sin, pointer rstd, pointer dx,
         pointer partial, pointer dweight, index_t batch, index_t heads, index_t length, index_t width,
         Strides xs, Strides dys, index_t shares, int device, pointer stream) {
        qk_norm_rope_backward({DType(type),
                               at(x),
                               at(dy),
                               at<float>(weight),
                               at<float>(cos),
                               at<float>(sin),
                               at<float>(rstd),
                               at(dx),
                               at<float>(partial),
                               at<float>(dweight),
                               batch,
                               heads,
                               length,
                               width,
                               {xs[0], xs[1], xs[2]},
                               {dys[0], dys[1], dys[2]},
                               shares,
                               {device, at(stream)}});
      },
      unlocked());
}

}  // namespace

void register_functions(py::module_& m) {
  m.def("cuda_unavailable", &unavailable);
  register_rms_norm(m);
  register_layer_norm(m);
  register_elementwise(m);
  register_swiglu(m);
  register_gated_residual(m);
  register_qk_norm_rope(m);
}

}  // namespace imf::cuda

// SiLU and GELU with their tangents, and their primal backward. Formulas: imf_kernels/ops/elementwise.py.
#include "common/gelu.h"
#include "cuda/elements.h"

namespace imf::cuda {

void silu_forward(const ElementwiseForward& a) { for_each_element<Silu>("silu_forward", a); }
void silu_backward(const ElementwiseBackward& a) { for_each_element<Silu>("silu_backward", a); }
void gelu_forward(const ElementwiseForward& a) { for_each_element<Gelu<Normal>>("gelu_forward", a); }
void gelu_backward(const ElementwiseBackward& a) { for_each_element<Gelu<Normal>>("gelu_backward", a); }
void gelu_tanh_forward(const ElementwiseForward& a) { for_each_element<Gelu<Tanh>>("gelu_tanh_forward", a); }
void gelu_tanh_backward(const ElementwiseBackward& a) {
  for_each_element<Gelu<Tanh>>("gelu_tanh_backward", a);
}

}  // namespace imf::cuda

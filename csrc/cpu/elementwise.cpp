// SiLU and GELU with their tangents, their primal backward and that of the pair. Formulas:
// imf_kernels/ops/elementwise.py.
#include "cpu/elements.h"
#include "cpu/gelu.h"

namespace imf::IMF_ISA {

void silu_forward(const ElementwiseForward& a) { for_each_element<Silu>(a); }
void silu_backward(const ElementwiseBackward& a) { for_each_element<Silu>(a); }
void silu_pair_backward(const ElementwisePairBackward& a) { for_each_element<Silu>(a); }
void gelu_forward(const ElementwiseForward& a) { for_each_element<Gelu<Normal>>(a); }
void gelu_backward(const ElementwiseBackward& a) { for_each_element<Gelu<Normal>>(a); }
void gelu_pair_backward(const ElementwisePairBackward& a) { for_each_element<Gelu<Normal>>(a); }
void gelu_tanh_forward(const ElementwiseForward& a) { for_each_element<Gelu<Tanh>>(a); }
void gelu_tanh_backward(const ElementwiseBackward& a) { for_each_element<Gelu<Tanh>>(a); }
void gelu_tanh_pair_backward(const ElementwisePairBackward& a) { for_each_element<Gelu<Tanh>>(a); }

}  // namespace imf::IMF_ISA

// SiLU and GELU with their tangents, and their primal backward. Formulas: imf_kernels/ops/elementwise.py.
#include "common/gelu.h"
#include "cuda/elements.h"

namespace imf::cuda {
namespace {

struct Sigmoid {
  IMF_DEVICE Dual<float> forward(Dual<float> x) { return silu(x); }
  IMF_DEVICE float derivative(float x) { return silu_derivative(x, sigmoid(x)); }
};

struct Normal {
  IMF_DEVICE Gate<float> gate(float x) { return normal_gate(x); }
};

struct Tanh {
  IMF_DEVICE Gate<float> gate(float x) { return tanh_gate(x); }
};

template <typename Gating>
struct Gated {
  IMF_DEVICE Dual<float> forward(Dual<float> x) { return gated(x, Gating::gate(x.primal)); }
  IMF_DEVICE float derivative(float x) { return gated_derivative(x, Gating::gate(x)); }
};

}  // namespace

void silu_forward(const ElementwiseForward& a) { for_each_element<Sigmoid>("silu_forward", a); }
void silu_backward(const ElementwiseBackward& a) { for_each_element<Sigmoid>("silu_backward", a); }
void gelu_forward(const ElementwiseForward& a) { for_each_element<Gated<Normal>>("gelu_forward", a); }
void gelu_backward(const ElementwiseBackward& a) { for_each_element<Gated<Normal>>("gelu_backward", a); }
void gelu_tanh_forward(const ElementwiseForward& a) { for_each_element<Gated<Tanh>>("gelu_tanh_forward", a); }
void gelu_tanh_backward(const ElementwiseBackward& a) {
  for_each_element<Gated<Tanh>>("gelu_tanh_backward", a);
}

}  // namespace imf::cuda

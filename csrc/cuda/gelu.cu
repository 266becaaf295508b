// GELU with its tangent, and its primal backward. The formulas are in imf_kernels/ops/gelu.py.
#include "common/gelu.h"
#include "cuda/elements.h"
#include "cuda/gelu.h"

namespace imf::cuda {
namespace {

struct ByNormal {
  IMF_DEVICE Dual<float> forward(Dual<float> x) { return gated(x, normal_gate(x.primal)); }
  IMF_DEVICE float derivative(float x) { return gated_derivative(x, normal_gate(x)); }
};

struct ByTanh {
  IMF_DEVICE Dual<float> forward(Dual<float> x) { return gated(x, tanh_gate(x.primal)); }
  IMF_DEVICE float derivative(float x) { return gated_derivative(x, tanh_gate(x)); }
};

}  // namespace

void gelu_forward(const ElementwiseForward& a, bool by_tanh) {
  by_tanh ? for_each_element<ByTanh>("gelu_forward", a) : for_each_element<ByNormal>("gelu_forward", a);
}

void gelu_backward(const ElementwiseBackward& a, bool by_tanh) {
  by_tanh ? for_each_element<ByTanh>("gelu_backward", a) : for_each_element<ByNormal>("gelu_backward", a);
}

}  // namespace imf::cuda

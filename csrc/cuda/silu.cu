// SiLU with its tangent, and its primal backward. The formulas are in imf_kernels/ops/silu.py.
#include "cuda/elements.h"
#include "cuda/silu.h"

namespace imf::cuda {
namespace {

struct Silu {
  IMF_DEVICE Dual<float> forward(Dual<float> x) { return silu(x); }
  IMF_DEVICE float derivative(float x) { return silu_derivative(x, sigmoid(x)); }
};

}  // namespace

void silu_forward(const ElementwiseForward& a) { for_each_element<Silu>("silu_forward", a); }
void silu_backward(const ElementwiseBackward& a) { for_each_element<Silu>("silu_backward", a); }

}  // namespace imf::cuda

// SiLU with its tangent, and its primal backward. The formulas are in imf_kernels/ops/silu.py.
#include "cpu/silu.h"

#include "cpu/elements.h"

namespace imf {
namespace IMF_ISA {

void silu_forward(const ElementwiseForward& a) {
  for_each_element(a, [](auto x) { return silu(x); });
}

void silu_backward(const ElementwiseBackward& a) {
  for_each_element(a, [](Vec x) { return silu_derivative(x, sigmoid(x)); });
}

}  // namespace IMF_ISA
}  // namespace imf

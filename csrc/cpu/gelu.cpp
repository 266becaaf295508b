// GELU with its tangent, and its primal backward. The formulas are in imf_kernels/ops/gelu.py.
#include "cpu/gelu.h"

#include "common/gelu.h"
#include "cpu/elements.h"

namespace imf {
namespace IMF_ISA {
namespace {

struct Normal {
  Gate<Vec> operator()(Vec x) const { return normal_gate(x); }
};

struct ByTanh {
  Gate<Vec> operator()(Vec x) const { return tanh_gate(x); }
};

template <typename Gating>
struct Gated {
  Gating gate;
  Vec operator()(Vec x) const { return x * gate(x).value; }
  Dual<Vec> operator()(Dual<Vec> x) const { return gated(x, gate(x.primal)); }
};

template <typename Gating>
struct Derivative {
  Gating gate;
  Vec operator()(Vec x) const { return gated_derivative(x, gate(x)); }
};

}  // namespace

void gelu_forward(const ElementwiseForward& a, bool by_tanh) {
  by_tanh ? for_each_element(a, Gated<ByTanh>{}) : for_each_element(a, Gated<Normal>{});
}

void gelu_backward(const ElementwiseBackward& a, bool by_tanh) {
  by_tanh ? for_each_element(a, Derivative<ByTanh>{}) : for_each_element(a, Derivative<Normal>{});
}

}  // namespace IMF_ISA
}  // namespace imf

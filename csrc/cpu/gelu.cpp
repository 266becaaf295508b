// GELU with its tangent, and its primal backward. The formulas are in imf_kernels/ops/gelu.py.
#include "cpu/gelu.h"

#include "cpu/elements.h"

namespace imf {
namespace IMF_ISA {
namespace {

// What multiplies x, and its derivative.
struct Gate {
  Vec value, slope;
};

struct Normal {
  Gate operator()(Vec x) const {
    Gate s;
    normal(x, s.value, s.slope);
    return s;
  }
};

// (1 + tanh(v / 2)) / 2 = 1 / (1 + e^-v). Of e^-|v|, which cannot overflow, both s(|v|) = 1 / (1 + e^-|v|)
// and s(-|v|) = e^-|v| s(|v|) are made without cancellation; their product is s' on either side.
struct ByTanh {
  Gate operator()(Vec x) const {
    const Vec twice(1.59576912160573071f), cubic(0.044715f);  // 2 sqrt(2 / pi)
    const Vec square = x * x;
    const Vec v = twice * x * fma(cubic, square, Vec(1.0f));
    const Vec e = exp(Vec(0.0f) - abs(v));
    const Vec above = Vec(1.0f) / (Vec(1.0f) + e), below = e * above;
    const Vec v_slope = twice * fma(Vec(3.0f) * cubic, square, Vec(1.0f));
    return {select_less(v, Vec(0.0f), below, above), above * below * v_slope};
  }
};

template <typename Gating>
struct Gated {
  Gating gate;
  Vec operator()(Vec x) const { return x * gate(x).value; }
  Dual<Vec> operator()(Dual<Vec> x) const {
    const Gate s = gate(x.primal);
    return {x.primal * s.value, fma(x.primal, s.slope, s.value) * x.tangent};
  }
};

template <typename Gating>
struct Derivative {
  Gating gate;
  Vec operator()(Vec x) const {
    const Gate s = gate(x);
    return fma(x, s.slope, s.value);
  }
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

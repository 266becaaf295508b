// SiLU and GELU with their tangents, and their primal backward. Formulas: imf_kernels/ops/elementwise.py.
#include "common/gelu.h"
#include "cpu/elements.h"

namespace imf::IMF_ISA {
namespace {

struct Sigmoid {
  static Vec forward(Vec x) { return silu(x); }
  static Dual<Vec> forward(Dual<Vec> x) { return silu(x); }
  static Vec derivative(Vec x) { return silu_derivative(x, sigmoid(x)); }
};

struct Normal {
  static Gate<Vec> gate(Vec x) { return normal_gate(x); }
};

struct Tanh {
  static Gate<Vec> gate(Vec x) { return tanh_gate(x); }
};

template <typename Gating>
struct Gated {
  static Vec forward(Vec x) { return x * Gating::gate(x).value; }
  static Dual<Vec> forward(Dual<Vec> x) { return gated(x, Gating::gate(x.primal)); }
  static Vec derivative(Vec x) { return gated_derivative(x, Gating::gate(x)); }
};

}  // namespace

void silu_forward(const ElementwiseForward& a) { for_each_element<Sigmoid>(a); }
void silu_backward(const ElementwiseBackward& a) { for_each_element<Sigmoid>(a); }
void gelu_forward(const ElementwiseForward& a) { for_each_element<Gated<Normal>>(a); }
void gelu_backward(const ElementwiseBackward& a) { for_each_element<Gated<Normal>>(a); }
void gelu_tanh_forward(const ElementwiseForward& a) { for_each_element<Gated<Tanh>>(a); }
void gelu_tanh_backward(const ElementwiseBackward& a) { for_each_element<Gated<Tanh>>(a); }

}  // namespace imf::IMF_ISA

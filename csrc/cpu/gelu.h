// GELU, y = x s(x) with y' = s + x s', by its gates s. Formulas: imf_kernels/ops/elementwise.py.
#pragma once

#include "cpu/dual.h"

namespace imf {

template <typename T>
struct Gate {
  T value, slope;
};

// Functions of the elementwise kernels: y = forward(x), of a number or of a dual, and its derivative.
struct Silu {
  template <typename T>
  static inline T forward(T x) {
    return silu(x);
  }
  template <typename T>
  static inline T derivative(T x) {
    return silu_derivative(x, sigmoid(x));
  }
};

struct Normal {
  template <typename T>
  static inline Gate<T> gate(T x) {
    Gate<T> s;
    normal(x, s.value, s.slope);
    return s;
  }
};

// (1 + tanh(v / 2)) / 2 = 1 / (1 + e^-v). s(|v|) = 1 / (1 + e^-|v|) and s(-|v|) = e^-|v| s(|v|) are computed
// without overflow or cancellation; their product is s' on either side.
struct Tanh {
  template <typename T>
  static inline Gate<T> gate(T x) {
    const T twice(1.59576912160573071f), cubic(0.044715f);  // 2 sqrt(2 / pi)
    const T square = x * x;
    const T v = twice * x * fma(cubic, square, T(1.0f));
    const T e = exp(T(0.0f) - abs(v));
    const T above = T(1.0f) / (T(1.0f) + e), below = e * above;
    const T v_slope = twice * fma(T(3.0f) * cubic, square, T(1.0f));
    return {select_less(v, T(0.0f), below, above), above * below * v_slope};
  }
};

template <typename Gating>
struct Gelu {
  template <typename T>
  static inline T forward(T x) {
    return x * Gating::gate(x).value;
  }
  template <typename T>
  static inline Dual<T> forward(Dual<T> x) {
    const Gate<T> s = Gating::gate(x.primal);
    return {x.primal * s.value, fma(x.primal, s.slope, s.value) * x.tangent};
  }
  template <typename T>
  static inline T derivative(T x) {
    const Gate<T> s = Gating::gate(x);
    return fma(x, s.slope, s.value);
  }
};

}  // namespace imf

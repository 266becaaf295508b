// GELU, y = x s(x) with y' = s + x s' and y" = 2 s' + x s", by its gates s. Formulas:
// imf_kernels/ops/elementwise.py.
#pragma once

#include "cpu/dual.h"

namespace imf {

template <typename T>
struct Gate {
  T value, slope, curvature;  // s, s', s"
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
    s.curvature = T(0.0f) - x * s.slope;
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
    const T slope = above * below * v_slope;
    const T value = select_less(v, T(0.0f), below, above);
    // s" = s (1 - s) ((1 - 2 s) v'^2 + v"), with 1 - 2 s = s(-v) - s(v).
    const T turned = select_less(v, T(0.0f), above - below, below - above);
    const T v_curvature = twice * T(6.0f) * cubic * x;
    return {value, slope, fma(slope, turned * v_slope, above * below * v_curvature)};
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
  template <typename T>
  static inline Dual<T> derivative(Dual<T> x) {
    const Gate<T> s = Gating::gate(x.primal);
    return {fma(x.primal, s.slope, s.value), fma(x.primal, s.curvature, T(2.0f) * s.slope) * x.tangent};
  }
};

}  // namespace imf

// Dual numbers: a value and its directional derivative, f(Dual{x, x_dot}) = Dual{f(x), f'(x) x_dot}.
//
// A kernel writes its formula once for Dual<T> and gets the tangent from the rules below; T is a SIMD
// vector (csrc/cpu/vec.h), a float or a double. The primal is bitwise the same with and without a tangent.
#pragma once

#include <cmath>

namespace imf {

// Scalar versions of functions in csrc/cpu/vec.h. All functions are static for the reason given there.
static inline float fma(float a, float b, float c) { return ::fmaf(a, b, c); }
static inline double fma(double a, double b, double c) { return ::fma(a, b, c); }
static inline float sqrt(float x) { return ::sqrtf(x); }

template <typename T>
struct Dual {
  T primal;
  T tangent;
};

template <typename T>
static inline Dual<T> operator+(Dual<T> a, Dual<T> b) {
  return {a.primal + b.primal, a.tangent + b.tangent};
}

template <typename T>
static inline Dual<T> operator-(Dual<T> a, Dual<T> b) {
  return {a.primal - b.primal, a.tangent - b.tangent};
}

template <typename T>
static inline Dual<T> operator+(Dual<T> a, T constant) {
  return {a.primal + constant, a.tangent};
}

// d(a b) = a_dot b + a b_dot
template <typename T>
static inline Dual<T> operator*(Dual<T> a, Dual<T> b) {
  return {a.primal * b.primal, fma(a.tangent, b.primal, a.primal * b.tangent)};
}

template <typename T>
static inline Dual<T> operator*(Dual<T> a, T constant) {
  return {a.primal * constant, a.tangent * constant};
}

template <typename T>
static inline Dual<T> operator/(Dual<T> a, T constant) {
  return {a.primal / constant, a.tangent / constant};
}

// d(a b + c) = a_dot b + a b_dot + c_dot
template <typename T>
static inline Dual<T> fma(Dual<T> a, Dual<T> b, Dual<T> c) {
  return {fma(a.primal, b.primal, c.primal), fma(a.tangent, b.primal, fma(a.primal, b.tangent, c.tangent))};
}
template <typename T>
static inline Dual<T> fma(Dual<T> a, T constant, Dual<T> c) {
  return {fma(a.primal, constant, c.primal), fma(a.tangent, constant, c.tangent)};
}

// 1/sqrt(x); d = -x_dot / (2 x sqrt(x))
template <typename T>
static inline T rsqrt(T x) {
  return T(1.0f) / sqrt(x);
}
template <typename T>
static inline Dual<T> rsqrt(Dual<T> x) {
  const T y = rsqrt(x.primal);
  return {y, T(-0.5f) * y * y * y * x.tangent};
}

// s(x) = 1 / (1 + e^-x)
template <typename T>
static inline T sigmoid(T x) {
  return T(1.0f) / (T(1.0f) + exp(T(0.0f) - x));
}

// x s(x), and its derivative s (1 + x (1 - s)). Where e^-x overflows, s and both results are correctly 0.
template <typename T>
static inline T silu(T x) {
  return x * sigmoid(x);
}
template <typename T>
static inline T silu_derivative(T x, T s) {
  return s * fma(x, T(1.0f) - s, T(1.0f));
}
// s' = s (1 - s); the second derivative of x s is s (1 - s) (2 + x (1 - 2 s)).
template <typename T>
static inline Dual<T> sigmoid(Dual<T> x) {
  const T s = sigmoid(x.primal);
  return {s, s * (T(1.0f) - s) * x.tangent};
}
template <typename T>
static inline Dual<T> silu_derivative(Dual<T> x, Dual<T> s) {
  const T slope = s.primal * (T(1.0f) - s.primal);
  const T curvature = slope * fma(x.primal, T(1.0f) - T(2.0f) * s.primal, T(2.0f));
  return {silu_derivative(x.primal, s.primal), curvature * x.tangent};
}
template <typename T>
static inline Dual<T> silu(Dual<T> x) {
  const T s = sigmoid(x.primal);
  return {x.primal * s, silu_derivative(x.primal, s) * x.tangent};
}

}  // namespace imf

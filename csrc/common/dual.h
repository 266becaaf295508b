// Dual numbers: a value and its directional derivative, f(Dual{x, x_dot}) = Dual{f(x), f'(x) x_dot}.
//
// A kernel writes its formula once for Dual<T> and gets the tangent from the rules below; T is a float (CUDA)
// or a SIMD vector (csrc/cpu/vec.h). The primal is bitwise the same with and without a tangent.
#pragma once

#include <cmath>

#if defined(__CUDACC__)
#define IMF_HOST_DEVICE static __host__ __device__ __forceinline__
#else
// Internal linkage: see csrc/cpu/vec.h.
#define IMF_HOST_DEVICE static inline
#endif

namespace imf {

// Scalar versions of the functions that csrc/cpu/vec.h has for SIMD vectors.
IMF_HOST_DEVICE float fma(float a, float b, float c) { return ::fmaf(a, b, c); }
IMF_HOST_DEVICE float sqrt(float x) { return ::sqrtf(x); }
IMF_HOST_DEVICE float exp(float x) { return ::expf(x); }
IMF_HOST_DEVICE float abs(float x) { return ::fabsf(x); }
IMF_HOST_DEVICE float select_less(float a, float b, float yes, float no) { return a < b ? yes : no; }
// Normal distribution and density; erfc does not cancel below 0 as 1 + erf does.
IMF_HOST_DEVICE void normal(float x, float& distribution, float& density) {
  distribution = 0.5f * ::erfcf(-0.707106781186547524f * x);
  density = 0.398942280401432678f * ::expf(-0.5f * x * x);
}

template <typename T>
struct Dual {
  T primal;
  T tangent;
};

template <typename T>
IMF_HOST_DEVICE Dual<T> operator+(Dual<T> a, Dual<T> b) {
  return {a.primal + b.primal, a.tangent + b.tangent};
}

template <typename T>
IMF_HOST_DEVICE Dual<T> operator-(Dual<T> a, Dual<T> b) {
  return {a.primal - b.primal, a.tangent - b.tangent};
}

template <typename T>
IMF_HOST_DEVICE Dual<T> operator+(Dual<T> a, T constant) {
  return {a.primal + constant, a.tangent};
}

// d(a b) = a_dot b + a b_dot
template <typename T>
IMF_HOST_DEVICE Dual<T> operator*(Dual<T> a, Dual<T> b) {
  return {a.primal * b.primal, fma(a.tangent, b.primal, a.primal * b.tangent)};
}

template <typename T>
IMF_HOST_DEVICE Dual<T> operator*(Dual<T> a, T constant) {
  return {a.primal * constant, a.tangent * constant};
}

template <typename T>
IMF_HOST_DEVICE Dual<T> operator/(Dual<T> a, T constant) {
  return {a.primal / constant, a.tangent / constant};
}

// d(a b + c) = a_dot b + a b_dot + c_dot
template <typename T>
IMF_HOST_DEVICE Dual<T> fma(Dual<T> a, Dual<T> b, Dual<T> c) {
  return {fma(a.primal, b.primal, c.primal), fma(a.tangent, b.primal, fma(a.primal, b.tangent, c.tangent))};
}
template <typename T>
IMF_HOST_DEVICE Dual<T> fma(Dual<T> a, T constant, Dual<T> c) {
  return {fma(a.primal, constant, c.primal), fma(a.tangent, constant, c.tangent)};
}

// 1/sqrt(x); d = -x_dot / (2 x sqrt(x))
template <typename T>
IMF_HOST_DEVICE T rsqrt(T x) {
  return T(1.0f) / sqrt(x);
}
template <typename T>
IMF_HOST_DEVICE Dual<T> rsqrt(Dual<T> x) {
  const T y = rsqrt(x.primal);
  return {y, T(-0.5f) * y * y * y * x.tangent};
}

// s(x) = 1 / (1 + e^-x)
template <typename T>
IMF_HOST_DEVICE T sigmoid(T x) {
  return T(1.0f) / (T(1.0f) + exp(T(0.0f) - x));
}

// x s(x), and its derivative s (1 + x (1 - s)). Where e^-x overflows, s and both results are correctly 0.
template <typename T>
IMF_HOST_DEVICE T silu(T x) {
  return x * sigmoid(x);
}
template <typename T>
IMF_HOST_DEVICE T silu_derivative(T x, T s) {
  return s * fma(x, T(1.0f) - s, T(1.0f));
}
template <typename T>
IMF_HOST_DEVICE Dual<T> silu(Dual<T> x) {
  const T s = sigmoid(x.primal);
  return {x.primal * s, silu_derivative(x.primal, s) * x.tangent};
}

}  // namespace imf

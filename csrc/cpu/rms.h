// RMSNorm of a row, for rms_norm and qk_norm_rope.
#pragma once

#include "cpu/duals.h"
#include "cpu/rows.h"

namespace imf::IMF_ISA {
namespace {

// Returns (sum share + eps)^(-1/2), where share is 1 / terms. The mean is rounded once: in a row of equal
// values rounding errors would not average out.
inline float inverse_root(float sum, double share, float eps) {
  return 1.0f / std::sqrt(static_cast<float>(static_cast<double>(sum) * share + static_cast<double>(eps)));
}
inline Dual<float> inverse_root(Dual<float> sum, double share, float eps) {
  const float r = inverse_root(sum.primal, share, eps);
  return {r, -0.5f * r * r * r * (sum.tangent * static_cast<float>(share))};
}

// Returns (mean(x^2) + eps)^(-1/2) of a row, where share is 1 / width, and writes its primal to `rstd`. The
// primal takes the same steps with and without a tangent.
template <typename Number, typename T>
IMF_ALWAYS_INLINE Number inverse_rms(DualRow<Number, T> x, index_t width, double share, float eps,
                                     float* rstd) {
  const Number squares = sum_over_row<Number>(
      width, [&](index_t j, int lanes, Number& sum) { sum = add_square(sum, x(j, lanes)); });
  const auto r = inverse_root(with_whole_tangent(reduce_add(squares)), share, eps);
  *rstd = primal(r);
  return broadcast(r);
}

// Returns a row's stored rstd, with its derivative -rstd^3 mean(x x_dot) if it has a tangent.
template <typename Number, typename Row>
IMF_ALWAYS_INLINE Number stored_rstd(Row x, index_t width, float rstd) {
  if constexpr (is_dual<Number>) {
    const Vec products = sum_over_row<Vec>(width, [&](index_t j, int lanes, Vec& sum) {
      const Number xj = x(j, lanes);
      sum = fma(xj.primal, xj.tangent, sum);
    });
    const float mean = reduce_add(products) / static_cast<float>(width);
    return {Vec(rstd), Vec(-rstd * rstd * rstd * mean)};
  } else {
    return Vec(rstd);
  }
}

// With n = x rstd, and dn(j, lanes) the cotangent of n w: adds dn n to dweight, and stores dx = rstd (g - n
// mean(g n)). g(j, lanes) returns dn w, after dn was called for all j.
template <typename Number, typename Row, typename Cotangent, typename Product, typename Result>
IMF_ALWAYS_INLINE void rms_norm_backward(index_t width, Row x, const float* weight, Number rstd, Cotangent dn,
                                         Product g, float* dweight, Result dx) {
  const auto n = [&](index_t j, int lanes) { return x(j, lanes) * rstd; };
  const Number dot = sum_over_row<Number>(width, [&](index_t j, int lanes, Number& sum) {
    const Number dnn = dn(j, lanes) * n(j, lanes);
    store_lanes(dweight + j, load_lanes(dweight + j, lanes) + of_weight(dnn), lanes);
    sum = fma(dnn, load_lanes(weight + j, lanes), sum);
  });
  const Number mean = broadcast(reduce_add(dot) * (1.0f / static_cast<float>(width)));
  for_each_vec(width,
               [&](index_t j, int lanes) { dx.store(j, rstd * (g(j, lanes) - n(j, lanes) * mean), lanes); });
}

}  // namespace
}  // namespace imf::IMF_ISA

// RMSNorm of a row, for rms_norm and qk_norm_rope.
#pragma once

#include "cuda/rows.h"

namespace imf::cuda {

// Replaces a row of `width` elements and its tangent by x rstd w, rstd = (mean(x^2) + eps)^(-1/2); returns
// rstd.
template <int n>
IMF_DEVICE float rms_norm(Row<n>& x, Row<n>& x_dot, const Row<n>& weight, index_t width, float eps) {
  Dual<float> squares{0.0f, 0.0f};
#pragma unroll
  for (int k = 0; k < x.count; ++k) {
    const Dual<float> xk{x[k], x_dot[k]};
    squares = squares + xk * xk;
  }
  const Dual<float> rstd = rsqrt(team_sum(squares) * (1.0f / static_cast<float>(width)) + eps);
#pragma unroll
  for (int k = 0; k < x.count; ++k) {
    const Dual<float> y = Dual<float>{x[k], x_dot[k]} * rstd * weight[k];
    x[k] = y.primal;
    x_dot[k] = y.tangent;
  }
  return rstd.primal;
}

// With n = x rstd, dn the cotangent of n w and g = dn w: returns dx = rstd (g - n mean(g n)), and adds dn n
// to dweight.
template <int n>
IMF_DEVICE Row<n> rms_norm_backward(const Row<n>& x, const Row<n>& dn, const Row<n>& weight, float rstd,
                                    index_t width, Row<n>& dweight) {
  float dot = 0.0f;
#pragma unroll
  for (int k = 0; k < x.count; ++k) {
    const float dnn = dn[k] * (x[k] * rstd);
    dweight[k] += dnn;
    dot += dnn * weight[k];
  }
  const float mean = team_sum(dot) / static_cast<float>(width);
  Row<n> dx;
#pragma unroll
  for (int k = 0; k < x.count; ++k) dx[k] = rstd * (dn[k] * weight[k] - x[k] * rstd * mean);
  return dx;
}

}  // namespace imf::cuda

// RMSNorm with its tangent, and its primal backward. Formulas: imf_kernels/ops/rms_norm.py.
#include "cuda/rows.h"
#include "ops/rms_norm.h"

namespace imf::cuda {
namespace {

template <typename X, typename Y>
__global__ void __launch_bounds__(most_threads) forward(const RmsNormForward a, const bool aligned) {
  constexpr int n = lanes<X>;
  const TeamRow at(a.y, a.y_dot);
  const auto x = load_row<n>(row_of<const X>(a.x, at.row), at.width, aligned);
  const auto x_dot = load_row<n>(row_of<const X>(a.x_dot, at.tangent), at.tangent_width, aligned);
  const auto weight = load_row<n>(a.weight.data, at.width, aligned);

  Dual<float> squares{0.0f, 0.0f};
#pragma unroll
  for (int k = 0; k < x.count; ++k) {
    const Dual<float> xk{x[k], x_dot[k]};
    squares = squares + xk * xk;
  }
  const Dual<float> rstd = rsqrt(team_sum(squares) * (1.0f / static_cast<float>(a.x.width)) + a.eps);
  if (at.writes()) a.rstd.data[at.row] = rstd.primal;

  Row<n> y, y_dot;
#pragma unroll
  for (int k = 0; k < x.count; ++k) {
    const Dual<float> yk = Dual<float>{x[k], x_dot[k]} * rstd * weight[k];
    y[k] = yk.primal;
    y_dot[k] = yk.tangent;
  }
  store_row(row_of<Y>(a.y, at.row), y, at.width, aligned);
  store_row(row_of<Y>(a.y_dot, at.tangent), y_dot, at.tangent_width, aligned);
}

// With g = dy w and n = x rstd: dx = rstd (g - n mean(g n)), dw = sum over rows of dy n.
template <typename X, typename Y>
__global__ void __launch_bounds__(most_threads)
    backward(const RmsNormBackward a, const Shares shares, const bool aligned) {
  constexpr int n = lanes<X>;
  const auto weight = load_row<n>(a.weight.data, a.x.width, aligned);
  Row<n> dweight{};
  for_each_row(shares, 0, [&](index_t row, bool inside) {
    const index_t width = inside ? a.x.width : 0;
    const auto x = load_row<n>(row_of<const X>(a.x, row), width, aligned);
    const auto dy = load_row<n>(row_of<const Y>(a.dy, row), width, aligned);
    const float rstd = inside ? a.rstd.data[row] : 0.0f;
    float dot = 0.0f;
#pragma unroll
    for (int k = 0; k < x.count; ++k) {
      const float dyn = dy[k] * (x[k] * rstd);
      dweight[k] += dyn;
      dot += dyn * weight[k];
    }
    const float mean = team_sum(dot) / static_cast<float>(a.x.width);
    Row<n> dx;
#pragma unroll
    for (int k = 0; k < x.count; ++k) dx[k] = rstd * (dy[k] * weight[k] - x[k] * rstd * mean);
    store_row(row_of<X>(a.dx, row), dx, width, aligned);
  });
  write_sums(row_of<float>(a.partial, blockIdx.x), dweight, a.x.width);
}

}  // namespace

void rms_norm_forward(const RmsNormForward& a) {
  with_types(a.x.dtype, a.y.dtype, [&](auto x, auto y) {
    using X = decltype(x);
    const dim3 threads = threads_for(a.x.width, lanes<X>);
    launch("rms_norm_forward", forward<X, decltype(y)>, blocks_for(a.x.rows, threads), 1, threads, a.place, a,
           all_aligned(lanes<X>, a.x, a.x_dot, a.weight, a.y, a.y_dot));
  });
}

void rms_norm_backward(const RmsNormBackward& a) {
  const Shares shares(a.x.rows, a.partial, a.dweight);
  with_types(a.x.dtype, a.dy.dtype, [&](auto x, auto dy) {
    using X = decltype(x);
    launch("rms_norm_backward", backward<X, decltype(dy)>, shares.blocks(), 1,
           threads_for(a.x.width, lanes<X>), a.place, a, shares,
           all_aligned(lanes<X>, a.x, a.dy, a.weight, a.dx));
  });
  add_up(shares, a.partial, a.dweight, a.place);
}

}  // namespace imf::cuda

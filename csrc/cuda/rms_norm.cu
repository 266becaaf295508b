// RMSNorm with its tangent, and its primal backward. The formulas are in imf_kernels/ops/rms_norm.py.
#include "cuda/rms_norm.h"
#include "cuda/rows.h"

namespace imf::cuda {
namespace {

template <typename X, typename Y>
__global__ void __launch_bounds__(most_threads) forward(const RmsNormForward a, const bool aligned) {
  constexpr int n = lanes<X>;
  const TeamRow at(a.rows, a.tangent_rows, a.width);
  const auto x = load_row<n>(static_cast<const X*>(a.x) + at.row * a.x_stride, at.width, aligned);
  const auto x_dot =
      load_row<n>(static_cast<const X*>(a.x_dot) + at.tangent * a.x_dot_stride, at.tangent_width, aligned);
  const auto weight = load_row<n>(a.weight, at.width, aligned);

  Dual<float> squares{0.0f, 0.0f};
#pragma unroll
  for (int k = 0; k < x.count; ++k) {
    const Dual<float> xk{x[k], x_dot[k]};
    squares = squares + xk * xk;
  }
  const Dual<float> rstd = rsqrt(team_sum(squares) * (1.0f / static_cast<float>(a.width)) + a.eps);
  if (at.writes()) a.rstd[at.row] = rstd.primal;

  Row<n> y, y_dot;
#pragma unroll
  for (int k = 0; k < x.count; ++k) {
    const Dual<float> yk = Dual<float>{x[k], x_dot[k]} * rstd * weight[k];
    y[k] = yk.primal;
    y_dot[k] = yk.tangent;
  }
  store_row(static_cast<Y*>(a.y) + at.row * a.width, y, at.width, aligned);
  store_row(static_cast<Y*>(a.y_dot) + at.tangent * a.width, y_dot, at.tangent_width, aligned);
}

// With g = dy w and n = x rstd: dx = rstd (g - n mean(g n)), dw = sum over rows of dy n.
template <typename X, typename Y>
__global__ void __launch_bounds__(most_threads)
    backward(const RmsNormBackward a, const Shares shares, const bool aligned) {
  constexpr int n = lanes<X>;
  const auto weight = load_row<n>(a.weight, a.width, aligned);
  Row<n> dweight{};
  for_each_row(shares, 0, [&](index_t row, bool inside) {
    const index_t width = inside ? a.width : 0;
    const auto x = load_row<n>(static_cast<const X*>(a.x) + row * a.x_stride, width, aligned);
    const auto dy = load_row<n>(static_cast<const Y*>(a.dy) + row * a.dy_stride, width, aligned);
    const float rstd = inside ? a.rstd[row] : 0.0f;
    float dot = 0.0f;
#pragma unroll
    for (int k = 0; k < x.count; ++k) {
      const float dyn = dy[k] * (x[k] * rstd);
      dweight[k] += dyn;
      dot += dyn * weight[k];
    }
    const float mean = team_sum(dot) / static_cast<float>(a.width);
    Row<n> dx;
#pragma unroll
    for (int k = 0; k < x.count; ++k) dx[k] = rstd * (dy[k] * weight[k] - x[k] * rstd * mean);
    store_row(static_cast<X*>(a.dx) + row * a.width, dx, width, aligned);
  });
  write_sums(a.partial + blockIdx.x * a.width, dweight, a.width);
}

}  // namespace

void rms_norm_forward(const RmsNormForward& a) {
  with_types(a.x_type, a.y_type, [&](auto x, auto y) {
    using X = decltype(x);
    using Y = decltype(y);
    const bool fits = aligned(lanes<X>, Operand::of<X>(a.x, a.x_stride),
                              Operand::of<X>(a.x_dot, a.x_dot_stride), Operand::of<float>(a.weight, 0),
                              Operand::of<Y>(a.y, a.width), Operand::of<Y>(a.y_dot, a.width));
    const dim3 threads = threads_for(a.width, lanes<X>);
    launch("rms_norm_forward", forward<X, Y>, blocks_for(a.rows, threads), 1, threads, a.place, a, fits);
  });
}

void rms_norm_backward(const RmsNormBackward& a) {
  const Shares shares{1, a.rows, a.shares};
  with_types(a.x_type, a.y_type, [&](auto x, auto y) {
    using X = decltype(x);
    using Y = decltype(y);
    const bool fits = aligned(lanes<X>, Operand::of<X>(a.x, a.x_stride), Operand::of<Y>(a.dy, a.dy_stride),
                              Operand::of<float>(a.weight, 0), Operand::of<X>(a.dx, a.width));
    launch("rms_norm_backward", backward<X, Y>, a.shares, 1, threads_for(a.width, lanes<X>), a.place, a,
           shares, fits);
  });
  add_up(a.partial, a.dweight, 1, a.shares, a.width, a.place);
}

}  // namespace imf::cuda

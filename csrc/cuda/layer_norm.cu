// LayerNorm with its tangent, and its primal backward. Formulas: imf_kernels/ops/layer_norm{,_modulate}.py;
// why the mean has a correction: csrc/cpu/layer_norm.cpp.
#include "cuda/rows.h"
#include "ops/layer_norm.h"

namespace imf::cuda {
namespace {

// `length`: rows per group.
template <typename X, typename Y>
__global__ void __launch_bounds__(most_threads)
    forward(const LayerNormForward a, const index_t length, const bool aligned) {
  constexpr int n = lanes<X>;
  const TeamRow at(a.y, a.y_dot);
  const auto x = load_row<n>(row_of<const X>(a.x, at.row), at.width, aligned);
  const auto x_dot = load_row<n>(row_of<const X>(a.x_dot, at.tangent), at.tangent_width, aligned);
  const float count = static_cast<float>(a.x.width);

  Dual<float> sum{0.0f, 0.0f};
#pragma unroll
  for (int k = 0; k < x.count; ++k) sum = sum + Dual<float>{x[k], x_dot[k]};
  const Dual<float> mean = team_sum(sum) / count;
  Dual<float> rest{0.0f, 0.0f};
#pragma unroll
  for (int k = 0; k < x.count; ++k) {
    if (column<n>(k) < a.x.width) rest = rest + (Dual<float>{x[k], x_dot[k]} - mean);
  }
  const Dual<float> correction = team_sum(rest) / count;
  // Corrected before it is squared: the rounding error of a large mean may have no finite square.
  Dual<float> squares{0.0f, 0.0f};
#pragma unroll
  for (int k = 0; k < x.count; ++k) {
    if (column<n>(k) >= a.x.width) continue;
    const Dual<float> centered = Dual<float>{x[k], x_dot[k]} - mean - correction;
    squares = squares + centered * centered;
  }
  const Dual<float> rstd = rsqrt(team_sum(squares) / count + a.eps);
  if (at.writes()) {
    float* statistics = a.statistics.data + 3 * at.row;
    statistics[0] = mean.primal;
    statistics[1] = correction.primal;
    statistics[2] = rstd.primal;
  }

  const index_t group = quotient(at.row, length);
  const index_t tangent_group = group - quotient(a.x.rows - a.y_dot.rows, length);
  // A pack at a time: full rows of all parameters would not fit the registers.
#pragma unroll
  for (int v = 0; v < x.count; v += n) {
    const index_t j = column<n>(v), left = at.width - j, tangent_left = at.tangent_width - j;
    float scale[n], shift[n], scale_dot[n], shift_dot[n], y[n], y_dot[n];
    load<n>(scale, row_of(a.scale, group, j), left, aligned);
    load<n>(shift, row_of(a.shift, group, j), left, aligned);
    load<n>(scale_dot, row_of(a.scale_dot, tangent_group, j), tangent_left, aligned);
    load<n>(shift_dot, row_of(a.shift_dot, tangent_group, j), tangent_left, aligned);
#pragma unroll
    for (int i = 0; i < n; ++i) {
      const Dual<float> normalized = (Dual<float>{x[v + i], x_dot[v + i]} - mean - correction) * rstd;
      const Dual<float> yi =
          fma(normalized, Dual<float>{a.one + scale[i], scale_dot[i]}, Dual<float>{shift[i], shift_dot[i]});
      y[i] = yi.primal;
      y_dot[i] = yi.tangent;
    }
    store<n>(row_of<Y>(a.y, at.row, j), y, left, aligned);
    store<n>(row_of<Y>(a.y_dot, at.tangent, j), y_dot, tangent_left, aligned);
  }
}

// With g = dy (one + scale): dx = rstd (g - mean(g) - n mean(g n)), dscale = sum dy n, dshift = sum dy.
template <typename X, typename Y>
__global__ void __launch_bounds__(most_threads)
    backward(const LayerNormBackward a, const Shares shares, const bool aligned) {
  struct Dots {
    float g, gn;
  };
  constexpr int n = lanes<X>;
  const index_t group = quotient(blockIdx.x, shares.shares);
  Row<n> dscale{}, dshift{};
  for_each_row(shares, group, [&](index_t row, bool inside) {
    const index_t width = inside ? a.x.width : 0;
    const auto x = load_row<n>(row_of<const X>(a.x, row), width, aligned);
    const auto dy = load_row<n>(row_of<const Y>(a.dy, row), width, aligned);
    const float* statistics = a.statistics.data + 3 * row;
    const float mean = inside ? statistics[0] : 0.0f, correction = inside ? statistics[1] : 0.0f;
    const float rstd = inside ? statistics[2] : 0.0f;
    // Read from cache for each row: it would not fit the registers.
    const auto gain = load_row<n>(row_of(a.scale, group), width, aligned);
    Row<n> g, normalized;
    Dots dots{};
#pragma unroll
    for (int k = 0; k < x.count; ++k) {
      g[k] = dy[k] * (a.one + gain[k]);
      normalized[k] = column<n>(k) < a.x.width ? (x[k] - mean - correction) * rstd : 0.0f;
      dscale[k] = fma(dy[k], normalized[k], dscale[k]);
      dshift[k] += dy[k];
      dots.g += g[k];
      dots.gn = fma(g[k], normalized[k], dots.gn);
    }
    dots = team_sum(dots);
    const float mean_g = dots.g / static_cast<float>(a.x.width),
                mean_gn = dots.gn / static_cast<float>(a.x.width);
    Row<n> dx;
#pragma unroll
    for (int k = 0; k < x.count; ++k) dx[k] = rstd * (g[k] - mean_g - normalized[k] * mean_gn);
    store_row(row_of<X>(a.dx, row), dx, width, aligned);
  });
  const index_t share = blockIdx.x;
  write_sums(row_of<float>(a.partial, 2 * share), dscale, a.x.width);
  write_sums(row_of<float>(a.partial, 2 * share + 1), dshift, a.x.width);
}

}  // namespace

void layer_norm_forward(const LayerNormForward& a) {
  const index_t length = length_of(a.x.rows, a.scale.data ? a.scale.rows : a.shift.rows);
  with_types(a.x.dtype, a.y.dtype, [&](auto x, auto y) {
    using X = decltype(x);
    launch_rows<X>(
        "layer_norm_forward", forward<X, decltype(y)>, a.x.rows, a.x.width, a.place, a, length,
        all_aligned(lanes<X>, a.x, a.x_dot, a.scale, a.scale_dot, a.shift, a.shift_dot, a.y, a.y_dot));
  });
}

void layer_norm_backward(const LayerNormBackward& a) {
  const Shares shares(a.x.rows, a.partial, a.sums, 2);
  with_types(a.x.dtype, a.dy.dtype, [&](auto x, auto dy) {
    using X = decltype(x);
    launch("layer_norm_backward", backward<X, decltype(dy)>, shares.blocks(), 1,
           threads_for(a.x.width, lanes<X>), a.place, a, shares,
           all_aligned(lanes<X>, a.x, a.dy, a.scale, a.dx));
  });
  add_up(shares, a.partial, a.sums, a.place);
}

}  // namespace imf::cuda

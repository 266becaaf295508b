// LayerNorm with its tangent, and its primal backward. The formulas are in imf_kernels/ops/layer_norm.py and
// imf_kernels/ops/layer_norm_modulate.py; why the mean has a correction, in csrc/cpu/layer_norm.cpp.
#include "cuda/layer_norm.h"
#include "cuda/rows.h"

namespace imf::cuda {
namespace {

template <typename X, typename Y>
__global__ void __launch_bounds__(most_threads) forward(const LayerNormForward a, const bool aligned) {
  constexpr int n = lanes<X>;
  const TeamRow at(a.rows, a.tangent_rows, a.width);
  const auto x = load_row<n>(static_cast<const X*>(a.x) + at.row * a.x_stride, at.width, aligned);
  const auto x_dot =
      load_row<n>(a.x_dot ? static_cast<const X*>(a.x_dot) + at.tangent * a.x_dot_stride : nullptr,
                  at.tangent_width, aligned);
  const float count = static_cast<float>(a.width);

  Dual<float> sum{0.0f, 0.0f};
#pragma unroll
  for (int k = 0; k < x.count; ++k) sum = sum + Dual<float>{x[k], x_dot[k]};
  const Dual<float> mean = team_sum(sum) / count;
  Dual<float> rest{0.0f, 0.0f};
#pragma unroll
  for (int k = 0; k < x.count; ++k) {
    if (column<n>(k) < a.width) rest = rest + (Dual<float>{x[k], x_dot[k]} - mean);
  }
  const Dual<float> correction = team_sum(rest) / count;
  // Corrected before it is squared: the rounding error of a large mean may have no finite square.
  Dual<float> squares{0.0f, 0.0f};
#pragma unroll
  for (int k = 0; k < x.count; ++k) {
    if (column<n>(k) >= a.width) continue;
    const Dual<float> centered = Dual<float>{x[k], x_dot[k]} - mean - correction;
    squares = squares + centered * centered;
  }
  const Dual<float> rstd = rsqrt(team_sum(squares) / count + a.eps);
  if (at.writes()) {
    float* statistics = a.statistics + 3 * at.row;
    statistics[0] = mean.primal;
    statistics[1] = correction.primal;
    statistics[2] = rstd.primal;
  }

  const index_t group = quotient(at.row, a.length) * a.width;
  const index_t tangent_group = group - quotient(a.rows - a.tangent_rows, a.length) * a.width;
  // A pack at a time: whole rows of all parameters would not fit the registers.
#pragma unroll
  for (int v = 0; v < x.count; v += n) {
    const index_t j = column<n>(v), left = at.width - j, tangent_left = at.tangent_width - j;
    const auto parameter = [&](float* to, const float* p, index_t first, index_t there) {
      load<n>(to, p ? p + first + j : p, there, aligned);
    };
    float scale[n], shift[n], scale_dot[n], shift_dot[n], y[n], y_dot[n];
    parameter(scale, a.scale, group, left);
    parameter(shift, a.shift, group, left);
    parameter(scale_dot, a.scale_dot, tangent_group, tangent_left);
    parameter(shift_dot, a.shift_dot, tangent_group, tangent_left);
#pragma unroll
    for (int i = 0; i < n; ++i) {
      const Dual<float> normalized = (Dual<float>{x[v + i], x_dot[v + i]} - mean - correction) * rstd;
      const Dual<float> yi =
          fma(normalized, Dual<float>{a.one + scale[i], scale_dot[i]}, Dual<float>{shift[i], shift_dot[i]});
      y[i] = yi.primal;
      y_dot[i] = yi.tangent;
    }
    store<n>(static_cast<Y*>(a.y) + at.row * a.width + j, y, left, aligned);
    store<n>(static_cast<Y*>(a.y_dot) + at.tangent * a.width + j, y_dot, tangent_left, aligned);
  }
}

// With g = dy (one + scale): dx = rstd (g - mean(g) - n mean(g n)); summed over the rows of a group,
// dscale = dy n and dshift = dy.
template <typename X, typename Y>
__global__ void __launch_bounds__(most_threads)
    backward(const LayerNormBackward a, const Shares shares, const bool aligned) {
  struct Dots {
    float g, gn;
  };
  constexpr int n = lanes<X>;
  const index_t group = quotient(blockIdx.x, shares.shares);
  const float* scale = a.scale ? a.scale + group * a.width : nullptr;
  Row<n> dscale{}, dshift{};
  for_each_row(shares, group, [&](index_t row, bool inside) {
    const index_t width = inside ? a.width : 0;
    const auto x = load_row<n>(static_cast<const X*>(a.x) + row * a.x_stride, width, aligned);
    const auto dy = load_row<n>(static_cast<const Y*>(a.dy) + row * a.dy_stride, width, aligned);
    const float* statistics = a.statistics + 3 * row;
    const float mean = inside ? statistics[0] : 0.0f, correction = inside ? statistics[1] : 0.0f;
    const float rstd = inside ? statistics[2] : 0.0f;
    const auto gain = load_row<n>(scale, width, aligned);  // from cache: it would not fit the registers
    Row<n> g, normalized;
    Dots dots{};
#pragma unroll
    for (int k = 0; k < x.count; ++k) {
      g[k] = dy[k] * (a.one + gain[k]);
      normalized[k] = column<n>(k) < a.width ? (x[k] - mean - correction) * rstd : 0.0f;
      dscale[k] = fma(dy[k], normalized[k], dscale[k]);
      dshift[k] += dy[k];
      dots.g += g[k];
      dots.gn = fma(g[k], normalized[k], dots.gn);
    }
    dots = team_sum(dots);
    const float mean_g = dots.g / static_cast<float>(a.width),
                mean_gn = dots.gn / static_cast<float>(a.width);
    Row<n> dx;
#pragma unroll
    for (int k = 0; k < x.count; ++k) dx[k] = rstd * (g[k] - mean_g - normalized[k] * mean_gn);
    store_row(static_cast<X*>(a.dx) + row * a.width, dx, width, aligned);
  });
  float* partial = a.partial + blockIdx.x * (2 * a.width);
  write_sums(partial, dscale, a.width);
  write_sums(partial + a.width, dshift, a.width);
}

}  // namespace

void layer_norm_forward(const LayerNormForward& a) {
  with_types(a.x_type, a.y_type, [&](auto x, auto y) {
    using X = decltype(x);
    using Y = decltype(y);
    const bool fits =
        aligned(lanes<X>, Operand::of<X>(a.x, a.x_stride), Operand::of<X>(a.x_dot, a.x_dot_stride),
                Operand::of<float>(a.scale, a.width), Operand::of<float>(a.scale_dot, a.width),
                Operand::of<float>(a.shift, a.width), Operand::of<float>(a.shift_dot, a.width),
                Operand::of<Y>(a.y, a.width), Operand::of<Y>(a.y_dot, a.width));
    const dim3 threads = threads_for(a.width, lanes<X>);
    launch("layer_norm_forward", forward<X, Y>, blocks_for(a.rows, threads), 1, threads, a.place, a, fits);
  });
}

void layer_norm_backward(const LayerNormBackward& a) {
  const Shares shares{a.groups, a.length, a.shares};
  with_types(a.x_type, a.y_type, [&](auto x, auto y) {
    using X = decltype(x);
    using Y = decltype(y);
    const bool fits = aligned(lanes<X>, Operand::of<X>(a.x, a.x_stride), Operand::of<Y>(a.dy, a.dy_stride),
                              Operand::of<float>(a.scale, a.width), Operand::of<X>(a.dx, a.width));
    launch("layer_norm_backward", backward<X, Y>, a.groups * a.shares, 1, threads_for(a.width, lanes<X>),
           a.place, a, shares, fits);
  });
  add_up(a.partial, a.sums, a.groups, a.shares, 2 * a.width, a.place);
}

}  // namespace imf::cuda

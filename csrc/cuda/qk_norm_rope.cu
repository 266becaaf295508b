// Per-head RMSNorm and RoPE with tangent, and the primal backward. Formulas: imf_kernels/ops/qk_norm_rope.py.
#include "cuda/rows.h"
#include "ops/qk_norm_rope.h"

namespace imf::cuda {
namespace {

// Row (b, l, h), counted in this order, the memory order of projections.
struct RowPosition {
  index_t b, l, h;
  __device__ __forceinline__ RowPosition(index_t row, const Heads& x) {
    const index_t position = quotient(row, x.heads);
    h = row - position * x.heads;
    b = quotient(position, x.length);
    l = position - b * x.length;
  }
  // Returns the row's address in x, which begins with sample `first`.
  template <typename T>
  __device__ __forceinline__ const T* in(const Heads& x, index_t first = 0) const {
    return static_cast<const T*>(x.data) + (b - first) * x.stride[0] + h * x.stride[1] + l * x.stride[2];
  }
};

// Cosines and sines of a row's pairs.
template <int n>
struct Rotation {
  Row<n / 2, per_thread / n> cos, sin;

  __device__ __forceinline__ Rotation(const Floats& c, const Floats& s, index_t l, bool aligned)
      : cos(load_row<n / 2, per_thread / n>(row_of(c, l), c.width, aligned)),
        sin(load_row<n / 2, per_thread / n>(row_of(s, l), s.width, aligned)) {}
  // Rotates pair (k, k + 1) of a row.
  __device__ __forceinline__ void turn(Row<n>& row, int k) const {
    const float even = row[k], odd = row[k + 1];
    row[k] = fma(cos[k / 2], even, -sin[k / 2] * odd);
    row[k + 1] = fma(cos[k / 2], odd, sin[k / 2] * even);
  }
  __device__ __forceinline__ void turn_back(Row<n>& row, int k) const {
    const float even = row[k], odd = row[k + 1];
    row[k] = fma(cos[k / 2], even, sin[k / 2] * odd);
    row[k + 1] = fma(cos[k / 2], odd, -sin[k / 2] * even);
  }
};

template <typename T>
__global__ void __launch_bounds__(most_threads) forward(const QkNormRopeForward a, const bool aligned) {
  constexpr int n = lanes<T>;
  const TeamRow at(a.x, a.x_dot);
  const RowPosition position(at.width > 0 ? at.row : 0, a.x);
  const auto x = load_row<n>(position.in<T>(a.x), at.width, aligned);
  const auto x_dot =
      load_row<n>(position.in<T>(a.x_dot, a.x.batch - a.x_dot.batch), at.tangent_width, aligned);
  const auto weight = load_row<n>(a.weight.data, at.width, aligned);
  const Rotation<n> rotation(a.cos, a.sin, position.l, aligned);

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
    if (k % 2 == 1) {
      rotation.turn(y, k - 1);
      rotation.turn(y_dot, k - 1);
    }
  }
  store_row(static_cast<T*>(a.y.data) + at.row * a.x.width, y, at.width, aligned);
  store_row(static_cast<T*>(a.y_dot.data) + at.tangent * a.x.width, y_dot, at.tangent_width, aligned);
}

// dy rotated back is the cotangent of rms_norm's output; the rest is as in rms_norm.cu.
template <typename T>
__global__ void __launch_bounds__(most_threads)
    backward(const QkNormRopeBackward a, const Shares shares, const bool aligned) {
  constexpr int n = lanes<T>;
  const auto weight = load_row<n>(a.weight.data, a.x.width, aligned);
  Row<n> dweight{};
  for_each_row(shares, 0, [&](index_t row, bool inside) {
    const index_t width = inside ? a.x.width : 0;
    const RowPosition position(inside ? row : 0, a.x);
    const auto x = load_row<n>(position.in<T>(a.x), width, aligned);
    auto dn = load_row<n>(position.in<T>(a.dy), width, aligned);
    const Rotation<n> rotation(a.cos, a.sin, position.l, aligned);
    const float rstd = inside ? a.rstd.data[row] : 0.0f;
    float dot = 0.0f;
#pragma unroll
    for (int k = 0; k < x.count; ++k) {
      if (k % 2 == 0) rotation.turn_back(dn, k);
      const float dyn = dn[k] * (x[k] * rstd);
      dweight[k] += dyn;
      dot += dyn * weight[k];
    }
    const float mean = team_sum(dot) / static_cast<float>(a.x.width);
    Row<n> dx;
#pragma unroll
    for (int k = 0; k < x.count; ++k) dx[k] = rstd * (dn[k] * weight[k] - x[k] * rstd * mean);
    store_row(static_cast<T*>(a.dx.data) + row * width, dx, width, aligned);
  });
  write_sums(row_of<float>(a.partial, blockIdx.x), dweight, a.x.width);
}

}  // namespace

void qk_norm_rope_forward(const QkNormRopeForward& a) {
  if (!positions_first(a.y) || !positions_first(a.y_dot)) {
    throw std::invalid_argument("y must be [batch, length, heads, width] in memory");
  }
  with_type(a.x.dtype, [&](auto t) {
    constexpr int n = lanes<decltype(t)>;
    const dim3 threads = threads_for(a.x.width, n);
    launch("qk_norm_rope_forward", forward<decltype(t)>, blocks_for(row_count(a.x), threads), 1, threads,
           a.place, a,
           all_aligned(n, a.x, a.x_dot, a.weight, a.y, a.y_dot) && all_aligned(n / 2, a.cos, a.sin));
  });
}

void qk_norm_rope_backward(const QkNormRopeBackward& a) {
  if (!positions_first(a.dx)) {
    throw std::invalid_argument("dx must be [batch, length, heads, width] in memory");
  }
  const Shares shares(row_count(a.x), a.partial, a.dweight);
  with_type(a.x.dtype, [&](auto t) {
    constexpr int n = lanes<decltype(t)>;
    launch("qk_norm_rope_backward", backward<decltype(t)>, shares.blocks(), 1, threads_for(a.x.width, n),
           a.place, a, shares, all_aligned(n, a.x, a.dy, a.weight, a.dx) && all_aligned(n / 2, a.cos, a.sin));
  });
  add_up(shares, a.partial, a.dweight, a.place);
}

}  // namespace imf::cuda

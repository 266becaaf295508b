// Per-head RMSNorm and RoPE with tangent, and the primal backward. Formulas: imf_kernels/ops/qk_norm_rope.py.
#include "cuda/rms.h"
#include "ops/qk_norm_rope.h"

namespace imf::cuda {
namespace {

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
  const RowPosition position = position_of(at.width > 0 ? at.row : 0, a.x);
  auto x = load_row<n>(row_of<const T>(a.x, position), at.width, aligned);
  auto x_dot =
      load_row<n>(row_of<const T>(a.x_dot, position, a.x.batch - a.x_dot.batch), at.tangent_width, aligned);
  const auto weight = load_row<n>(a.weight.data, at.width, aligned);
  const Rotation<n> rotation(a.cos, a.sin, position.l, aligned);

  const float rstd = rms_norm(x, x_dot, weight, a.x.width, a.eps);
  if (at.writes()) a.rstd.data[at.row] = rstd;
#pragma unroll
  for (int k = 0; k < x.count; k += 2) {
    rotation.turn(x, k);
    rotation.turn(x_dot, k);
  }
  store_row(static_cast<T*>(a.y.data) + at.row * a.x.width, x, at.width, aligned);
  store_row(static_cast<T*>(a.y_dot.data) + at.tangent * a.x.width, x_dot, at.tangent_width, aligned);
}

// dy rotated back is the cotangent of rms_norm's output.
template <typename T>
__global__ void __launch_bounds__(most_threads)
    backward(const QkNormRopeBackward a, const Shares shares, const bool aligned) {
  constexpr int n = lanes<T>;
  const auto weight = load_row<n>(a.weight.data, a.x.width, aligned);
  Row<n> dweight{};
  for_each_row(shares, 0, [&](index_t row, bool inside) {
    const index_t width = inside ? a.x.width : 0;
    const RowPosition position = position_of(inside ? row : 0, a.x);
    const auto x = load_row<n>(row_of<const T>(a.x, position), width, aligned);
    auto dn = load_row<n>(row_of<const T>(a.dy, position), width, aligned);
    const Rotation<n> rotation(a.cos, a.sin, position.l, aligned);
    const float rstd = inside ? a.rstd.data[row] : 0.0f;
#pragma unroll
    for (int k = 0; k < x.count; k += 2) rotation.turn_back(dn, k);
    const auto dx = rms_norm_backward(x, dn, weight, rstd, a.x.width, dweight);
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
    launch_rows<decltype(t)>(
        "qk_norm_rope_forward", forward<decltype(t)>, row_count(a.x), a.x.width, a.place, a,
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

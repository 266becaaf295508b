// Per-head RMSNorm and rotary positions with their tangent, and the primal backward. The formulas are in
// imf_kernels/ops/qk_norm_rope.py.
#include "cuda/qk_norm_rope.h"
#include "cuda/rows.h"

namespace imf::cuda {
namespace {

// Row (b, l, h), counted in this order, in which projections leave their results.
struct RowPosition {
  index_t b, l, h;
  __device__ __forceinline__ RowPosition(index_t row, index_t heads, index_t length) {
    const index_t position = quotient(row, heads);
    h = row - position * heads;
    b = quotient(position, length);
    l = position - b * length;
  }
  // Where it begins; `first` is the b whose data comes first.
  __device__ __forceinline__ index_t offset(const index_t (&stride)[3], index_t first = 0) const {
    return (b - first) * stride[0] + h * stride[1] + l * stride[2];
  }
};

// The cosines and sines of a row's pairs.
template <int n>
struct Rotation {
  Row<n / 2, per_thread / n> cos, sin;

  __device__ __forceinline__ Rotation(const float* c, const float* s, index_t l, index_t width, bool aligned)
      : cos(load_row<n / 2, per_thread / n>(c + l * (width / 2), width / 2, aligned)),
        sin(load_row<n / 2, per_thread / n>(s + l * (width / 2), width / 2, aligned)) {}
  // Turns pair k, k + 1 of a row.
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
  const index_t rows_of_sample = a.heads * a.length;
  const TeamRow at(a.batch * rows_of_sample, a.tangent_batch * rows_of_sample, a.width);
  const RowPosition position(at.width > 0 ? at.row : 0, a.heads, a.length);
  const auto x = load_row<n>(static_cast<const T*>(a.x) + position.offset(a.x_stride), at.width, aligned);
  const auto x_dot =
      load_row<n>(static_cast<const T*>(a.x_dot) + position.offset(a.x_dot_stride, a.batch - a.tangent_batch),
                  at.tangent_width, aligned);
  const auto weight = load_row<n>(a.weight, at.width, aligned);
  const Rotation<n> rotation(a.cos, a.sin, position.l, a.width, aligned);

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
    if (k % 2 == 1) {
      rotation.turn(y, k - 1);
      rotation.turn(y_dot, k - 1);
    }
  }
  store_row(static_cast<T*>(a.y) + at.row * a.width, y, at.width, aligned);
  store_row(static_cast<T*>(a.y_dot) + at.tangent * a.width, y_dot, at.tangent_width, aligned);
}

// dy turned back is the cotangent of rms_norm's output; the rest as in rms_norm.cu.
template <typename T>
__global__ void __launch_bounds__(most_threads)
    backward(const QkNormRopeBackward a, const Shares shares, const bool aligned) {
  constexpr int n = lanes<T>;
  const auto weight = load_row<n>(a.weight, a.width, aligned);
  Row<n> dweight{};
  for_each_row(shares, 0, [&](index_t row, bool inside) {
    const index_t width = inside ? a.width : 0;
    const RowPosition position(inside ? row : 0, a.heads, a.length);
    const auto x = load_row<n>(static_cast<const T*>(a.x) + position.offset(a.x_stride), width, aligned);
    auto dn = load_row<n>(static_cast<const T*>(a.dy) + position.offset(a.dy_stride), width, aligned);
    const Rotation<n> rotation(a.cos, a.sin, position.l, a.width, aligned);
    const float rstd = inside ? a.rstd[row] : 0.0f;
    float dot = 0.0f;
#pragma unroll
    for (int k = 0; k < x.count; ++k) {
      if (k % 2 == 0) rotation.turn_back(dn, k);
      const float dyn = dn[k] * (x[k] * rstd);
      dweight[k] += dyn;
      dot += dyn * weight[k];
    }
    const float mean = team_sum(dot) / static_cast<float>(a.width);
    Row<n> dx;
#pragma unroll
    for (int k = 0; k < x.count; ++k) dx[k] = rstd * (dn[k] * weight[k] - x[k] * rstd * mean);
    store_row(static_cast<T*>(a.dx) + row * a.width, dx, width, aligned);
  });
  write_sums(a.partial + blockIdx.x * a.width, dweight, a.width);
}

template <typename T>
bool rows_aligned(const void* p, const index_t (&stride)[3]) {
  return aligned(lanes<T>, Operand::of<T>(p, stride[0]), Operand::of<T>(p, stride[1]),
                 Operand::of<T>(p, stride[2]));
}

template <typename T>
bool parameters_aligned(const float* weight, const float* cos, const float* sin, index_t width) {
  return aligned(lanes<T>, Operand::of<float>(weight, 0)) &&
         aligned(lanes<T> / 2, Operand::of<float>(cos, width / 2), Operand::of<float>(sin, width / 2));
}

}  // namespace

void qk_norm_rope_forward(const QkNormRopeForward& a) {
  with_type(a.type, [&](auto type) {
    using T = decltype(type);
    const bool fits = rows_aligned<T>(a.x, a.x_stride) && rows_aligned<T>(a.x_dot, a.x_dot_stride) &&
                      parameters_aligned<T>(a.weight, a.cos, a.sin, a.width) &&
                      aligned(lanes<T>, Operand::of<T>(a.y, a.width), Operand::of<T>(a.y_dot, a.width));
    const dim3 threads = threads_for(a.width, lanes<T>);
    launch("qk_norm_rope_forward", forward<T>, blocks_for(a.batch * a.heads * a.length, threads), 1, threads,
           a.place, a, fits);
  });
}

void qk_norm_rope_backward(const QkNormRopeBackward& a) {
  const Shares shares{1, a.batch * a.heads * a.length, a.shares};
  with_type(a.type, [&](auto type) {
    using T = decltype(type);
    const bool fits = rows_aligned<T>(a.x, a.x_stride) && rows_aligned<T>(a.dy, a.dy_stride) &&
                      parameters_aligned<T>(a.weight, a.cos, a.sin, a.width) &&
                      aligned(lanes<T>, Operand::of<T>(a.dx, a.width));
    launch("qk_norm_rope_backward", backward<T>, a.shares, 1, threads_for(a.width, lanes<T>), a.place, a,
           shares, fits);
  });
  add_up(a.partial, a.dweight, 1, a.shares, a.width, a.place);
}

}  // namespace imf::cuda

// RMSNorm with its tangent, and its primal backward. Formulas: imf_kernels/ops/rms_norm.py.
#include "cuda/rms.h"
#include "ops/rms_norm.h"

namespace imf::cuda {
namespace {

template <typename X, typename Y>
__global__ void __launch_bounds__(most_threads) forward(const RmsNormForward a, const bool aligned) {
  constexpr int n = lanes<X>;
  const TeamRow at(a.y, a.y_dot);
  auto x = load_row<n>(row_of<const X>(a.x, at.row), at.width, aligned);
  auto x_dot = load_row<n>(row_of<const X>(a.x_dot, at.tangent), at.tangent_width, aligned);
  const auto weight = load_row<n>(a.weight.data, at.width, aligned);
  const float rstd = rms_norm(x, x_dot, weight, a.x.width, a.eps);
  if (at.writes()) a.rstd.data[at.row] = rstd;
  store_row(row_of<Y>(a.y, at.row), x, at.width, aligned);
  store_row(row_of<Y>(a.y_dot, at.tangent), x_dot, at.tangent_width, aligned);
}

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
    const auto dx = rms_norm_backward(x, dy, weight, rstd, a.x.width, dweight);
    store_row(row_of<X>(a.dx, row), dx, width, aligned);
  });
  write_sums(row_of<float>(a.partial, blockIdx.x), dweight, a.x.width);
}

}  // namespace

void rms_norm_forward(const RmsNormForward& a) {
  with_types(a.x.dtype, a.y.dtype, [&](auto x, auto y) {
    using X = decltype(x);
    launch_rows<X>("rms_norm_forward", forward<X, decltype(y)>, a.x.rows, a.x.width, a.place, a,
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

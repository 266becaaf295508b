// Gated residual with its tangent, and its primal backward. Formulas: imf_kernels/ops/gated_residual.py.
#include "cuda/elements.h"
#include "cuda/rows.h"
#include "ops/gated_residual.h"

namespace imf::cuda {
namespace {

// `length`: rows per group.
template <typename X, typename B>
__global__ void __launch_bounds__(tile_threads)
    forward(const GatedResidualForward a, const index_t length, const bool aligned) {
  constexpr int n = lanes<X>;
  const TileElements at(a.y, a.y_dot, n);
  const index_t group = quotient(at.row, length);
  const index_t tangent_group = group - quotient(a.y.rows - a.y_dot.rows, length);
  float x[n], branch[n], gate[n], x_dot[n], branch_dot[n], gate_dot[n];
  load<n>(x, row_of<const X>(a.x, at.row, at.j), at.left, aligned);
  load<n>(branch, row_of<const B>(a.branch, at.row, at.j), at.left, aligned);
  load<n>(gate, row_of(a.gate, group, at.j), at.left, aligned);
  load<n>(x_dot, row_of<const X>(a.x_dot, at.tangent, at.j), at.tangent_left, aligned);
  load<n>(branch_dot, row_of<const B>(a.branch_dot, at.tangent, at.j), at.tangent_left, aligned);
  load<n>(gate_dot, row_of(a.gate_dot, tangent_group, at.j), at.tangent_left, aligned);
#pragma unroll
  for (int k = 0; k < n; ++k) {
    x[k] = fma(branch[k], gate[k], x[k]);
    x_dot[k] = fma(branch_dot[k], gate[k], x_dot[k]);
    // Without a tangent of the gate nothing is added: 0 times an infinite branch would be NaN.
    if (a.gate_dot.data) x_dot[k] = fma(branch[k], gate_dot[k], x_dot[k]);
  }
  store<n>(row_of<X>(a.y, at.row, at.j), x, at.left, aligned);
  store<n>(row_of<X>(a.y_dot, at.tangent, at.j), x_dot, at.tangent_left, aligned);
}

// dbranch = dy gate, dgate = sum dy branch over a group. A block takes a part of a wide row.
template <typename X, typename B>
__global__ void __launch_bounds__(most_threads)
    backward(const GatedResidualBackward a, const Shares shares, const bool aligned) {
  constexpr int n = lanes<X>;
  const index_t group = quotient(blockIdx.x, shares.shares);
  const index_t first = static_cast<index_t>(blockIdx.y) * widest, width = a.gate.width - first;
  const auto gate = load_row<n>(row_of(a.gate, group, first), width, aligned);
  Row<n> dgate{};
  for_each_row(shares, group, [&](index_t row, bool inside) {
    const index_t left = inside ? width : 0;
    const auto dy = load_row<n>(row_of<const X>(a.dy, row, first), left, aligned);
    const auto branch = load_row<n>(row_of<const B>(a.branch, row, first), left, aligned);
    Row<n> dbranch;
#pragma unroll
    for (int k = 0; k < dy.count; ++k) {
      dgate[k] = fma(dy[k], branch[k], dgate[k]);
      dbranch[k] = dy[k] * gate[k];
    }
    store_row(row_of<B>(a.dbranch, row, first), dbranch, left, aligned);
  });
  write_sums(row_of<float>(a.partial, blockIdx.x, first), dgate, width);
}

}  // namespace

void gated_residual_forward(const GatedResidualForward& a) {
  with_types(a.x.dtype, a.branch.dtype, [&](auto x, auto b) {
    constexpr int n = lanes<decltype(x)>;
    const Tiles tiles(a.y, n);
    launch("gated_residual_forward", forward<decltype(x), decltype(b)>, tiles.blocks, tiles.columns,
           tiles.threads, a.place, a, length_of(a.x.rows, a.gate.rows),
           all_aligned(n, a.x, a.x_dot, a.branch, a.branch_dot, a.gate, a.gate_dot, a.y, a.y_dot));
  });
}

void gated_residual_backward(const GatedResidualBackward& a) {
  const Shares shares(a.dy.rows, a.partial, a.dgate);
  with_types(a.dy.dtype, a.branch.dtype, [&](auto dy, auto b) {
    constexpr int n = lanes<decltype(dy)>;
    launch("gated_residual_backward", backward<decltype(dy), decltype(b)>, shares.blocks(),
           static_cast<unsigned>(divide_up(a.dy.width, widest)), threads_for(a.dy.width, n), a.place, a,
           shares, all_aligned(n, a.dy, a.branch, a.gate, a.dbranch));
  });
  add_up(shares, a.partial, a.dgate, a.place);
}

}  // namespace imf::cuda

// Gated residual with its tangent, and its primal backward. The formulas are in
// imf_kernels/ops/gated_residual.py.
#include "cuda/elements.h"
#include "cuda/gated_residual.h"
#include "cuda/rows.h"

namespace imf::cuda {
namespace {

template <typename X, typename B>
__global__ void __launch_bounds__(tile_threads) forward(const GatedResidualForward a, const bool aligned) {
  constexpr int n = lanes<X>;
  const TileElements at(a.rows, a.tangent_rows, a.width, n);
  const index_t group = quotient(at.row, a.length);
  const index_t tangent_group = group - quotient(a.rows - a.tangent_rows, a.length);
  const auto from = [&](auto* p, index_t first) { return p ? p + first + at.j : p; };
  float x[n], branch[n], gate[n], x_dot[n], branch_dot[n], gate_dot[n];
  load<n>(x, from(static_cast<const X*>(a.x), at.row * a.x_stride), at.left, aligned);
  load<n>(branch, from(static_cast<const B*>(a.branch), at.row * a.branch_stride), at.left, aligned);
  load<n>(gate, from(a.gate, group * a.width), at.left, aligned);
  load<n>(x_dot, from(static_cast<const X*>(a.x_dot), at.tangent * a.x_dot_stride), at.tangent_left, aligned);
  load<n>(branch_dot, from(static_cast<const B*>(a.branch_dot), at.tangent * a.branch_dot_stride),
          at.tangent_left, aligned);
  load<n>(gate_dot, from(a.gate_dot, tangent_group * a.width), at.tangent_left, aligned);
#pragma unroll
  for (int k = 0; k < n; ++k) {
    x[k] = fma(branch[k], gate[k], x[k]);
    x_dot[k] = fma(branch_dot[k], gate[k], x_dot[k]);
    // A gate without a tangent leaves an infinite branch alone: no 0 is multiplied by it.
    if (a.gate_dot) x_dot[k] = fma(branch[k], gate_dot[k], x_dot[k]);
  }
  store<n>(static_cast<X*>(a.y) + at.row * a.width + at.j, x, at.left, aligned);
  store<n>(static_cast<X*>(a.y_dot) + at.tangent * a.width + at.j, x_dot, at.tangent_left, aligned);
}

// dbranch = dy gate; summed over the rows of a group, dgate = dy branch. Of a wide row a block takes a part.
template <typename X, typename B>
__global__ void __launch_bounds__(most_threads)
    backward(const GatedResidualBackward a, const Shares shares, const bool aligned) {
  constexpr int n = lanes<X>;
  const index_t group = quotient(blockIdx.x, shares.shares);
  const index_t first = static_cast<index_t>(blockIdx.y) * widest, width = a.width - first;
  const auto gate = load_row<n>(a.gate + group * a.width + first, width, aligned);
  Row<n> dgate{};
  for_each_row(shares, group, [&](index_t row, bool inside) {
    const index_t left = inside ? width : 0;
    const auto dy = load_row<n>(static_cast<const X*>(a.dy) + row * a.dy_stride + first, left, aligned);
    const auto branch =
        load_row<n>(static_cast<const B*>(a.branch) + row * a.branch_stride + first, left, aligned);
    Row<n> dbranch;
#pragma unroll
    for (int k = 0; k < dy.count; ++k) {
      dgate[k] = fma(dy[k], branch[k], dgate[k]);
      dbranch[k] = dy[k] * gate[k];
    }
    store_row(static_cast<B*>(a.dbranch) + row * a.width + first, dbranch, left, aligned);
  });
  write_sums(a.partial + blockIdx.x * a.width + first, dgate, width);
}

}  // namespace

void gated_residual_forward(const GatedResidualForward& a) {
  with_types(a.x_type, a.branch_type, [&](auto x, auto b) {
    using X = decltype(x);
    using B = decltype(b);
    const bool fits =
        aligned(lanes<X>, Operand::of<X>(a.x, a.x_stride), Operand::of<X>(a.x_dot, a.x_dot_stride),
                Operand::of<B>(a.branch, a.branch_stride), Operand::of<B>(a.branch_dot, a.branch_dot_stride),
                Operand::of<float>(a.gate, a.width), Operand::of<float>(a.gate_dot, a.width),
                Operand::of<X>(a.y, a.width), Operand::of<X>(a.y_dot, a.width));
    const Tiles tiles(a.rows, a.width, lanes<X>);
    launch("gated_residual_forward", forward<X, B>, tiles.blocks, tiles.columns, tiles.threads, a.place, a,
           fits);
  });
}

void gated_residual_backward(const GatedResidualBackward& a) {
  const Shares shares{a.groups, a.length, a.shares};
  with_types(a.x_type, a.branch_type, [&](auto x, auto b) {
    using X = decltype(x);
    using B = decltype(b);
    const bool fits =
        aligned(lanes<X>, Operand::of<X>(a.dy, a.dy_stride), Operand::of<B>(a.branch, a.branch_stride),
                Operand::of<float>(a.gate, a.width), Operand::of<B>(a.dbranch, a.width));
    launch("gated_residual_backward", backward<X, B>, a.groups * a.shares,
           static_cast<unsigned>(divide_up(a.width, widest)), threads_for(a.width, lanes<X>), a.place, a,
           shares, fits);
  });
  add_up(a.partial, a.dgate, a.groups, a.shares, a.width, a.place);
}

}  // namespace imf::cuda

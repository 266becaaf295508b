// What the row kernels share: reductions over a row, and over the threads' partial sums.
#pragma once

#include <cstring>

#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "cpu/vec.h"

namespace imf {
namespace IMF_ISA {
namespace {

template <typename T>
inline float sum_of_squares(const T* x, index_t n) {
  Vec sum(0.0f);
  for_each_vec(n, [&](index_t j, int lanes) {
    const Vec xj = load_lanes(x + j, lanes);
    sum = fma(xj, xj, sum);
  });
  return reduce_add(sum);
}

// The same sum with its tangent, 2 sum(x x_dot). The primal takes the very steps of the one above.
template <typename T>
inline Dual<float> sum_of_squares(const T* x, const T* x_dot, index_t n) {
  Vec sum(0.0f), dot(0.0f);
  for_each_vec(n, [&](index_t j, int lanes) {
    const Dual<Vec> xj = load_dual(x + j, x_dot + j, lanes);
    sum = fma(xj.primal, xj.primal, sum);
    dot = fma(xj.primal, xj.tangent, dot);
  });
  return {reduce_add(sum), 2.0f * reduce_add(dot)};
}

// sum[width] += x[width]
inline void add_row(float* sum, const float* x, index_t width) {
  for_each_vec(width, [&](index_t j, int lanes) {
    store_lanes(sum + j, load_lanes(sum + j, lanes) + load_lanes(x + j, lanes), lanes);
  });
}

// Leaves in total[width] what body(row) adds to block[width] over the rows of a share. A block takes few rows
// before it is added to the total, which keeps the rounding errors of long sums small.
template <typename Body>
inline void sum_over_rows(Range share, index_t width, float* block, float* total, Body body) {
  constexpr index_t rows_in_block = 64;
  const std::size_t bytes = static_cast<std::size_t>(width) * sizeof(float);
  std::memset(total, 0, bytes);
  for (index_t first = share.begin; first < share.end; first += rows_in_block) {
    const index_t end = first + rows_in_block < share.end ? first + rows_in_block : share.end;
    std::memset(block, 0, bytes);
    for (index_t row = first; row < end; ++row) body(row);
    add_row(total, block, width);
  }
}

// Leaves the sum of the rows of partial[rows, width] in the first, adding in the order of the rows.
inline void add_up_rows(float* partial, int rows, index_t width) {
  for (int row = 1; row < rows; ++row) add_row(partial, partial + row * width, width);
}

}  // namespace
}  // namespace IMF_ISA
}  // namespace imf

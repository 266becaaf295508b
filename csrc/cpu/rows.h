// What the row kernels share: reductions over a row, and over the threads' partial sums.
#pragma once

#include <cstring>

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

// Leaves the sum of the rows of partial[rows, width] in the first, adding in the order of the rows.
inline void add_up_rows(float* partial, int rows, index_t width) {
  for (int row = 1; row < rows; ++row) {
    const float* other = partial + row * width;
    for_each_vec(width, [&](index_t j, int lanes) {
      store_lanes(partial + j, load_lanes(partial + j, lanes) + load_lanes(other + j, lanes), lanes);
    });
  }
}

}  // namespace
}  // namespace IMF_ISA
}  // namespace imf

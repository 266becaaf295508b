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

// The sum of term(j, lanes) over a row, lane by lane. Few terms are added up before their sum goes into the
// total, whose rounding errors are carried along (Kahan): the error does not grow with the row.
template <typename Number, typename Term>
inline Number sum_in_blocks(index_t n, Term term) {
  constexpr index_t block = 16 * Vec::width;
  Number total{}, excess{};
  for (index_t first = 0; first < n; first += block) {
    Number sum{};
    for_each_vec(n - first < block ? n - first : block,
                 [&](index_t j, int lanes) { sum = sum + term(first + j, lanes); });
    const Number added = sum - excess, next = total + added;
    excess = (next - total) - added;
    total = next;
  }
  return total;
}

// The floats of scratch that sum_over_rows takes.
inline index_t sum_over_rows_scratch(index_t width) { return 2 * width; }

// Leaves in total[width] what body(row, block) adds to `block` over the rows of a share. Few rows are added
// up before their sum goes into the total, whose rounding errors are carried along (Kahan): the error of a
// weight's gradient does not grow with the rows.
template <typename Body>
inline void sum_over_rows(Range share, index_t width, Scratch& scratch, float* total, Body body) {
  constexpr index_t rows_in_block = 64;
  const std::size_t bytes = static_cast<std::size_t>(width) * sizeof(float);
  float *block = scratch.take<float>(width), *excess = scratch.take<float>(width);
  std::memset(total, 0, bytes);
  std::memset(excess, 0, bytes);
  for (index_t first = share.begin; first < share.end; first += rows_in_block) {
    const index_t end = first + rows_in_block < share.end ? first + rows_in_block : share.end;
    std::memset(block, 0, bytes);
    for (index_t row = first; row < end; ++row) body(row, block);
    for_each_vec(width, [&](index_t j, int lanes) {
      const Vec before = load_lanes(total + j, lanes);
      const Vec added = load_lanes(block + j, lanes) - load_lanes(excess + j, lanes);
      const Vec sum = before + added;
      store_lanes(total + j, sum, lanes);
      store_lanes(excess + j, (sum - before) - added, lanes);
    });
  }
}

// Leaves the sum of the rows of partial[rows, width] in the first, adding in the order of the rows.
inline void add_up_rows(float* partial, int rows, index_t width) {
  for (int row = 1; row < rows; ++row) {
    const float* next = partial + row * width;
    for_each_vec(width, [&](index_t j, int lanes) {
      store_lanes(partial + j, load_lanes(partial + j, lanes) + load_lanes(next + j, lanes), lanes);
    });
  }
}

// Leaves in sums[groups, width] what body(row, block) adds to `block` over the rows of each group, `length`
// of them. `sums` has room for groups + team - 1 rows: what thread adds for group lies in row group + thread,
// and in that row nothing else, since both grow along the rows; a team has no more threads than there are
// rows.
template <typename Body>
inline void sum_over_groups(index_t groups, index_t length, index_t width, int team, float* sums, Body body) {
  const std::size_t bytes = static_cast<std::size_t>(width) * sizeof(float);
  if (length == 0) {
    std::memset(sums, 0, static_cast<std::size_t>(groups) * bytes);
    return;
  }
  on_each_thread(team, [&](int thread) {
    Range rows = share_of(groups * length, thread, team);
    while (rows.begin < rows.end) {
      const index_t group = rows.begin / length, next = (group + 1) * length;
      const index_t end = next < rows.end ? next : rows.end;
      Scratch scratch(sum_over_rows_scratch(width));
      sum_over_rows({rows.begin, end}, width, scratch, sums + (group + thread) * width, body);
      rows.begin = end;
    }
  });
  for (int thread = 1; thread < team; ++thread) {  // what thread 0 added lies where it belongs
    const Range rows = share_of(groups * length, thread, team);
    for (index_t group = rows.begin / length; group * length < rows.end; ++group) {
      float* total = sums + group * width;
      const float* part = sums + (group + thread) * width;
      if (rows.begin <= group * length) {  // the group's first rows are this thread's
        std::memcpy(total, part, bytes);
        continue;
      }
      for_each_vec(width, [&](index_t j, int lanes) {
        store_lanes(total + j, load_lanes(total + j, lanes) + load_lanes(part + j, lanes), lanes);
      });
    }
  }
}

}  // namespace
}  // namespace IMF_ISA
}  // namespace imf

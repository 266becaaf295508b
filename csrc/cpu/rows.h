// Sums over a row, and over the rows of a group. Both add a few terms sequentially and such sums pairwise, so
// that rounding errors grow with the logarithm of the number of terms, even if all are equal. Infinite and
// NaN terms give the result of a plain sum.
#pragma once

#include <cmath>

#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "cpu/vec.h"
#include "errors.h"
#include "tensor.h"

// Otherwise the compiler makes these sums calls for each row, with their results in memory.
#define IMF_ALWAYS_INLINE __attribute__((always_inline)) inline

namespace imf::IMF_ISA {
namespace {

// Two sums taken in one pass.
template <typename Number>
struct Pair {
  Number first, second;
};

template <typename Number>
inline Pair<Number> operator+(Pair<Number> a, Pair<Number> b) {
  return {a.first + b.first, a.second + b.second};
}

// Sums the terms from `first` on, eight vectors at a time.
template <typename Number, typename Add>
IMF_ALWAYS_INLINE Number sum_in_eights(index_t first, index_t n, Add add) {
  constexpr index_t part = 8 * Vec::width;
  Number total{};
  for (; first + part <= n; first += part) {
    Number sum{};
    for (int i = 0; i < 8; ++i) add(first + i * Vec::width, Vec::width, sum);
    total = total + sum;
  }
  if (first < n) {
    Number sum{};
    for_each_vec(n - first, [&](index_t j, int lanes) { add(first + j, lanes, sum); });
    total = total + sum;
  }
  return total;
}

// Sums over a row, lane by lane: add(j, lanes, sum) adds the terms at j to `sum`, called once for each j in
// rising order. In long rows 16 vectors make a run of `ways` parallel sums; the rest is taken eight vectors
// at a time. Four runs are added sequentially, then pairwise: levels[k] holds the sum of 2^k fours if bit k
// of `fours` is set.
template <typename Number, int ways = 4, typename Add>
IMF_ALWAYS_INLINE Number sum_over_row(index_t n, Add add) {
  constexpr index_t part = 8 * Vec::width, run = 2 * part;
  Number levels[32], total{};
  if (__builtin_expect(n <= part, 1)) {  // such as a head
    for_each_vec(n, [&](index_t j, int lanes) { add(j, lanes, total); });
    return total;
  }
  if (__builtin_expect(n < run, 1)) return sum_in_eights<Number>(0, n, add);
  index_t fours = 0, first = 0;
  for (int runs = 1; first + run <= n; ++runs) {
    Number sums[ways] = {};
    for (const index_t end = first + run; first < end; first += ways * Vec::width) {
      for (int i = 0; i < ways; ++i) add(first + i * Vec::width, Vec::width, sums[i]);
    }
    for (int half = ways / 2; half; half /= 2) {
      for (int i = 0; i < half; ++i) sums[i] = sums[i] + sums[i + half];
    }
    total = total + sums[0];
    if (runs % 4) continue;
    int level = 0;
    for (index_t k = fours++; k & 1; k >>= 1) total = levels[level++] + total;
    levels[level] = total;
    total = Number{};
  }
  total = total + sum_in_eights<Number>(first, n, add);
  for (int level = 0; fours; ++level, fours >>= 1) {
    if (fours & 1) total = levels[level] + total;
  }
  return total;
}

// Adds the square of x to a sum of squares, and x x_dot, half of its derivative, to the tangent;
// with_whole_tangent doubles it at the end.
inline Vec add_square(Vec sum, Vec x) { return fma(x, x, sum); }
inline Dual<Vec> add_square(Dual<Vec> sum, Dual<Vec> x) {
  return {fma(x.primal, x.primal, sum.primal), fma(x.primal, x.tangent, sum.tangent)};
}
inline float with_whole_tangent(float sum) { return sum; }
inline Dual<float> with_whole_tangent(Dual<float> sum) { return {sum.primal, 2.0f * sum.tangent}; }

// Sums part(0) ... part(count - 1), each [n], pairwise into part(0).
template <typename Part>
inline void add_pairwise(index_t count, index_t n, Part part) {
  for (index_t distance = 1; distance < count; distance *= 2) {
    for (index_t i = 0; i + distance < count; i += 2 * distance) {
      float* sum = part(i);
      const float* next = part(i + distance);
      for_each_vec(n, [&](index_t j, int lanes) {
        store_lanes(sum + j, load_lanes(sum + j, lanes) + load_lanes(next + j, lanes), lanes);
      });
    }
  }
}

// Sums over the `length` rows of each group, into sums[groups, width]. Rows are split into blocks by the
// shape alone, so that no result depends on the number of threads.
class GroupSums {
  struct RestOfBlock;

 public:
  // `partial` has one row per block if a group has several, split as in imf_kernels/backends/cpu.py.
  GroupSums(index_t groups, index_t length, index_t width, const Floats& partial, const Floats& sums)
      : groups_(groups),
        length_(length),
        width_(width),
        // Narrow rows make long blocks, so that there are few sums compared with rows.
        block_rows_(width < 1024 ? 64 : 32),
        group_blocks_(length > block_rows_ ? (length + block_rows_ - 1) / block_rows_ : 1),
        sums_(sums.data),
        partial_(group_blocks_ > 1 ? partial.data : sums.data) {
    if (group_blocks_ > 1 && partial.rows * partial.width != blocks() * width) {
      refuse("partial must have % shares per group", {group_blocks_});
    }
  }

  index_t blocks() const { return groups_ * group_blocks_; }

  // Sums body(row, sum[width]), which adds to `sum`, over each block of `share`. Not inlined, but `body` is.
  template <typename Body>
  [[gnu::noinline, gnu::flatten]] void add(Range share, Body body) {
    constexpr index_t few = 16;  // rows added sequentially
    const index_t rest_size = (block_rows_ / few - 1) * width_;
    ScratchOf<RestOfBlock> scratch(rest_size);  // the body may hold a Scratch
    float* rest = scratch.take<float>(rest_size);
    for (index_t block = share.begin; block < share.end; ++block) {
      const index_t group = block / group_blocks_, first = block % group_blocks_ * block_rows_;
      const index_t end = first + block_rows_ < length_ ? first + block_rows_ : length_;
      const auto part = [&](index_t i) { return i ? rest + (i - 1) * width_ : of_block(block); };
      index_t parts = 0;
      for (index_t row = first; row < end || parts == 0; ++parts) {
        float* sum = part(parts);
        for (index_t j = 0; j < width_; ++j) sum[j] = 0.0f;
        for (const index_t last = row + few < end ? row + few : end; row < last; ++row) {
          body(group * length_ + row, sum);
        }
      }
      add_pairwise(parts, width_, part);
    }
  }

  // Adds up the blocks of each group, pairwise, on at most `team` threads.
  void finish(int team) {
    if (group_blocks_ == 1) return;
    constexpr index_t columns = 64;  // of a task
    const index_t tasks = (width_ + columns - 1) / columns;
    team = team_size(team, blocks() * width_, tasks);
    on_each_thread(team, [&](int thread) {
      const Range share = share_of(tasks, thread, team);
      const index_t begin = share.begin * columns;
      const index_t end = share.end * columns < width_ ? share.end * columns : width_;
      for (index_t group = 0; group < groups_; ++group) {
        const index_t first = group * group_blocks_;
        add_pairwise(group_blocks_, end - begin, [&](index_t i) { return of_block(first + i) + begin; });
        const float* total = of_block(first);
        for (index_t j = begin; j < end; ++j) sums_[group * width_ + j] = total[j];
      }
    });
  }

 private:
  float* of_block(index_t block) const { return partial_ + block * width_; }

  index_t groups_, length_, width_, block_rows_, group_blocks_;
  float* sums_;
  float* partial_;  // [blocks, width]
};

// Sums body(row, sum), which adds to `sum`, over the rows of each group into sums[groups, width].
template <typename Body>
inline void sum_over_groups(index_t groups, index_t length, index_t width, int team, const Floats& partial,
                            const Floats& sums, Body body) {
  GroupSums group_sums(groups, length, width, partial, sums);
  on_each_thread(team,
                 [&](int thread) { group_sums.add(share_of(group_sums.blocks(), thread, team), body); });
  group_sums.finish(team);
}

}  // namespace
}  // namespace imf::IMF_ISA

// Loops over rows of which the last ones have tangents: a kernel is written once, for a Number that is a Vec
// or a Dual<Vec>.
#pragma once

#include <type_traits>

#include "cpu/parallel.h"
#include "cpu/vec.h"
#include "errors.h"
#include "tensor.h"

namespace imf::IMF_ISA {
namespace {

inline index_t stride_of(const Rows& x) { return x.stride; }
inline index_t stride_of(const Floats& x) { return x.width; }

// Returns the address of column j of row i; null without a view.
template <typename T = const float, typename View>
inline T* row_of(const View& x, index_t i, index_t j = 0) {
  return x.data ? static_cast<T*>(x.data) + i * stride_of(x) + j : nullptr;
}

// Returns the number of rows per group. Throws unless rows are those of whole groups, and rows with a tangent
// those of `tangent_groups`, if any.
inline index_t length_of(index_t rows, index_t groups, index_t tangents = 0, index_t tangent_groups = 0) {
  const index_t length = groups > 1 ? rows / groups : rows;
  if ((groups == 0 && rows > 0) ||
      (groups > 1 && (length * groups != rows || (tangent_groups && tangent_groups * length != tangents)))) {
    refuse("rows must be those of whole groups, got % of % and, with a tangent, % of %",
           {rows, groups, tangents, tangent_groups});
  }
  return length;
}

template <typename Number>
constexpr bool is_dual = !std::is_same_v<Number, Vec>;

// A row and its tangent, which is ignored where Number is a Vec.
template <typename Number, typename T>
struct DualRow {
  T *primal, *tangent;

  Number operator()(index_t j, int lanes) const {
    const Vec x = load_lanes(primal + j, lanes);
    if constexpr (is_dual<Number>) {
      return {x, load_lanes(tangent + j, lanes)};
    } else {
      return x;
    }
  }
  // The same with zeros where `primal` or `tangent` is null.
  Number or_zero(index_t j, int lanes) const {
    const Vec x = load_or_zero(primal, j, lanes);
    if constexpr (is_dual<Number>) {
      return {x, load_or_zero(tangent, j, lanes)};
    } else {
      return x;
    }
  }
  void store(index_t j, Number x, int lanes) const {
    if constexpr (is_dual<Number>) {
      store_lanes(primal + j, x.primal, lanes);
      store_lanes(tangent + j, x.tangent, lanes);
    } else {
      store_lanes(primal + j, x, lanes);
    }
  }
  // The same where `primal` may be null: of a gradient that has no place.
  void store_given(index_t j, Number x, int lanes) const {
    if constexpr (is_dual<Number>) {
      if (primal) store_lanes(primal + j, x.primal, lanes);
      store_lanes(tangent + j, x.tangent, lanes);
    } else {
      store_lanes(primal + j, x, lanes);
    }
  }
  void prefetch(index_t j, index_t tangent_j) const {
    IMF_ISA::prefetch(primal + j);
    if constexpr (is_dual<Number>) IMF_ISA::prefetch(tangent + tangent_j);
  }
};

// Returns row `row` of x, from column j on, with row `t` of x_dot.
template <typename Number, typename T = const float, typename View, typename Tangent>
inline DualRow<Number, T> dual_row(const View& x, index_t row, const Tangent& x_dot, index_t t,
                                   index_t j = 0) {
  return {row_of<T>(x, row, j), is_dual<Number> ? row_of<T>(x_dot, t, j) : nullptr};
}

// A row of cotangents dy and dy_dot, or of gradients dx and dx_dot, as a backward in duals takes them: the
// value is that of the tangent, and its derivative that of the primal.
template <typename Number, typename T>
inline DualRow<Number, T> cotangents(T* of_primal, T* of_tangent) {
  if constexpr (is_dual<Number>) return {of_tangent, of_primal};
  return {of_primal, nullptr};
}
template <typename Number, typename T = const float, typename View, typename Tangent>
inline DualRow<Number, T> cotangent_row(const View& dy, index_t row, const Tangent& dy_dot, index_t t,
                                        index_t j = 0) {
  return cotangents<Number>(row_of<T>(dy, row, j), is_dual<Number> ? row_of<T>(dy_dot, t, j) : nullptr);
}

// Returns the part of a backward in duals that is the gradient of a weight, whose own tangent is zero.
inline Vec of_weight(Vec x) { return x; }
inline Vec of_weight(Dual<Vec> x) { return x.tangent; }

// Calls body(number) with a Dual<Vec> for a row with a tangent, else with a Vec.
template <typename Body>
__attribute__((always_inline)) inline void with_number(bool has_tangent, Body body) {
  if (has_tangent) {
    body(Dual<Vec>());
  } else {
    body(Vec());
  }
}

// Calls body(j, lanes) over a share of elements, a vector at a time from its beginning on.
template <typename Body>
inline void for_each_vec(Range share, Body body) {
  for_each_vec(share.end - share.begin, [&](index_t j, int lanes) { body(share.begin + j, lanes); });
}

// Calls body(number, row, t) for the rows of a share: `number` is a Vec or, from row `first_tangent` on, a
// Dual<Vec>, whose type counts alone; t = row - first_tangent. Not inlined, but `body` is.
template <typename Body>
[[gnu::noinline, gnu::flatten]] void for_rows(Range share, index_t first_tangent, Body body) {
  index_t row = share.begin;
  for (; row < share.end && row < first_tangent; ++row) body(Vec(), row, index_t{0});
  for (; row < share.end; ++row) body(Dual<Vec>(), row, row - first_tangent);
}

// The same for the rows of y, on at most `threads` threads.
template <typename Body>
inline void for_each_row(const Rows& y, const Rows& y_dot, int threads, Body body) {
  const int team = team_size(threads, (y.rows + y_dot.rows) * y.width, y.rows);
  on_each_thread(team, [&](int thread) {
    for_rows(share_of_rows(y.rows, y_dot.rows, thread, team), y.rows - y_dot.rows, body);
  });
}

}  // namespace
}  // namespace imf::IMF_ISA

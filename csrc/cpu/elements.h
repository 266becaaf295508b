// Loops over elements for the elementwise kernels (ops/elementwise.h).
#pragma once

#include <algorithm>

#include "cpu/dtypes.h"
#include "cpu/duals.h"
#include "ops/elementwise.h"

namespace imf::IMF_ISA {
namespace {

// A part of a row: `count` elements from column j of row i on, whose tangents, if they have any, begin at
// column s of row t.
struct Part {
  index_t i, j, t, s, count;
};

// Whether the rows of each of some tensors lie one after the other. Where they do not all have one width.
template <typename... Views>
inline bool are_contiguous(const Rows& x, const Views&... others) {
  const auto is_contiguous = [](const Rows& y) { return y.rows < 2 || y.stride == y.width; };
  if (is_contiguous(x) && (is_contiguous(others) && ...)) return true;
  if (((others.data && others.width != x.width) || ...)) refuse("all tensors must have rows of one width");
  return false;
}

// Calls body(element, number, part) for the parts of rows that make up x: `element` is of its element type
// and `number` a Vec or, for the last elements, which have a tangent x_dot, a Dual<Vec>.
template <typename Body>
inline void for_each_part(const Rows& x, const Rows& x_dot, bool contiguous, int threads, Body body) {
  const index_t elements = x.rows * x.width, moving = x_dot.rows * x_dot.width, still = elements - moving;
  const index_t width = contiguous ? elements : x.width;  // of a row
  const int team = team_size(threads, elements, elements);
  const auto each = [&](auto element, auto number, index_t first, Range share) {
    for (index_t at = share.begin; at < share.end;) {
      const index_t j = (first + at) % width, count = std::min(width - j, share.end - at);
      body(element, number, Part{(first + at) / width, j, at / width, at % width, count});
      at += count;
    }
  };
  with_type(x.dtype, [&](auto element) {
    on_each_thread(team, [&](int thread) {
      each(element, Vec(), 0, share_of(still, thread, team));
      each(element, Dual<Vec>(), still, share_of(moving, thread, team));
    });
  });
}

// Returns a part of x and x_dot.
template <typename Number, typename T, typename View, typename Tangent>
inline DualRow<Number, T> part_of(const View& x, const Tangent& x_dot, const Part& part) {
  return {row_of<T>(x, part.i, part.j), is_dual<Number> ? row_of<T>(x_dot, part.t, part.s) : nullptr};
}

// The same of cotangents or gradients.
template <typename Number, typename T, typename View, typename Tangent>
inline DualRow<Number, T> cotangent_part(const View& dy, const Tangent& dy_dot, const Part& part) {
  return cotangents<Number>(row_of<T>(dy, part.i, part.j), row_of<T>(dy_dot, part.t, part.s));
}

// Computes y = F::forward(x), of a Vec or, for elements with a tangent, a Dual<Vec>.
template <typename F>
inline void for_each_element(const ElementwiseForward& a) {
  const bool contiguous = are_contiguous(a.x, a.x_dot, a.y, a.y_dot);
  for_each_part(a.x, a.x_dot, contiguous, a.place.threads, [&](auto element, auto number, const Part& part) {
    using T = decltype(element);
    using Number = decltype(number);
    const auto x = part_of<Number, const T>(a.x, a.x_dot, part);
    const auto y = part_of<Number, T>(a.y, a.y_dot, part);
    for_each_vec(part.count, [&](index_t j, int lanes) { y.store(j, F::forward(x(j, lanes)), lanes); });
  });
}

// Computes dx = F::derivative(x) dy.
template <typename F>
inline void for_each_element(const ElementwiseBackward& a) {
  const bool contiguous = are_contiguous(a.x, a.dy, a.dx);
  for_each_part(a.x, Rows{}, contiguous, a.place.threads, [&](auto element, auto, const Part& part) {
    using T = decltype(element);
    const T *x = row_of<const T>(a.x, part.i, part.j), *dy = row_of<const T>(a.dy, part.i, part.j);
    T* dx = row_of<T>(a.dx, part.i, part.j);
    for_each_vec(part.count, [&](index_t j, int lanes) {
      store_lanes(dx + j, F::derivative(load_lanes(x + j, lanes)) * load_lanes(dy + j, lanes), lanes);
    });
  });
}

// The same of duals: dx_dot and dx are the value and the tangent of F::derivative(x) dy for the duals
// (x, x_dot) and (dy_dot, dy).
template <typename F>
inline void for_each_element(const ElementwisePairBackward& a) {
  const bool contiguous = are_contiguous(a.x, a.x_dot, a.dy, a.dy_dot, a.dx, a.dx_dot);
  for_each_part(a.x, a.x_dot, contiguous, a.place.threads, [&](auto element, auto number, const Part& part) {
    using T = decltype(element);
    using Number = decltype(number);
    const auto x = part_of<Number, const T>(a.x, a.x_dot, part);
    const auto dy = cotangent_part<Number, const T>(a.dy, a.dy_dot, part);
    const auto dx = cotangent_part<Number, T>(a.dx, a.dx_dot, part);
    for_each_vec(part.count, [&](index_t j, int lanes) {
      dx.store(j, F::derivative(x(j, lanes)) * dy(j, lanes), lanes);
    });
  });
}

}  // namespace
}  // namespace imf::IMF_ISA

// Loops over elements for the elementwise kernels (ops/elementwise.h).
#pragma once

#include "cpu/dtypes.h"
#include "cpu/duals.h"
#include "ops/elementwise.h"

namespace imf::IMF_ISA {
namespace {

// Calls body(element, number, first, share) on each thread: `element` is of the element type, and `share` the
// thread's part of the elements from `first` on, whose `number` is a Vec or, for the last `tangents`, a
// Dual<Vec>.
template <typename Body>
inline void on_each_share(DType type, index_t elements, index_t tangents, int threads, Body body) {
  const int team = team_size(threads, elements, elements);
  with_type(type, [&](auto element) {
    on_each_thread(team, [&](int thread) {
      body(element, Vec(), index_t{0}, share_of(elements - tangents, thread, team));
      body(element, Dual<Vec>(), elements - tangents, share_of(tangents, thread, team));
    });
  });
}

// Computes y = F::forward(x), of a Vec or, for elements with a tangent, a Dual<Vec>.
template <typename F>
inline void for_each_element(const ElementwiseForward& a) {
  on_each_share(
      a.x.dtype, a.x.count, a.x_dot.count, a.place.threads,
      [&](auto element, auto number, index_t first, Range share) {
        using T = decltype(element);
        using Number = decltype(number);
        const DualRow<Number, const T> x{static_cast<const T*>(a.x.data) + first,
                                         static_cast<const T*>(a.x_dot.data)};
        const DualRow<Number, T> y{static_cast<T*>(a.y.data) + first, static_cast<T*>(a.y_dot.data)};
        for_each_vec(share, [&](index_t j, int lanes) { y.store(j, F::forward(x(j, lanes)), lanes); });
      });
}

// Computes dx = F::derivative(x) dy.
template <typename F>
inline void for_each_element(const ElementwiseBackward& a) {
  const int team = team_size(a.place.threads, a.x.count, a.x.count);
  with_type(a.x.dtype, [&](auto type) {
    using T = decltype(type);
    const T* x = static_cast<const T*>(a.x.data);
    const T* dy = static_cast<const T*>(a.dy.data);
    T* dx = static_cast<T*>(a.dx.data);
    on_each_thread(team, [&](int thread) {
      for_each_vec(share_of(a.x.count, thread, team), [&](index_t j, int lanes) {
        store_lanes(dx + j, F::derivative(load_lanes(x + j, lanes)) * load_lanes(dy + j, lanes), lanes);
      });
    });
  });
}

// The same of duals: dx_dot and dx are the value and the tangent of F::derivative(x) dy for the duals
// (x, x_dot) and (dy_dot, dy).
template <typename F>
inline void for_each_element(const ElementwisePairBackward& a) {
  on_each_share(a.x.dtype, a.x.count, a.x_dot.count, a.place.threads,
                [&](auto element, auto number, index_t first, Range share) {
                  using T = decltype(element);
                  using Number = decltype(number);
                  const DualRow<Number, const T> x{static_cast<const T*>(a.x.data) + first,
                                                   static_cast<const T*>(a.x_dot.data)};
                  const auto dy = cotangents<Number>(static_cast<const T*>(a.dy.data) + first,
                                                     static_cast<const T*>(a.dy_dot.data));
                  const auto dx =
                      cotangents<Number>(static_cast<T*>(a.dx.data) + first, static_cast<T*>(a.dx_dot.data));
                  for_each_vec(share, [&](index_t j, int lanes) {
                    dx.store(j, F::derivative(x(j, lanes)) * dy(j, lanes), lanes);
                  });
                });
}

}  // namespace
}  // namespace imf::IMF_ISA

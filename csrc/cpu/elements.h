// Loops over elements for the elementwise kernels (ops/elementwise.h).
#pragma once

#include "cpu/dtypes.h"
#include "cpu/parallel.h"
#include "cpu/vec.h"
#include "ops/elementwise.h"

namespace imf::IMF_ISA {
namespace {

// Computes y = F::forward(x), of a Vec or, for elements with a tangent, a Dual<Vec>.
template <typename F>
inline void for_each_element(const ElementwiseForward& a) {
  const index_t elements = a.x.count, tangents = a.x_dot.count, first_tangent = elements - tangents;
  const int team = team_size(a.place.threads, elements, elements);

  with_type(a.x.dtype, [&](auto type) {
    using T = decltype(type);
    const T* x = static_cast<const T*>(a.x.data);
    const T* x_dot = static_cast<const T*>(a.x_dot.data);
    T* y = static_cast<T*>(a.y.data);
    T* y_dot = static_cast<T*>(a.y_dot.data);
    on_each_thread(team, [&](int thread) {
      const Range plain = share_of(first_tangent, thread, team);
      for_each_vec(plain.end - plain.begin, [&](index_t j, int lanes) {
        j += plain.begin;
        store_lanes(y + j, F::forward(load_lanes(x + j, lanes)), lanes);
      });
      const Range dual = share_of(tangents, thread, team);
      for_each_vec(dual.end - dual.begin, [&](index_t j, int lanes) {
        j += dual.begin;
        const index_t i = first_tangent + j;
        store_dual(y + i, y_dot + j, F::forward(load_dual(x + i, x_dot + j, lanes)), lanes);
      });
    });
  });
}

// Computes dx = F::derivative(x) dy.
template <typename F>
inline void for_each_element(const ElementwiseBackward& a) {
  const index_t elements = a.x.count;
  const int team = team_size(a.place.threads, elements, elements);

  with_type(a.x.dtype, [&](auto type) {
    using T = decltype(type);
    const T* x = static_cast<const T*>(a.x.data);
    const T* dy = static_cast<const T*>(a.dy.data);
    T* dx = static_cast<T*>(a.dx.data);
    on_each_thread(team, [&](int thread) {
      const Range share = share_of(elements, thread, team);
      for_each_vec(share.end - share.begin, [&](index_t j, int lanes) {
        j += share.begin;
        store_lanes(dx + j, F::derivative(load_lanes(x + j, lanes)) * load_lanes(dy + j, lanes), lanes);
      });
    });
  });
}

}  // namespace
}  // namespace imf::IMF_ISA

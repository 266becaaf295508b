// What the kernels share that work element by element (elementwise.h): the way over the elements.
#pragma once

#include "cpu/dtypes.h"
#include "cpu/elementwise.h"
#include "cpu/parallel.h"
#include "cpu/vec.h"

namespace imf {
namespace IMF_ISA {
namespace {

// y = f(x), f of a Vec or, where the elements have a tangent, of a Dual<Vec>.
template <typename F>
inline void for_each_element(const ElementwiseForward& a, F f) {
  const index_t first_tangent = a.elements - a.tangent_elements;
  const int team = team_size(a.threads, a.elements, a.elements);

  with_type(a.type, [&](auto type) {
    using T = decltype(type);
    const T* x = static_cast<const T*>(a.x);
    const T* x_dot = static_cast<const T*>(a.x_dot);
    T* y = static_cast<T*>(a.y);
    T* y_dot = static_cast<T*>(a.y_dot);
    on_each_thread(team, [&](int thread) {
      const Range plain = share_of(first_tangent, thread, team);
      for_each_vec(plain.end - plain.begin, [&](index_t j, int lanes) {
        j += plain.begin;
        store_lanes(y + j, f(load_lanes(x + j, lanes)), lanes);
      });
      const Range dual = share_of(a.tangent_elements, thread, team);
      for_each_vec(dual.end - dual.begin, [&](index_t j, int lanes) {
        j += dual.begin;
        const index_t i = first_tangent + j;
        store_dual(y + i, y_dot + j, f(load_dual(x + i, x_dot + j, lanes)), lanes);
      });
    });
  });
}

// dx = f'(x) dy, given f'.
template <typename Derivative>
inline void for_each_element(const ElementwiseBackward& a, Derivative derivative) {
  const int team = team_size(a.threads, a.elements, a.elements);

  with_type(a.type, [&](auto type) {
    using T = decltype(type);
    const T* x = static_cast<const T*>(a.x);
    const T* dy = static_cast<const T*>(a.dy);
    T* dx = static_cast<T*>(a.dx);
    on_each_thread(team, [&](int thread) {
      const Range share = share_of(a.elements, thread, team);
      for_each_vec(share.end - share.begin, [&](index_t j, int lanes) {
        j += share.begin;
        store_lanes(dx + j, derivative(load_lanes(x + j, lanes)) * load_lanes(dy + j, lanes), lanes);
      });
    });
  });
}

}  // namespace
}  // namespace IMF_ISA
}  // namespace imf

// SiLU with its tangent, and its primal backward. The formulas are in imf_kernels/ops/silu.py.
#include "cpu/silu.h"

#include "cpu/dtypes.h"
#include "cpu/parallel.h"
#include "cpu/vec.h"

namespace imf {
namespace IMF_ISA {
namespace {

template <typename T>
void forward(const SiluForward& a) {
  const T* x = static_cast<const T*>(a.x);
  const T* x_dot = static_cast<const T*>(a.x_dot);
  T* y = static_cast<T*>(a.y);
  T* y_dot = static_cast<T*>(a.y_dot);
  const index_t first_tangent = a.elements - a.tangent_elements;
  const int team = team_size(a.threads, a.elements, a.elements);

  on_each_thread(team, [&](int thread) {
    const Range plain = share_of(first_tangent, thread, team);
    for_each_vec(plain.end - plain.begin, [&](index_t j, int lanes) {
      j += plain.begin;
      store_lanes(y + j, silu(load_lanes(x + j, lanes)), lanes);
    });
    const Range dual = share_of(a.tangent_elements, thread, team);
    for_each_vec(dual.end - dual.begin, [&](index_t j, int lanes) {
      j += dual.begin;
      const index_t i = first_tangent + j;
      store_dual(y + i, y_dot + j, silu(load_dual(x + i, x_dot + j, lanes)), lanes);
    });
  });
}

template <typename T>
void backward(const SiluBackward& a) {
  const T* x = static_cast<const T*>(a.x);
  const T* dy = static_cast<const T*>(a.dy);
  T* dx = static_cast<T*>(a.dx);
  const int team = team_size(a.threads, a.elements, a.elements);

  on_each_thread(team, [&](int thread) {
    const Range share = share_of(a.elements, thread, team);
    for_each_vec(share.end - share.begin, [&](index_t j, int lanes) {
      j += share.begin;
      const Vec xj = load_lanes(x + j, lanes);
      store_lanes(dx + j, load_lanes(dy + j, lanes) * silu_derivative(xj, sigmoid(xj)), lanes);
    });
  });
}

}  // namespace

void silu_forward(const SiluForward& a) {
  with_type(a.type, [&](auto t) { forward<decltype(t)>(a); });
}

void silu_backward(const SiluBackward& a) {
  with_type(a.type, [&](auto t) { backward<decltype(t)>(a); });
}

}  // namespace IMF_ISA
}  // namespace imf

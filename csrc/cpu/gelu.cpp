// GELU with its tangent, and its primal backward. The formulas are in imf_kernels/ops/gelu.py.
#include "cpu/gelu.h"

#include "cpu/dtypes.h"
#include "cpu/parallel.h"
#include "cpu/vec.h"

namespace imf {
namespace IMF_ISA {
namespace {

// What multiplies x, and its derivative.
struct Gate {
  Vec value, slope;
};

struct Normal {
  Gate operator()(Vec x) const {
    Gate s;
    normal(x, s.value, s.slope);
    return s;
  }
};

// (1 + tanh(v / 2)) / 2 = 1 / (1 + e^-v). Of e^-|v|, which cannot overflow, both s(|v|) = 1 / (1 + e^-|v|)
// and s(-|v|) = e^-|v| s(|v|) are made without cancellation; their product is s' on either side.
struct ByTanh {
  Gate operator()(Vec x) const {
    const Vec twice(1.59576912160573071f), cubic(0.044715f);  // 2 sqrt(2 / pi)
    const Vec square = x * x;
    const Vec v = twice * x * fma(cubic, square, Vec(1.0f));
    const Vec e = exp(Vec(0.0f) - abs(v));
    const Vec above = Vec(1.0f) / (Vec(1.0f) + e), below = e * above;
    const Vec v_slope = twice * fma(Vec(3.0f) * cubic, square, Vec(1.0f));
    return {select_less(v, Vec(0.0f), below, above), above * below * v_slope};
  }
};

template <typename T, typename Gating>
void forward(const GeluForward& a, Gating gate) {
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
      const Vec xj = load_lanes(x + j, lanes);
      store_lanes(y + j, xj * gate(xj).value, lanes);
    });
    const Range dual = share_of(a.tangent_elements, thread, team);
    for_each_vec(dual.end - dual.begin, [&](index_t j, int lanes) {
      j += dual.begin;
      const index_t i = first_tangent + j;
      const Dual<Vec> xi = load_dual(x + i, x_dot + j, lanes);
      const Gate s = gate(xi.primal);
      store_dual(y + i, y_dot + j, {xi.primal * s.value, fma(xi.primal, s.slope, s.value) * xi.tangent},
                 lanes);
    });
  });
}

template <typename T, typename Gating>
void backward(const GeluBackward& a, Gating gate) {
  const T* x = static_cast<const T*>(a.x);
  const T* dy = static_cast<const T*>(a.dy);
  T* dx = static_cast<T*>(a.dx);
  const int team = team_size(a.threads, a.elements, a.elements);

  on_each_thread(team, [&](int thread) {
    const Range share = share_of(a.elements, thread, team);
    for_each_vec(share.end - share.begin, [&](index_t j, int lanes) {
      j += share.begin;
      const Vec xj = load_lanes(x + j, lanes);
      const Gate s = gate(xj);
      store_lanes(dx + j, fma(xj, s.slope, s.value) * load_lanes(dy + j, lanes), lanes);
    });
  });
}

template <typename Body>
inline void with_gate(bool by_tanh, Body body) {
  if (by_tanh) {
    body(ByTanh());
  } else {
    body(Normal());
  }
}

}  // namespace

void gelu_forward(const GeluForward& a) {
  with_gate(a.by_tanh, [&](auto gate) { with_type(a.type, [&](auto t) { forward<decltype(t)>(a, gate); }); });
}

void gelu_backward(const GeluBackward& a) {
  with_gate(a.by_tanh,
            [&](auto gate) { with_type(a.type, [&](auto t) { backward<decltype(t)>(a, gate); }); });
}

}  // namespace IMF_ISA
}  // namespace imf

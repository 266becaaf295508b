// SwiGLU with its tangent, and its primal backward. The formulas are in imf_kernels/ops/swiglu.py.
#include "cpu/swiglu.h"

#include "cpu/dtypes.h"
#include "cpu/parallel.h"
#include "cpu/vec.h"

namespace imf {
namespace IMF_ISA {
namespace {

template <typename T>
void forward(const SwigluForward& a) {
  const T* x = static_cast<const T*>(a.x);
  const T* x_dot = static_cast<const T*>(a.x_dot);
  T* y = static_cast<T*>(a.y);
  T* y_dot = static_cast<T*>(a.y_dot);
  const index_t first_tangent = a.rows - a.tangent_rows;
  const int team = team_size(a.threads, (a.rows + a.tangent_rows) * a.width, a.rows);

  on_each_thread(team, [&](int thread) {
    const Range share = share_of_rows(a.rows, a.tangent_rows, thread, team);
    for (index_t row = share.begin; row < share.end; ++row) {
      const T* gate = x + row * a.x_stride;
      const T* up = gate + a.width;
      T* yi = y + row * a.width;
      if (row < first_tangent) {
        for_each_vec(a.width, [&](index_t j, int lanes) {
          prefetch(gate + j + a.x_stride);
          prefetch(up + j + a.x_stride);
          store_lanes(yi + j, silu(load_lanes(gate + j, lanes)) * load_lanes(up + j, lanes), lanes);
        });
        continue;
      }
      const T* gate_dot = x_dot + (row - first_tangent) * a.x_dot_stride;
      const T* up_dot = gate_dot + a.width;
      T* y_dot_i = y_dot + (row - first_tangent) * a.width;
      for_each_vec(a.width, [&](index_t j, int lanes) {
        prefetch(gate + j + a.x_stride);
        prefetch(up + j + a.x_stride);
        prefetch(gate_dot + j + a.x_dot_stride);
        prefetch(up_dot + j + a.x_dot_stride);
        const Dual<Vec> g = load_dual(gate + j, gate_dot + j, lanes);
        const Dual<Vec> u = load_dual(up + j, up_dot + j, lanes);
        store_dual(yi + j, y_dot_i + j, silu(g) * u, lanes);
      });
    }
  });
}

template <typename T>
void backward(const SwigluBackward& a) {
  const T* x = static_cast<const T*>(a.x);
  const T* dy = static_cast<const T*>(a.dy);
  T* dx = static_cast<T*>(a.dx);
  const int team = team_size(a.threads, 2 * a.rows * a.width, a.rows);

  on_each_thread(team, [&](int thread) {
    const Range share = share_of(a.rows, thread, team);
    for (index_t row = share.begin; row < share.end; ++row) {
      const T* gate = x + row * a.x_stride;
      const T* dyi = dy + row * a.dy_stride;
      T* dgate = dx + row * 2 * a.width;
      for_each_vec(a.width, [&](index_t j, int lanes) {
        prefetch(gate + j + a.x_stride);
        prefetch(gate + a.width + j + a.x_stride);
        const Vec g = load_lanes(gate + j, lanes);
        const Vec d = load_lanes(dyi + j, lanes);
        const Vec s = sigmoid(g);
        const Vec u = load_lanes(gate + a.width + j, lanes);
        store_lanes(dgate + j, d * u * silu_derivative(g, s), lanes);
        store_lanes(dgate + a.width + j, d * (g * s), lanes);
      });
    }
  });
}

}  // namespace

void swiglu_forward(const SwigluForward& a) {
  with_type(a.type, [&](auto t) { forward<decltype(t)>(a); });
}

void swiglu_backward(const SwigluBackward& a) {
  with_type(a.type, [&](auto t) { backward<decltype(t)>(a); });
}

}  // namespace IMF_ISA
}  // namespace imf

// SwiGLU with its tangent, and its primal backward. Formulas: imf_kernels/ops/swiglu.py.
#include "ops/swiglu.h"

#include "cpu/dtypes.h"
#include "cpu/parallel.h"
#include "cpu/vec.h"

namespace imf::IMF_ISA {
namespace {

template <typename T>
void forward(const SwigluForward& a) {
  const T* x = static_cast<const T*>(a.x.data);
  const T* x_dot = static_cast<const T*>(a.x_dot.data);
  T* y = static_cast<T*>(a.y.data);
  T* y_dot = static_cast<T*>(a.y_dot.data);
  const index_t rows = a.y.rows, tangent_rows = a.y_dot.rows, width = a.y.width;
  const index_t first_tangent = rows - tangent_rows;
  const int team = team_size(a.place.threads, (rows + tangent_rows) * width, rows);

  on_each_thread(team, [&](int thread) {
    const Range share = share_of_rows(rows, tangent_rows, thread, team);
    for (index_t row = share.begin; row < share.end; ++row) {
      const T* gate = x + row * a.x.stride;
      const T* up = gate + width;
      T* yi = y + row * a.y.stride;
      if (row < first_tangent) {
        for_each_vec(width, [&](index_t j, int lanes) {
          prefetch(gate + j + a.x.stride);
          prefetch(up + j + a.x.stride);
          store_lanes(yi + j, silu(load_lanes(gate + j, lanes)) * load_lanes(up + j, lanes), lanes);
        });
        continue;
      }
      const T* gate_dot = x_dot + (row - first_tangent) * a.x_dot.stride;
      const T* up_dot = gate_dot + width;
      T* y_dot_i = y_dot + (row - first_tangent) * a.y_dot.stride;
      for_each_vec(width, [&](index_t j, int lanes) {
        prefetch(gate + j + a.x.stride);
        prefetch(up + j + a.x.stride);
        prefetch(gate_dot + j + a.x_dot.stride);
        prefetch(up_dot + j + a.x_dot.stride);
        const Dual<Vec> g = load_dual(gate + j, gate_dot + j, lanes);
        const Dual<Vec> u = load_dual(up + j, up_dot + j, lanes);
        store_dual(yi + j, y_dot_i + j, silu(g) * u, lanes);
      });
    }
  });
}

template <typename T>
void backward(const SwigluBackward& a) {
  const T* x = static_cast<const T*>(a.x.data);
  const T* dy = static_cast<const T*>(a.dy.data);
  T* dx = static_cast<T*>(a.dx.data);
  const index_t rows = a.dy.rows, width = a.dy.width;
  const int team = team_size(a.place.threads, 2 * rows * width, rows);

  on_each_thread(team, [&](int thread) {
    const Range share = share_of(rows, thread, team);
    for (index_t row = share.begin; row < share.end; ++row) {
      const T* gate = x + row * a.x.stride;
      const T* dyi = dy + row * a.dy.stride;
      T* dgate = dx + row * a.dx.stride;
      for_each_vec(width, [&](index_t j, int lanes) {
        prefetch(gate + j + a.x.stride);
        prefetch(gate + width + j + a.x.stride);
        const Vec g = load_lanes(gate + j, lanes);
        const Vec d = load_lanes(dyi + j, lanes);
        const Vec s = sigmoid(g);
        const Vec u = load_lanes(gate + width + j, lanes);
        store_lanes(dgate + j, d * u * silu_derivative(g, s), lanes);
        store_lanes(dgate + width + j, d * (g * s), lanes);
      });
    }
  });
}

}  // namespace

void swiglu_forward(const SwigluForward& a) {
  with_type(a.x.dtype, [&](auto t) { forward<decltype(t)>(a); });
}

void swiglu_backward(const SwigluBackward& a) {
  with_type(a.x.dtype, [&](auto t) { backward<decltype(t)>(a); });
}

}  // namespace imf::IMF_ISA

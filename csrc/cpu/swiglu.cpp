// SwiGLU with its tangent, and its primal backward. Formulas: imf_kernels/ops/swiglu.py.
#include "ops/swiglu.h"

#include "cpu/dtypes.h"
#include "cpu/duals.h"

namespace imf::IMF_ISA {
namespace {

template <typename T>
void forward(const SwigluForward& a) {
  const index_t width = a.y.width;
  for_each_row(a.y, a.y_dot, a.place.threads, [&](auto number, index_t row, index_t t) {
    const auto gate = dual_row<decltype(number), const T>(a.x, row, a.x_dot, t);
    const auto up = dual_row<decltype(number), const T>(a.x, row, a.x_dot, t, width);
    const auto y = dual_row<decltype(number), T>(a.y, row, a.y_dot, t);
    for_each_vec(width, [&](index_t j, int lanes) {
      gate.prefetch(j + a.x.stride, j + a.x_dot.stride);
      up.prefetch(j + a.x.stride, j + a.x_dot.stride);
      y.store(j, silu(gate(j, lanes)) * up(j, lanes), lanes);
    });
  });
}

template <typename T>
void backward(const SwigluBackward& a) {
  const index_t rows = a.dy.rows, width = a.dy.width;
  const int team = team_size(a.place.threads, 2 * rows * width, rows);
  on_each_thread(team, [&](int thread) {
    const Range share = share_of(rows, thread, team);
    for (index_t row = share.begin; row < share.end; ++row) {
      const T* gate = row_of<const T>(a.x, row);
      const T* up = gate + width;
      const T* dy = row_of<const T>(a.dy, row);
      T* dgate = row_of<T>(a.dx, row);
      for_each_vec(width, [&](index_t j, int lanes) {
        prefetch(gate + j + a.x.stride);
        prefetch(up + j + a.x.stride);
        const Vec g = load_lanes(gate + j, lanes);
        const Vec d = load_lanes(dy + j, lanes);
        const Vec s = sigmoid(g);
        store_lanes(dgate + j, d * load_lanes(up + j, lanes) * silu_derivative(g, s), lanes);
        store_lanes(dgate + width + j, d * (g * s), lanes);
      });
    }
  });
}

template <typename T>
void backward(const SwigluPairBackward& a) {
  const index_t width = a.dy.width;
  for_each_row(a.dy, a.dy_dot, a.place.threads, [&](auto number, index_t row, index_t t) {
    using Number = decltype(number);
    const auto gate = dual_row<Number, const T>(a.x, row, a.x_dot, t);
    const auto up = dual_row<Number, const T>(a.x, row, a.x_dot, t, width);
    const auto dy = cotangent_row<Number, const T>(a.dy, row, a.dy_dot, t);
    const auto dgate = cotangent_row<Number, T>(a.dx, row, a.dx_dot, t);
    const auto dup = cotangent_row<Number, T>(a.dx, row, a.dx_dot, t, width);
    for_each_vec(width, [&](index_t j, int lanes) {
      const Number g = gate(j, lanes), d = dy(j, lanes), s = sigmoid(g);
      dgate.store(j, d * up(j, lanes) * silu_derivative(g, s), lanes);
      dup.store(j, d * (g * s), lanes);
    });
  });
}

}  // namespace

void swiglu_forward(const SwigluForward& a) {
  with_type(a.x.dtype, [&](auto t) { forward<decltype(t)>(a); });
}

void swiglu_backward(const SwigluBackward& a) {
  with_type(a.x.dtype, [&](auto t) { backward<decltype(t)>(a); });
}

void swiglu_pair_backward(const SwigluPairBackward& a) {
  with_type(a.x.dtype, [&](auto t) { backward<decltype(t)>(a); });
}

}  // namespace imf::IMF_ISA

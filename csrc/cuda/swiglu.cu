// SwiGLU with its tangent, and its primal backward. Formulas: imf_kernels/ops/swiglu.py.
#include "cuda/elements.h"
#include "ops/swiglu.h"

namespace imf::cuda {
namespace {

template <typename T>
__global__ void __launch_bounds__(tile_threads) forward(const SwigluForward a, const bool aligned) {
  constexpr int n = lanes<T>;
  const TileElements at(a.y, a.y_dot, n);
  const T* x = row_of<const T>(a.x, at.row, at.j);
  const T* x_dot = row_of<const T>(a.x_dot, at.tangent, at.j);
  float gate[n], up[n], gate_dot[n], up_dot[n];
  load<n>(gate, x, at.left, aligned);
  load<n>(up, x + a.y.width, at.left, aligned);
  load<n>(gate_dot, x_dot, at.tangent_left, aligned);
  load<n>(up_dot, x_dot + a.y.width, at.tangent_left, aligned);
#pragma unroll
  for (int k = 0; k < n; ++k) {
    const Dual<float> y = silu(Dual<float>{gate[k], gate_dot[k]}) * Dual<float>{up[k], up_dot[k]};
    up[k] = y.primal;
    up_dot[k] = y.tangent;
  }
  store<n>(row_of<T>(a.y, at.row, at.j), up, at.left, aligned);
  store<n>(row_of<T>(a.y_dot, at.tangent, at.j), up_dot, at.tangent_left, aligned);
}

template <typename T>
__global__ void __launch_bounds__(tile_threads) backward(const SwigluBackward a, const bool aligned) {
  constexpr int n = lanes<T>;
  const TileElements at(a.dy, {}, n);
  const T* x = row_of<const T>(a.x, at.row, at.j);
  float gate[n], up[n], dy[n];
  load<n>(dy, row_of<const T>(a.dy, at.row, at.j), at.left, aligned);
  load<n>(gate, x, at.left, aligned);
  load<n>(up, x + a.dy.width, at.left, aligned);
#pragma unroll
  for (int k = 0; k < n; ++k) {
    const float g = gate[k], s = sigmoid(g);
    gate[k] = dy[k] * up[k] * silu_derivative(g, s);
    up[k] = dy[k] * (g * s);
  }
  T* dx = row_of<T>(a.dx, at.row, at.j);
  store<n>(dx, gate, at.left, aligned);
  store<n>(dx + a.dy.width, up, at.left, aligned);
}

// Returns whether both halves of rows allow vector access.
bool halves_aligned(int n, const Rows& x) {
  return aligned(n, x) && aligned(n, size_of(x.dtype), x.data, {x.width / 2});
}

}  // namespace

void swiglu_forward(const SwigluForward& a) {
  with_type(a.x.dtype, [&](auto t) {
    constexpr int n = lanes<decltype(t)>;
    const Tiles tiles(a.y, n);
    launch("swiglu_forward", forward<decltype(t)>, tiles.blocks, tiles.columns, tiles.threads, a.place, a,
           halves_aligned(n, a.x) && halves_aligned(n, a.x_dot) && all_aligned(n, a.y, a.y_dot));
  });
}

void swiglu_backward(const SwigluBackward& a) {
  with_type(a.x.dtype, [&](auto t) {
    constexpr int n = lanes<decltype(t)>;
    const Tiles tiles(a.dy, n);
    launch("swiglu_backward", backward<decltype(t)>, tiles.blocks, tiles.columns, tiles.threads, a.place, a,
           halves_aligned(n, a.x) && halves_aligned(n, a.dx) && aligned(n, a.dy));
  });
}

}  // namespace imf::cuda

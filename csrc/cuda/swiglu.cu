// SwiGLU with its tangent, and its primal backward. The formulas are in imf_kernels/ops/swiglu.py.
#include "cuda/elements.h"
#include "cuda/swiglu.h"

namespace imf::cuda {
namespace {

template <typename T>
__global__ void __launch_bounds__(tile_threads) forward(const SwigluForward a, const bool aligned) {
  constexpr int n = lanes<T>;
  const TileElements at(a.rows, a.tangent_rows, a.width, n);
  const T* x = static_cast<const T*>(a.x) + at.row * a.x_stride + at.j;
  const T* x_dot = static_cast<const T*>(a.x_dot) + at.tangent * a.x_dot_stride + at.j;
  float gate[n], up[n], gate_dot[n], up_dot[n];
  load<n>(gate, x, at.left, aligned);
  load<n>(up, x + a.width, at.left, aligned);
  load<n>(gate_dot, x_dot, at.tangent_left, aligned);
  load<n>(up_dot, x_dot + a.width, at.tangent_left, aligned);
#pragma unroll
  for (int k = 0; k < n; ++k) {
    const Dual<float> y = silu(Dual<float>{gate[k], gate_dot[k]}) * Dual<float>{up[k], up_dot[k]};
    up[k] = y.primal;
    up_dot[k] = y.tangent;
  }
  store<n>(static_cast<T*>(a.y) + at.row * a.width + at.j, up, at.left, aligned);
  store<n>(static_cast<T*>(a.y_dot) + at.tangent * a.width + at.j, up_dot, at.tangent_left, aligned);
}

template <typename T>
__global__ void __launch_bounds__(tile_threads) backward(const SwigluBackward a, const bool aligned) {
  constexpr int n = lanes<T>;
  const TileElements at(a.rows, 0, a.width, n);
  const T* x = static_cast<const T*>(a.x) + at.row * a.x_stride + at.j;
  float gate[n], up[n], dy[n];
  load<n>(gate, x, at.left, aligned);
  load<n>(up, x + a.width, at.left, aligned);
  load<n>(dy, static_cast<const T*>(a.dy) + at.row * a.dy_stride + at.j, at.left, aligned);
#pragma unroll
  for (int k = 0; k < n; ++k) {
    const float g = gate[k], s = sigmoid(g);
    gate[k] = dy[k] * up[k] * silu_derivative(g, s);
    up[k] = dy[k] * (g * s);
  }
  T* dx = static_cast<T*>(a.dx) + at.row * (2 * a.width) + at.j;
  store<n>(dx, gate, at.left, aligned);
  store<n>(dx + a.width, up, at.left, aligned);
}

}  // namespace

void swiglu_forward(const SwigluForward& a) {
  with_type(a.type, [&](auto type) {
    using T = decltype(type);
    const bool fits = aligned(lanes<T>, Operand::of<T>(a.x, a.x_stride), Operand::of<T>(a.x, a.width),
                              Operand::of<T>(a.x_dot, a.x_dot_stride), Operand::of<T>(a.y, a.width),
                              Operand::of<T>(a.y_dot, a.width));
    const Tiles tiles(a.rows, a.width, lanes<T>);
    launch("swiglu_forward", forward<T>, tiles.blocks, tiles.columns, tiles.threads, a.place, a, fits);
  });
}

void swiglu_backward(const SwigluBackward& a) {
  with_type(a.type, [&](auto type) {
    using T = decltype(type);
    const bool fits = aligned(lanes<T>, Operand::of<T>(a.x, a.x_stride), Operand::of<T>(a.x, a.width),
                              Operand::of<T>(a.dy, a.dy_stride), Operand::of<T>(a.dx, a.width));
    const Tiles tiles(a.rows, a.width, lanes<T>);
    launch("swiglu_backward", backward<T>, tiles.blocks, tiles.columns, tiles.threads, a.place, a, fits);
  });
}

}  // namespace imf::cuda

// Elementwise kernels and tiles: each thread takes as many elements as it reads at once.
#pragma once

#include "cuda/vector.h"
#include "ops/elementwise.h"

namespace imf::cuda {

constexpr unsigned tile_threads = 256;

// Elements without a tangent come first, then those with one, which need not begin at a multiple of 16 bytes.
template <typename T, typename F>
__global__ void __launch_bounds__(tile_threads)
    elements_forward(const ElementwiseForward a, const bool plain_aligned, const bool dual_aligned) {
  constexpr int n = lanes<T>;
  const index_t pack = blockIdx.x * static_cast<index_t>(tile_threads) + threadIdx.x;
  const index_t plain = a.x.count - a.x_dot.count, plain_packs = (plain + n - 1) / n;
  const bool dual = pack >= plain_packs;
  const index_t j = dual ? (pack - plain_packs) * n : 0;  // among the tangents
  const index_t i = dual ? plain + j : pack * n;
  const index_t left = (dual ? a.x.count : plain) - i;
  const bool aligned = dual ? dual_aligned : plain_aligned;
  float x[n], x_dot[n], y[n], y_dot[n];
  load<n>(x, static_cast<const T*>(a.x.data) + i, left, aligned);
  load<n>(x_dot, static_cast<const T*>(a.x_dot.data) + j, dual ? left : 0, aligned);
#pragma unroll
  for (int k = 0; k < n; ++k) {
    const Dual<float> yk = F::forward(Dual<float>{x[k], x_dot[k]});
    y[k] = yk.primal;
    y_dot[k] = yk.tangent;
  }
  store<n>(static_cast<T*>(a.y.data) + i, y, left, aligned);
  store<n>(static_cast<T*>(a.y_dot.data) + j, y_dot, dual ? left : 0, aligned);
}

// dx = f'(x) dy.
template <typename T, typename F>
__global__ void __launch_bounds__(tile_threads)
    elements_backward(const ElementwiseBackward a, const bool aligned) {
  constexpr int n = lanes<T>;
  const index_t i = (blockIdx.x * static_cast<index_t>(tile_threads) + threadIdx.x) * n;
  const index_t left = a.x.count - i;
  float x[n], dy[n];
  load<n>(x, static_cast<const T*>(a.x.data) + i, left, aligned);
  load<n>(dy, static_cast<const T*>(a.dy.data) + i, left, aligned);
#pragma unroll
  for (int k = 0; k < n; ++k) dy[k] *= F::derivative(x[k]);
  store<n>(static_cast<T*>(a.dx.data) + i, dy, left, aligned);
}

// Returns whether both allow vector access from element `first` on.
template <typename T>
bool aligned_from(index_t first, const Elements& x, const Elements& y) {
  const auto begins = [&](const Elements& of) {
    return aligned(lanes<T>, sizeof(T), static_cast<const T*>(of.data) + first);
  };
  return begins(x) && begins(y);
}

template <typename F>
void for_each_element(const char* what, const ElementwiseForward& a) {
  with_type(a.x.dtype, [&](auto type) {
    using T = decltype(type);
    const index_t plain = a.x.count - a.x_dot.count;
    const index_t packs = divide_up(plain, lanes<T>) + divide_up(a.x_dot.count, lanes<T>);
    launch(what, elements_forward<T, F>, divide_up(packs, tile_threads), 1, dim3(tile_threads), a.place, a,
           aligned_from<T>(0, a.x, a.y),
           aligned_from<T>(plain, a.x, a.y) && aligned_from<T>(0, a.x_dot, a.y_dot));
  });
}

template <typename F>
void for_each_element(const char* what, const ElementwiseBackward& a) {
  with_type(a.x.dtype, [&](auto type) {
    using T = decltype(type);
    launch(what, elements_backward<T, F>, divide_up(a.x.count, lanes<T> * tile_threads), 1,
           dim3(tile_threads), a.place, a, aligned_from<T>(0, a.x, a.dy) && aligned_from<T>(0, a.dx, a.dx));
  });
}

// Tiles of rows: threadIdx.x runs along a row, threadIdx.y over rows.
struct Tiles {
  dim3 threads;
  index_t blocks;
  unsigned columns;  // tiles of a row

  Tiles(const Rows& y, int n) {
    const index_t packs = divide_up(y.width, n), along = divide_up(packs, tile_threads);
    columns = static_cast<unsigned>(along);
    const auto x = static_cast<unsigned>(along > 0 ? divide_up(packs, along) : 1);
    threads = dim3(x, tile_threads / x);
    blocks = divide_up(y.rows, threads.y);
  }
};

// A thread's elements: `left` from column j of a row on, none beyond the last row.
struct TileElements {
  index_t row, tangent;  // `tangent`: index among the rows with a tangent; negative for others
  index_t j, left, tangent_left;

  __device__ __forceinline__ TileElements(const Rows& y, const Rows& y_dot, int n)
      : row(blockIdx.x * static_cast<index_t>(blockDim.y) + threadIdx.y),
        tangent(row - (y.rows - y_dot.rows)),
        j((static_cast<index_t>(blockIdx.y) * blockDim.x + threadIdx.x) * n),
        left(row < y.rows ? y.width - j : 0),
        tangent_left(tangent >= 0 ? left : 0) {}
};

}  // namespace imf::cuda

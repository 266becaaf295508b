// What the kernels share that work element by element: each thread takes as many elements as it reads at
// once.
#pragma once

#include "cuda/elementwise.h"
#include "cuda/vector.h"

namespace imf::cuda {

constexpr unsigned tile_threads = 256;

// The elements without a tangent come first, then those with one: where the latter begin, no 16 bytes need
// to.
template <typename T, typename F>
__global__ void __launch_bounds__(tile_threads)
    elements_forward(const ElementwiseForward a, const bool plain_aligned, const bool dual_aligned) {
  constexpr int n = lanes<T>;
  const index_t pack = blockIdx.x * static_cast<index_t>(tile_threads) + threadIdx.x;
  const index_t plain = a.elements - a.tangent_elements, plain_packs = (plain + n - 1) / n;
  const bool dual = pack >= plain_packs;
  const index_t j = dual ? (pack - plain_packs) * n : 0;  // among the tangents
  const index_t i = dual ? plain + j : pack * n;
  const index_t left = (dual ? a.elements : plain) - i;
  const bool aligned = dual ? dual_aligned : plain_aligned;
  float x[n], x_dot[n], y[n], y_dot[n];
  load<n>(x, static_cast<const T*>(a.x) + i, left, aligned);
  load<n>(x_dot, static_cast<const T*>(a.x_dot) + j, dual ? left : 0, aligned);
#pragma unroll
  for (int k = 0; k < n; ++k) {
    const Dual<float> yk = F::forward(Dual<float>{x[k], x_dot[k]});
    y[k] = yk.primal;
    y_dot[k] = yk.tangent;
  }
  store<n>(static_cast<T*>(a.y) + i, y, left, aligned);
  store<n>(static_cast<T*>(a.y_dot) + j, y_dot, dual ? left : 0, aligned);
}

// dx = f'(x) dy.
template <typename T, typename F>
__global__ void __launch_bounds__(tile_threads)
    elements_backward(const ElementwiseBackward a, const bool aligned) {
  constexpr int n = lanes<T>;
  const index_t i = (blockIdx.x * static_cast<index_t>(tile_threads) + threadIdx.x) * n;
  const index_t left = a.elements - i;
  float x[n], dy[n];
  load<n>(x, static_cast<const T*>(a.x) + i, left, aligned);
  load<n>(dy, static_cast<const T*>(a.dy) + i, left, aligned);
#pragma unroll
  for (int k = 0; k < n; ++k) dy[k] *= F::derivative(x[k]);
  store<n>(static_cast<T*>(a.dx) + i, dy, left, aligned);
}

template <typename T>
bool begins_aligned(const void* p) {
  return Operand::of<T>(p, 0).aligned(lanes<T>);
}

template <typename F>
void for_each_element(const char* what, const ElementwiseForward& a) {
  with_type(a.type, [&](auto type) {
    using T = decltype(type);
    const index_t plain = a.elements - a.tangent_elements;
    const bool plain_fits = begins_aligned<T>(a.x) && begins_aligned<T>(a.y);
    const bool dual_fits = begins_aligned<T>(static_cast<const T*>(a.x) + plain) &&
                           begins_aligned<T>(static_cast<const T*>(a.y) + plain) &&
                           begins_aligned<T>(a.x_dot) && begins_aligned<T>(a.y_dot);
    const index_t packs = divide_up(plain, lanes<T>) + divide_up(a.tangent_elements, lanes<T>);
    launch(what, elements_forward<T, F>, divide_up(packs, tile_threads), 1, dim3(tile_threads), a.place, a,
           plain_fits, dual_fits);
  });
}

template <typename F>
void for_each_element(const char* what, const ElementwiseBackward& a) {
  with_type(a.type, [&](auto type) {
    using T = decltype(type);
    const bool fits = begins_aligned<T>(a.x) && begins_aligned<T>(a.dy) && begins_aligned<T>(a.dx);
    launch(what, elements_backward<T, F>, divide_up(a.elements, lanes<T> * tile_threads), 1,
           dim3(tile_threads), a.place, a, fits);
  });
}

// Rows of `width` elements cut into tiles: of a block's threads x walks along a row, y over rows.
struct Tiles {
  dim3 threads;
  index_t blocks;
  unsigned columns;  // tiles of a row

  Tiles(index_t rows, index_t width, int n) {
    const index_t packs = divide_up(width, n), along = divide_up(packs, tile_threads);
    columns = static_cast<unsigned>(along);
    const auto x = static_cast<unsigned>(along > 0 ? divide_up(packs, along) : 1);
    threads = dim3(x, tile_threads / x);
    blocks = divide_up(rows, threads.y);
  }
};

// The elements of a thread: `left` from column j of a row on, none beyond the last row.
struct TileElements {
  index_t row, tangent;  // `tangent`: which of the rows with a tangent; negative: none of them
  index_t j, left, tangent_left;

  __device__ __forceinline__ TileElements(index_t rows, index_t tangent_rows, index_t width, int n)
      : row(blockIdx.x * static_cast<index_t>(blockDim.y) + threadIdx.y),
        tangent(row - (rows - tangent_rows)),
        j((static_cast<index_t>(blockIdx.y) * blockDim.x + threadIdx.x) * n),
        left(row < rows ? width - j : 0),
        tangent_left(tangent >= 0 ? left : 0) {}
};

}  // namespace imf::cuda

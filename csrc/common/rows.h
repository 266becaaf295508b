// Addresses of rows, for the kernels of CPUs and GPUs.
#pragma once

#include "common/dual.h"
#include "tensor.h"

namespace imf {

IMF_HOST_DEVICE index_t stride_of(const Rows& x) { return x.stride; }
IMF_HOST_DEVICE index_t stride_of(const Floats& x) { return x.width; }

// Returns the address of column j of row i; null without a view.
template <typename T = const float, typename View>
IMF_HOST_DEVICE T* row_of(const View& x, index_t i, index_t j = 0) {
  return x.data ? static_cast<T*>(x.data) + i * stride_of(x) + j : nullptr;
}

// Returns the number of rows per group.
IMF_HOST_DEVICE index_t length_of(index_t rows, index_t groups) { return groups > 1 ? rows / groups : rows; }

// a / b, in 32 bits where both fit: 64-bit division takes a GPU a hundred instructions.
IMF_HOST_DEVICE index_t quotient(index_t a, index_t b) {
  if (((a | b) >> 32) == 0) return static_cast<std::uint32_t>(a) / static_cast<std::uint32_t>(b);
  return a / b;
}

}  // namespace imf

// TMA copies of boxes of a tensor from global into shared memory.
#pragma once

#include <cuda.h>

#include <cstdint>

namespace imf::cuda::ptx {

using TensorMap = CUtensorMap;  // made by tensor_map in launch.h

__device__ __forceinline__ void prefetch(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// Copies the box at column, row, head, sample to `target`, zeros outside of the tensor, and adds all its
// bytes to `barrier`.
__device__ __forceinline__ void copy_box(std::uint32_t target, const TensorMap& map, std::uint32_t barrier,
                                         int column, int row, int head, int sample) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(target),
      "l"(&map), "r"(barrier), "r"(column), "r"(row), "r"(head), "r"(sample)
      : "memory");
}

}  // namespace imf::cuda::ptx

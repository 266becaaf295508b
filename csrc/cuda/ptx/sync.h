// Of a block: shared memory, named barriers, and registers that a warpgroup gives to another.
#pragma once

#include <cstdint>

namespace imf::cuda::ptx {

// The address of the block's dynamic shared memory, in the window of shared memory.
__device__ __forceinline__ std::uint32_t shared_memory() {
  extern __shared__ char memory[];
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(memory));
}

// A number that is the same in all lanes of the warp, so that the compiler knows.
__device__ __forceinline__ int uniform(int x) { return __shfl_sync(0xffffffffu, x, 0); }

// Waits until `threads` have come to barrier `id`, this thread among them; 0 is that of __syncthreads().
__device__ __forceinline__ void barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Comes to barrier `id` without waiting.
__device__ __forceinline__ void barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Of the four warps of a warpgroup: each thread keeps `count` registers, or waits until there are as many.
template <int count>
__device__ __forceinline__ void fewer_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(count));
}
template <int count>
__device__ __forceinline__ void more_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(count));
}

}  // namespace imf::cuda::ptx

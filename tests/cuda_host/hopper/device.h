// The words of CUDA C++ that the kernel uses, for the host's compiler.
#pragma once

#include <algorithm>

#include "machine.h"

#define __device__
#define __global__
#define __grid_constant__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define threadIdx (machine::thread_index())
#define blockIdx (machine::block()->index)
#define gridDim (machine::block()->blocks)

inline void __syncthreads() { machine::meet(0, static_cast<int>(machine::block()->threads.size()), true); }

using std::min;

struct alignas(16) uint4 {
  std::uint32_t x, y, z, w;
};
inline uint4 make_uint4(std::uint32_t x, std::uint32_t y, std::uint32_t z, std::uint32_t w) {
  return {x, y, z, w};
}

inline std::uint32_t __shfl_xor_sync(unsigned, std::uint32_t bits, int lanes) {
  return machine::exchange(bits, (machine::block()->current % machine::warp) ^ lanes);
}
inline float __shfl_xor_sync(unsigned all, float x, int lanes) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, 4);
  bits = __shfl_xor_sync(all, bits, lanes);
  std::memcpy(&x, &bits, 4);
  return x;
}

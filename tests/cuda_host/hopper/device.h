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

inline float __shfl_xor_sync(unsigned, float x, int lanes) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, 4);
  bits = machine::exchange(bits, (machine::block()->current % machine::warp) ^ lanes);
  std::memcpy(&x, &bits, 4);
  return x;
}

// The part of CUDA's language and runtime that csrc/cuda uses, for a C++ compiler and the CPU: stands in for
// the toolkit's header of this name, so that the same sources are compiled and tested without a GPU.
//
// Blocks run one after another. The threads of a block are fibers, which run one at a time until they meet a
// barrier or a shuffle (emulator.cpp); device memory is the host's. What a GPU would hang on or leave
// undefined, a barrier that some threads do not reach, is an error. What this cannot show: races beyond those
// that another order of the fibers shows, and anything about time.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static  // blocks run one at a time

#define CUDART_VERSION 13000

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

extern dim3 threadIdx, blockIdx, blockDim, gridDim;

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9 };
using cudaStream_t = void*;
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  std::size_t dynamicSmemBytes;
  cudaStream_t stream;
};

inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaDriverGetVersion(int* version) { return *version = CUDART_VERSION, cudaSuccess; }
inline cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "invalid configuration argument"; }

namespace cuda_host {

// Runs `thread` in every thread of every block.
void run(dim3 grid, dim3 block, const std::function<void()>& thread);
// Waits for all threads of the block; for those of the warp, of which each then gets what `lane` brought.
void wait_for_block(const char* file, int line);
float exchange(float x, unsigned lane, const char* file, int line);
// Whether fibers take their turns from the last to the first.
void set_backwards(bool backwards);

unsigned lane_id();

}  // namespace cuda_host

#define __syncthreads() cuda_host::wait_for_block(__FILE__, __LINE__)
#define __shfl_xor_sync(mask, x, offset) \
  (static_assert_full_warp<(mask)>(),    \
   cuda_host::exchange(x, cuda_host::lane_id() ^ (offset), __FILE__, __LINE__))
template <unsigned mask>
void static_assert_full_warp() {
  static_assert(mask == 0xffffffffu, "the emulator knows whole warps only");
}

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* c, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  const unsigned threads = c->blockDim.x * c->blockDim.y * c->blockDim.z;
  if (threads == 0 || threads > 1024 || c->gridDim.x > 0x7fffffffu || c->gridDim.y > 0xffffu) {
    return cudaErrorInvalidConfiguration;
  }
  cuda_host::run(c->gridDim, c->blockDim, [&] { kernel(arguments...); });
  return cudaSuccess;
}

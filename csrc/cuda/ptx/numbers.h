// Pairs of two-byte numbers, and fast approximations.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

#include "types.h"

namespace imf::cuda::ptx {

// Returns 2^x to 2 ulp; subnormal results are zero.
__device__ __forceinline__ float exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Returns 1 / x to 1 ulp, for normal x.
__device__ __forceinline__ float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Rounds two numbers to T, `low` into the lower half.
template <typename T>
__device__ __forceinline__ std::uint32_t pack(float low, float high);
template <>
__device__ __forceinline__ std::uint32_t pack<bfloat16>(float low, float high) {
  std::uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
template <>
__device__ __forceinline__ std::uint32_t pack<float16>(float low, float high) {
  std::uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

template <typename T>
__device__ __forceinline__ void unpack(std::uint32_t pair, float& low, float& high);
template <>
__device__ __forceinline__ void unpack<bfloat16>(std::uint32_t pair, float& low, float& high) {
  low = __uint_as_float(pair << 16);
  high = __uint_as_float(pair & 0xffff0000u);
}
template <>
__device__ __forceinline__ void unpack<float16>(std::uint32_t pair, float& low, float& high) {
  low = __half2float(__ushort_as_half(static_cast<unsigned short>(pair)));
  high = __half2float(__ushort_as_half(static_cast<unsigned short>(pair >> 16)));
}

}  // namespace imf::cuda::ptx

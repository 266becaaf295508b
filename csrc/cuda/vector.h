// Elements as the kernels read and write them: 16 bytes at a time, computed with in fp32.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "common/dual.h"
#include "cuda/runtime.h"

#define IMF_DEVICE static __device__ __forceinline__

namespace imf::cuda {

// How many elements of T a thread reads at once. Of a kernel's types the widest one counts.
template <typename T>
constexpr int lanes = 16 / static_cast<int>(sizeof(T));

constexpr int bytes_at_once(int n, int size) { return n * size < 16 ? n * size : 16; }

template <typename T, int n>
struct alignas(bytes_at_once(n, sizeof(T))) Pack {
  T values[n];
};

IMF_DEVICE float to_float(float x) { return x; }
IMF_DEVICE float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
IMF_DEVICE float to_float(__half x) { return __half2float(x); }
IMF_DEVICE void set(float& y, float x) { y = x; }
IMF_DEVICE void set(__nv_bfloat16& y, float x) { y = __float2bfloat16_rn(x); }
IMF_DEVICE void set(__half& y, float x) { y = __float2half_rn(x); }

// n elements from p on, the first `left` of them there; zeros for the others, and where there is no p.
// `aligned`: p is, to the bytes that are read at once.
template <int n, typename T>
IMF_DEVICE void load(float* to, const T* p, index_t left, bool aligned) {
  if (aligned && p && left >= n) {
    const Pack<T, n> pack = *reinterpret_cast<const Pack<T, n>*>(p);
#pragma unroll
    for (int i = 0; i < n; ++i) to[i] = to_float(pack.values[i]);
    return;
  }
#pragma unroll
  for (int i = 0; i < n; ++i) to[i] = p && i < left ? to_float(p[i]) : 0.0f;
}

template <int n, typename T>
IMF_DEVICE void store(T* p, const float* from, index_t left, bool aligned) {
  if (aligned && left >= n) {
    Pack<T, n> pack;
#pragma unroll
    for (int i = 0; i < n; ++i) set(pack.values[i], from[i]);
    *reinterpret_cast<Pack<T, n>*>(p) = pack;
    return;
  }
#pragma unroll
  for (int i = 0; i < n; ++i) {
    if (i < left) set(p[i], from[i]);
  }
}

// What a launcher asks of an operand: whether n elements at a time can be read, from rows `stride` apart.
struct Operand {
  const void* p;
  index_t stride;
  int size;  // of an element

  template <typename T>
  static Operand of(const void* p, index_t stride) {
    return {p, stride, static_cast<int>(sizeof(T))};
  }
  bool aligned(int n) const {
    const auto bytes = static_cast<std::uintptr_t>(bytes_at_once(n, size));
    return p == nullptr ||
           (reinterpret_cast<std::uintptr_t>(p) | static_cast<std::uintptr_t>(stride * size)) % bytes == 0;
  }
};

template <typename... Operands>
bool aligned(int n, Operands... operands) {
  return (operands.aligned(n) && ...);
}

// Calls body with a value of each type. The second type is that of operands made from the first, or added to
// it: the same, or half as wide.
template <typename Body>
void with_types(DType wide, DType narrow, Body body) {
  if (wide == DType::bfloat16) {
    body(__nv_bfloat16{}, __nv_bfloat16{});
  } else if (wide == DType::float16) {
    body(__half{}, __half{});
  } else if (narrow == DType::bfloat16) {
    body(float{}, __nv_bfloat16{});
  } else if (narrow == DType::float16) {
    body(float{}, __half{});
  } else {
    body(float{}, float{});
  }
}

template <typename Body>
void with_type(DType type, Body body) {
  if (type == DType::bfloat16) {
    body(__nv_bfloat16{});
  } else if (type == DType::float16) {
    body(__half{});
  } else {
    body(float{});
  }
}

// a / b, in 32 bits where both fit: 64-bit division takes a hundred instructions.
IMF_DEVICE index_t quotient(index_t a, index_t b) {
  if (((a | b) >> 32) == 0) return static_cast<std::uint32_t>(a) / static_cast<std::uint32_t>(b);
  return a / b;
}

}  // namespace imf::cuda

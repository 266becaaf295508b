// Vector access to elements: 16 bytes at a time, computed with in fp32.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <initializer_list>
#include <type_traits>

#include "common/rows.h"
#include "cuda/runtime.h"

#define IMF_DEVICE static __device__ __forceinline__

namespace imf::cuda {

// Elements of T that a thread reads at once; a kernel takes the number of its widest type.
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

// Loads n elements from p on, of which the first `left` exist; zeros for the others, or if p is null.
// `aligned`: p is a multiple of the bytes read at once.
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

// Returns whether n elements of `size` bytes can be read at once from p and from each multiple of the
// strides, which count elements, after it.
inline bool aligned(int n, int size, const void* p, std::initializer_list<index_t> strides = {}) {
  auto bits = reinterpret_cast<std::uintptr_t>(p);
  for (const index_t stride : strides) bits |= static_cast<std::uintptr_t>(stride * size);
  return p == nullptr || bits % static_cast<std::uintptr_t>(bytes_at_once(n, size)) == 0;
}
inline int size_of(DType type) { return type == DType::float32 ? 4 : 2; }
inline bool aligned(int n, const Rows& x) {
  return aligned(n, size_of(x.dtype), x.data, {x.rows > 1 ? x.stride : 0});
}
inline bool aligned(int n, const Floats& x) {
  return aligned(n, sizeof(float), x.data, {x.rows > 1 ? x.width : 0});
}
inline bool aligned(int n, const Heads& x) {
  return aligned(n, size_of(x.dtype), x.data, {x.stride[0], x.stride[1], x.stride[2]});
}
template <typename... Views>
bool all_aligned(int n, const Views&... views) {
  return (aligned(n, views) && ...);
}

// Calls body with a value of the C++ type of `type`.
template <typename Body>
void with_type(DType type, Body body) {
  if (type == DType::bfloat16) {
    body(__nv_bfloat16{});
  } else if (type == DType::float16) {
    body(__half{});
  } else if (type == DType::float32) {
    body(float{});
  } else {
    throw std::invalid_argument("the kernels of CUDA take float32, bfloat16 and float16");
  }
}

// Calls body with values of a supported pair of types: equal ones, or float32 with any.
template <typename Body>
void with_types(DType wide, DType narrow, Body body) {
  with_type(wide, [&](auto w) {
    if constexpr (std::is_same_v<decltype(w), float>) {
      with_type(narrow, [&](auto n) { body(w, n); });
    } else {
      body(w, w);
    }
  });
}

}  // namespace imf::cuda

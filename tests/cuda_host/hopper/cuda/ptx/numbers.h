// In the place of csrc/cuda/ptx/numbers.h.
#pragma once

#include <type_traits>

#include "device.h"
#include "types.h"

namespace imf::cuda::ptx {

inline float exp2(float x) { return std::exp2(x); }
inline float reciprocal(float x) { return 1.0f / x; }

template <typename T>
std::uint16_t rounded(float x) {
  std::uint16_t bits;
  if constexpr (std::is_same_v<T, float16>) {
    const auto half = static_cast<_Float16>(x);
    std::memcpy(&bits, &half, 2);
  } else {
    std::uint32_t wide;
    std::memcpy(&wide, &x, 4);
    bits = std::isnan(x) ? 0x7fff : static_cast<std::uint16_t>((wide + 0x7fff + (wide >> 16 & 1)) >> 16);
  }
  return bits;
}

template <typename T>
std::uint32_t pack(float low, float high) {
  return rounded<T>(low) | static_cast<std::uint32_t>(rounded<T>(high)) << 16;
}
template <typename T>
void unpack(std::uint32_t pair, float& low, float& high) {
  low = machine::number(static_cast<std::uint16_t>(pair), std::is_same_v<T, float16>);
  high = machine::number(static_cast<std::uint16_t>(pair >> 16), std::is_same_v<T, float16>);
}

}  // namespace imf::cuda::ptx

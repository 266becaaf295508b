// In the place of csrc/cuda/ptx/numbers.h.
#pragma once

#include "device.h"

namespace imf::cuda::ptx {

inline float exp2(float x) { return std::exp2(x); }
inline float reciprocal(float x) { return 1.0f / x; }

inline std::uint16_t rounded(float x) {
  std::uint32_t wide;
  std::memcpy(&wide, &x, 4);
  return std::isnan(x) ? 0x7fff : static_cast<std::uint16_t>((wide + 0x7fff + (wide >> 16 & 1)) >> 16);
}

inline std::uint32_t pack(float low, float high) {
  return rounded(low) | static_cast<std::uint32_t>(rounded(high)) << 16;
}
inline void unpack(std::uint32_t pair, float& low, float& high) {
  low = machine::number(static_cast<std::uint16_t>(pair));
  high = machine::number(static_cast<std::uint16_t>(pair >> 16));
}

}  // namespace imf::cuda::ptx

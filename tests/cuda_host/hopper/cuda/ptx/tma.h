// In the place of csrc/cuda/ptx/tma.h.
#pragma once

#include "device.h"

namespace imf::cuda::ptx {

using TensorMap = machine::TensorMap;

inline void prefetch(const TensorMap&) {}
inline void copy_box(std::uint32_t target, const TensorMap& map, std::uint32_t barrier, int column, int row,
                     int head, int sample) {
  machine::issue(machine::Copy{target, barrier, &map, {column, row, head, sample}});
}

}  // namespace imf::cuda::ptx

// Element types of the kernels.
#pragma once

#include <cstdint>
#include <cstring>

namespace imf {

using index_t = std::int64_t;

// The upper half of an IEEE fp32, like torch.bfloat16.
struct bfloat16 {
  std::uint16_t bits;
};

enum class DType : int { float32, bfloat16, float16, boolean, other };

}  // namespace imf

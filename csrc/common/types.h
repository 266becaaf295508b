// Element types and the small conversions that the kernels share.
#pragma once

#include <cstdint>
#include <cstring>

namespace imf {

using index_t = std::int64_t;

// The upper half of an IEEE fp32, as PyTorch's torch.bfloat16.
struct bfloat16 {
  std::uint16_t bits;
};

// An IEEE fp16, as PyTorch's torch.float16.
struct float16 {
  std::uint16_t bits;
};

// Selects the element type of a kernel at run time; the values are those that Python passes. The CPU kernels
// have none for float16.
enum class DType : int { float32 = 0, bfloat16 = 1, float16 = 2 };

// A [batch, heads, length, width] tensor whose rows are contiguous; tangents hold the last samples only.
struct HeadsTensor {
  void* data;         // null: a structural zero, or a gradient that is not wanted
  index_t stride[3];  // of batch, head, position
};

}  // namespace imf

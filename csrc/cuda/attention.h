#pragma once

#include "common/types.h"

namespace imf::cuda {

// O = softmax(scale Q K^T) V with its tangent, on GPUs of compute capability 9.0. bfloat16 or float16; widths
// up to 128 and, like every stride, multiples of 8; addresses of 16 bytes. There is at least one key.
struct AttentionForward {
  DType type;
  HeadsTensor q, k, v, out;
  HeadsTensor q_dot, k_dot, v_dot, out_dot;
  float* lse;  // [batch, heads, queries]: logarithm of the softmax's denominator to base 2
  // Tangents belong to the last `tangent_batch` samples. Key and value have heads / group heads.
  index_t batch, tangent_batch, heads, group, queries, keys, width, value_width;
  float scale;
  int device;
  void* stream;
};

void attention_forward(const AttentionForward&);

}  // namespace imf::cuda

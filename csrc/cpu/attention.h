#pragma once

#include "common/types.h"
#include "cpu/isa.h"

namespace imf {

// O = softmax(scale Q K^T) V.
struct AttentionForward {
  DType type;
  HeadsTensor q, k, v, out;
  HeadsTensor q_dot, k_dot, v_dot, out_dot;
  float* row_max;  // [batch, heads, queries]: the largest q k of a query; where scale < 0 that of -q k
  index_t batch, tangent_batch, heads, queries, keys, width, value_width;
  float scale;
  int threads;
};

struct AttentionBackward {
  DType type;
  HeadsTensor q, k, v, dout;
  HeadsTensor dq, dk, dv;
  const float* row_max;
  index_t batch, heads, queries, keys, width, value_width;
  float scale;
  int threads;
};

IMF_DECLARE_PER_ISA(void attention_forward(const AttentionForward&);
                    void attention_backward(const AttentionBackward&))

}  // namespace imf

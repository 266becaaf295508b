#pragma once

#include "common/types.h"
#include "cpu/isa.h"

namespace imf {

// One group of condition tokens: rows tokens[i] + embedding[b] for i < count.
struct TokenGroup {
  const float* tokens;         // [count, width]
  const float* embedding;      // [batch, width]
  const float* embedding_dot;  // [tangent_batch, width], of the last samples; null: zero
  index_t count;
};

// y[b] = the groups' rows, then x[b]; in fp32.
struct PrependTokensForward {
  const TokenGroup* groups;
  index_t group_count, prefix;  // prefix: the sum of the groups' counts
  const float* x;               // [batch, length, width]
  const float* x_dot;           // [tangent_batch, length, width]; null: zero
  float* y;                     // [batch, prefix + length, width]
  float* y_dot;                 // [tangent_batch, prefix + length, width]
  index_t batch, tangent_batch, length, width;
  int threads;
};

IMF_DECLARE_PER_ISA(void prepend_tokens_forward(const PrependTokensForward&))

}  // namespace imf

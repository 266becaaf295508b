#pragma once

#include "common/types.h"
#include "cpu/isa.h"

namespace imf {

// One group of condition tokens: rows tokens[i] + embedding[b] for i < count.
struct TokenGroup {
  const void* tokens;         // [count, width]
  const void* embedding;      // [batch, width]
  const void* embedding_dot;  // [tangent_batch, width], of the last samples; null: zero
  index_t count;
};

// y[b] = the groups' rows, then x[b].
struct PrependTokensForward {
  DType type;  // of everything
  const TokenGroup* groups;
  index_t group_count, prefix;  // prefix: the sum of the groups' counts
  const void* x;                // [batch, length, width]
  const void* x_dot;            // [tangent_batch, length, width]; null: zero
  void* y;                      // [batch, prefix + length, width]
  void* y_dot;                  // [tangent_batch, prefix + length, width]
  index_t batch, tangent_batch, length, width;
  int threads;
};

IMF_DECLARE_PER_ISA(void prepend_tokens_forward(const PrependTokensForward&))

}  // namespace imf

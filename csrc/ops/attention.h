#pragma once

#include "ops/operation.h"

namespace imf {

// O = softmax(scale Q K^T + mask) V. Key and value may have fewer heads than the query, each shared by as
// many neighbouring ones. On CUDA without masks.
struct AttentionForward {
  IMF_ARGUMENTS(Heads q IMF_IS(T, batch, heads, queries, width);
                Heads k IMF_IS(T, batch, key_heads, keys, width);
                Heads v IMF_IS(T, batch, key_heads, keys, value_width);
                Optional<Heads> q_dot IMF_IS(T, tangents, heads, queries, width);
                Optional<Heads> k_dot IMF_IS(T, tangents, key_heads, keys, width);
                Optional<Heads> v_dot IMF_IS(T, tangents, key_heads, keys, value_width);
                Optional<Mask> mask IMF_IS(batch, heads, queries, keys);  // of bool or added
                Out<Heads> out IMF_IS(T, batch, heads, queries, value_width);
                Optional<Out<Heads>> out_dot IMF_IS(T, tangents, heads, queries, value_width);
                // For backward: on the CPU the largest q k of a query (of -q k if scale < 0; with an added
                // mask the largest logit), on CUDA log2 of the softmax's denominator.
                Out<Floats> lse IMF_IS(batch heads, queries); float scale; bool is_causal;)
};

struct AttentionBackward {
  IMF_ARGUMENTS(Heads q IMF_IS(T, batch, heads, queries, width);
                Heads k IMF_IS(T, batch, key_heads, keys, width);
                Heads v IMF_IS(T, batch, key_heads, keys, value_width);
                Optional<Mask> mask IMF_IS(batch, heads, queries, keys);
                Floats lse IMF_IS(batch heads, queries);
                Heads dout IMF_IS(T, batch, heads, queries, value_width);
                // Absent if not wanted.
                Optional<Out<Heads>> dq IMF_IS(T, batch, heads, queries, width);
                Optional<Out<Heads>> dk IMF_IS(T, batch, key_heads, keys, width);
                Optional<Out<Heads>> dv IMF_IS(T, batch, key_heads, keys, value_width); float scale;
                bool is_causal;)
};

IMF_DECLARE(attention_forward, AttentionForward, CUDA)
IMF_DECLARE(attention_backward, AttentionBackward, CPU)

}  // namespace imf

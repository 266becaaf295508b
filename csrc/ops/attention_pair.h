#pragma once

#include "ops/operation.h"

namespace imf {

// Backward of attention's pair, O and its tangent. Every sample has a tangent.
struct AttentionPairBackward {
  IMF_ARGUMENTS(Heads q IMF_IS(T, batch, heads, queries, width);
                Heads k IMF_IS(T, batch, key_heads, keys, width);
                Heads v IMF_IS(T, batch, key_heads, keys, value_width);
                Optional<Heads> q_dot IMF_IS(T, batch, heads, queries, width);
                Optional<Heads> k_dot IMF_IS(T, batch, key_heads, keys, width);
                Optional<Heads> v_dot IMF_IS(T, batch, key_heads, keys, value_width);
                Optional<Mask> mask IMF_IS(batch, heads, queries, keys);
                Floats lse IMF_IS(batch heads, queries);                             // of the forward
                Optional<Heads> dout IMF_IS(T, batch, heads, queries, value_width);  // absent for zeros
                Heads dout_dot IMF_IS(T, batch, heads, queries, value_width);
                // Absent if not wanted.
                Optional<Out<Heads>> dq IMF_IS(T, batch, heads, queries, width);
                Optional<Out<Heads>> dk IMF_IS(T, batch, key_heads, keys, width);
                Optional<Out<Heads>> dv IMF_IS(T, batch, key_heads, keys, value_width);
                Optional<Out<Heads>> dq_dot IMF_IS(T, batch, heads, queries, width);
                Optional<Out<Heads>> dk_dot IMF_IS(T, batch, key_heads, keys, width);
                Optional<Out<Heads>> dv_dot IMF_IS(T, batch, key_heads, keys, value_width); float scale;
                bool is_causal;)
};

IMF_DECLARE(attention_pair_backward, AttentionPairBackward, CPU)

}  // namespace imf

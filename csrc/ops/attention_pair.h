#pragma once

#include "ops/operation.h"

namespace imf {

// Backward of attention's pair, O and its tangent. Every sample has a tangent.
struct AttentionPairBackward {
  IMF_ARGUMENTS(Heads q;                      // [batch, heads, queries, width]
                Heads k;                      // [batch, key heads, keys, width]
                Heads v;                      // [batch, key heads, keys, value width]
                Optional<Heads> q_dot;        // as q
                Optional<Heads> k_dot;        // as k
                Optional<Heads> v_dot;        // as v
                Optional<Mask> mask;          // [batch, heads, queries, keys]
                Floats lse;                   // of the forward
                Optional<Heads> dout;         // [batch, heads, queries, value width]; absent for zeros
                Heads dout_dot;               // as dout
                Optional<Out<Heads>> dq;      // absent if not wanted
                Optional<Out<Heads>> dk;      //
                Optional<Out<Heads>> dv;      //
                Optional<Out<Heads>> dq_dot;  //
                Optional<Out<Heads>> dk_dot;  //
                Optional<Out<Heads>> dv_dot;  //
                float scale; bool is_causal;)
};

IMF_DECLARE(attention_pair_backward, AttentionPairBackward, CPU)

}  // namespace imf

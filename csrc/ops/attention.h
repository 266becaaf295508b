#pragma once

#include "ops/operation.h"

namespace imf {

// O = softmax(scale Q K^T + mask) V. Key and value may have fewer heads than the query, each shared by as
// many neighbouring ones. On CUDA without masks.
struct AttentionForward {
  IMF_ARGUMENTS(Heads q;                       // [batch, heads, queries, width]
                Heads k;                       // [batch, heads, keys, width]
                Heads v;                       // [batch, heads, keys, value width]
                Optional<Heads> q_dot;         // [tangent batch, ...], of the last samples
                Optional<Heads> k_dot;         //
                Optional<Heads> v_dot;         //
                Optional<Mask> mask;           // [batch, heads, queries, keys], of bool or added
                Out<Heads> out;                // [batch, heads, queries, value width]
                Optional<Out<Heads>> out_dot;  // [tangent batch, heads, queries, value width]
                Out<Floats> lse;  // [batch, heads, queries], for backward: on the CPU the largest q k of a
                                  // query (of -q k if scale < 0; with an added mask the largest logit), on
                                  // CUDA log2 of the softmax's denominator
                float scale; bool is_causal;)
};

struct AttentionBackward {
  IMF_ARGUMENTS(Heads q; Heads k; Heads v; Optional<Mask> mask; Floats lse; Heads dout;  //
                Optional<Out<Heads>> dq;  // absent if not wanted
                Optional<Out<Heads>> dk; Optional<Out<Heads>> dv; float scale; bool is_causal;)
};

IMF_DECLARE(attention_forward, AttentionForward, CUDA)
IMF_DECLARE(attention_backward, AttentionBackward, CPU)

}  // namespace imf

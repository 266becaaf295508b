#pragma once

#include "ops/operation.h"

namespace imf {

// q = rotate(rms_norm(x) q_weight) for the heads x of queries, k likewise: pair (2i, 2i+1) of position l is
// rotated by the angle with cosine cos[l, i] and sine sin[l, i]. A projection qkv has heads of queries, then
// of keys, then as many of values.
struct QkNormRopeForward {
  IMF_ARGUMENTS(Elements qkv;                // [batch, length, heads + 2 key heads, width]
                Optional<Elements> qkv_dot;  // [tangent batch, ...], of the last samples
                Floats q_weight;             // [width]
                Floats k_weight;             // [width]
                Floats cos;                  // [length, width / 2]
                Floats sin;                  // as cos
                Out<Heads> q;                // [batch, heads, length, width]; in memory as in qkv
                Optional<Out<Heads>> q_dot;  // [tangent batch, ...]
                Out<Heads> k;                // [batch, key heads, length, width]; in memory as in qkv
                Optional<Out<Heads>> k_dot;  // [tangent batch, ...]
                Out<Floats> rstd;            // [batch length (heads + key heads)]
                float eps;)
};

struct QkNormRopeBackward {
  IMF_ARGUMENTS(Elements qkv; Heads dq;  // as q, of any strides, as dk and dv
                Heads dk; Heads dv; Floats q_weight; Floats k_weight; Floats cos; Floats sin; Floats rstd;  //
                Out<Elements> dqkv;    // as qkv
                Out<Floats> partial;   // [1, shares, 2, width], scratch
                Out<Floats> weights;)  // [1, 2, width], the gradients of q_weight and k_weight
};

// The pair's backward: (dqkv_dot, dqkv) is the backward of the duals (qkv, qkv_dot) and (dq_dot, dq) …, its
// value and its tangent (imf_kernels/backends/operators.py).
struct QkNormRopePairBackward {
  IMF_ARGUMENTS(Elements qkv; Elements qkv_dot; Heads dq; Heads dq_dot; Heads dk; Heads dk_dot; Heads dv;
                Heads dv_dot; Floats q_weight; Floats k_weight; Floats cos; Floats sin; Floats rstd;  //
                Out<Elements> dqkv;      // as qkv
                Out<Elements> dqkv_dot;  // as qkv_dot
                Out<Floats> partial;     // [1, shares, 2, width], scratch
                Out<Floats> weights;)    // [1, 2, width]
};

IMF_DECLARE(qk_norm_rope_forward, QkNormRopeForward, CPU)
IMF_DECLARE(qk_norm_rope_backward, QkNormRopeBackward, CPU)
IMF_DECLARE(qk_norm_rope_pair_backward, QkNormRopePairBackward, CPU)

}  // namespace imf

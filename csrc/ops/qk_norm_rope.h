#pragma once

#include "ops/operation.h"

namespace imf {

// q = rotate(rms_norm(x) q_weight) for the heads x of queries, k likewise: pair (2i, 2i+1) of position l is
// rotated by the angle with cosine cos[l, i] and sine sin[l, i]. A projection qkv has heads of queries, then
// of keys, then as many of values.
struct QkNormRopeForward {
  IMF_ARGUMENTS(Elements qkv IMF_IS(T, batch length columns);  // columns: (heads + 2 key_heads) width
                Optional<Elements> qkv_dot IMF_IS(T, tangents length columns);
                Floats q_weight IMF_IS(2 pairs); Floats k_weight IMF_IS(2 pairs);
                Floats cos IMF_IS(length, pairs); Floats sin IMF_IS(length, pairs);
                // In memory as in qkv.
                Out<Heads> q IMF_IS(T, batch, heads, length, 2 pairs);
                Optional<Out<Heads>> q_dot IMF_IS(T, tangents, heads, length, 2 pairs);
                Out<Heads> k IMF_IS(T, batch, key_heads, length, 2 pairs);
                Optional<Out<Heads>> k_dot IMF_IS(T, tangents, key_heads, length, 2 pairs);
                Out<Floats> rstd;  // [batch length (heads + key_heads)]
                float eps;)
};

struct QkNormRopeBackward {
  IMF_ARGUMENTS(Elements qkv IMF_IS(T, elements);
                // Of any strides.
                Heads dq IMF_IS(T, batch, heads, length, 2 pairs);
                Heads dk IMF_IS(T, batch, key_heads, length, 2 pairs);
                Heads dv IMF_IS(T, batch, key_heads, length, 2 pairs); Floats q_weight IMF_IS(2 pairs);
                Floats k_weight IMF_IS(2 pairs); Floats cos IMF_IS(length, pairs);
                Floats sin IMF_IS(length, pairs); Floats rstd; Out<Elements> dqkv IMF_IS(T, elements);
                Out<Floats> partial;                      // [1, shares, 2, width], scratch
                Out<Floats> weights IMF_IS(2, 2 pairs);)  // the gradients of q_weight and k_weight
};

// The pair's backward: (dqkv_dot, dqkv) is the backward of the duals (qkv, qkv_dot) and (dq_dot, dq) …, its
// value and its tangent (imf_kernels/backends/operators.py).
struct QkNormRopePairBackward {
  IMF_ARGUMENTS(Elements qkv IMF_IS(T, elements); Elements qkv_dot IMF_IS(T, tangent_elements);
                Heads dq IMF_IS(T, batch, heads, length, 2 pairs);
                Heads dq_dot IMF_IS(T, tangents, heads, length, 2 pairs);
                Heads dk IMF_IS(T, batch, key_heads, length, 2 pairs);
                Heads dk_dot IMF_IS(T, tangents, key_heads, length, 2 pairs);
                Heads dv IMF_IS(T, batch, key_heads, length, 2 pairs);
                Heads dv_dot IMF_IS(T, tangents, key_heads, length, 2 pairs); Floats q_weight IMF_IS(2 pairs);
                Floats k_weight IMF_IS(2 pairs); Floats cos IMF_IS(length, pairs);
                Floats sin IMF_IS(length, pairs); Floats rstd; Out<Elements> dqkv IMF_IS(T, elements);
                Out<Elements> dqkv_dot IMF_IS(T, tangent_elements);
                Out<Floats> partial;  // [1, shares, 2, width], scratch
                Out<Floats> weights IMF_IS(2, 2 pairs);)
};

IMF_DECLARE(qk_norm_rope_forward, QkNormRopeForward, CPU)
IMF_DECLARE(qk_norm_rope_backward, QkNormRopeBackward, CPU)
IMF_DECLARE(qk_norm_rope_pair_backward, QkNormRopePairBackward, CPU)

}  // namespace imf

#pragma once

#include "ops/operation.h"

namespace imf {

// y = rotate(rms_norm(x) w) of queries or keys: pair (2i, 2i+1) of position l is rotated by the angle with
// cosine cos[l, i] and sine sin[l, i].
struct QkNormRopeForward {
  IMF_ARGUMENTS(Heads x;                     // [batch, heads, length, width]
                Optional<Heads> x_dot;       // [tangent batch, ...], of the last samples
                Floats weight;               // [width]
                Floats cos;                  // [length, width / 2]
                Floats sin;                  // as cos
                Out<Heads> y;                // as x; in memory [batch, length, heads, width]
                Optional<Out<Heads>> y_dot;  // as x_dot; in memory as y
                Out<Floats> rstd;            // [batch length heads]
                float eps;)
};

struct QkNormRopeBackward {
  IMF_ARGUMENTS(Heads x; Heads dy; Floats weight; Floats cos; Floats sin; Floats rstd;  //
                Out<Heads> dx;         // in memory [batch, length, heads, width]
                Out<Floats> partial;   // [1, shares, 1, width], scratch
                Out<Floats> dweight;)  // [1, 1, width]
};

// The pair's backward: (dx_dot, dx) is the backward of the duals (x, x_dot) and (dy_dot, dy), its value and
// its tangent (imf_kernels/backends/operators.py).
struct QkNormRopePairBackward {
  IMF_ARGUMENTS(Heads x; Heads x_dot; Heads dy; Heads dy_dot; Floats weight; Floats cos; Floats sin;
                Floats rstd;           //
                Out<Heads> dx;         // in memory [batch, length, heads, width]
                Out<Heads> dx_dot;     // likewise
                Out<Floats> partial;   // [1, shares, 1, width], scratch
                Out<Floats> dweight;)  // [1, 1, width]
};

IMF_DECLARE(qk_norm_rope_forward, QkNormRopeForward, CPU)
IMF_DECLARE(qk_norm_rope_backward, QkNormRopeBackward, CPU)
IMF_DECLARE(qk_norm_rope_pair_backward, QkNormRopePairBackward, CPU)

}  // namespace imf

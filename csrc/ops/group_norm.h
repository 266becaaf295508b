#pragma once

#include "ops/operation.h"

namespace imf {

// y = f(n weight + bias) with n = (x - mean - correction) rstd, rstd = 1 / sqrt(variance + eps), over the
// channels of a group and all positions; f is SiLU or the identity. The correction is for the mean's
// rounding.
struct GroupNormForward {
  IMF_ARGUMENTS(Planes x;                     // [samples, channels, ...]
                Optional<Planes> x_dot;       // of the last samples
                Optional<Floats> weight;      // [channels]; 1 if absent
                Optional<Floats> bias;        // [channels]; 0 if absent
                Out<Planes> y;                // as x
                Optional<Out<Planes>> y_dot;  // as x_dot
                Out<Floats> statistics;       // [samples, groups, 3]: mean, correction, rstd
                float eps; bool silu; bool channels_last;)
};

struct GroupNormBackward {
  IMF_ARGUMENTS(Planes x; Planes dy; Optional<Floats> weight; Optional<Floats> bias; Floats statistics;
                Out<Planes> dx; Out<Floats> sums;  // [samples, 2, channels] over positions: dbias, dweight
                bool silu; bool channels_last;)
};

// The pair's backward: (dx_dot, dx) is the backward of the duals (x, x_dot) and (dy_dot, dy), its value and
// its tangent (imf_kernels/backends/operators.py).
struct GroupNormPairBackward {
  IMF_ARGUMENTS(Planes x; Planes x_dot; Planes dy; Planes dy_dot;                   //
                Optional<Floats> weight; Optional<Floats> bias; Floats statistics;  //
                Out<Planes> dx; Out<Planes> dx_dot;
                Out<Floats> sums;  // [samples, 2, channels] over positions: dbias, dweight
                bool silu; bool channels_last;)
};

IMF_DECLARE(group_norm_forward, GroupNormForward, CPU)
IMF_DECLARE(group_norm_backward, GroupNormBackward, CPU)
IMF_DECLARE(group_norm_pair_backward, GroupNormPairBackward, CPU)

}  // namespace imf

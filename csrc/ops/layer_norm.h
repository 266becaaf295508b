#pragma once

#include "ops/operation.h"

namespace imf {

// y = n (one + scale) + shift with n = (x - mean - correction) rstd, rstd = 1 / sqrt(variance + eps). The
// correction is for the mean's rounding. Parameters have one row per group of rows; an absent one is zero.
struct LayerNormForward {
  IMF_ARGUMENTS(Rows x;                      // [rows, width]
                Optional<Rows> x_dot;        // [tangent rows, width], of the last rows
                Optional<Floats> scale;      // [groups, width]
                Optional<Floats> scale_dot;  // [tangent groups, width]
                Optional<Floats> shift;      // as scale
                Optional<Floats> shift_dot;  // as scale_dot
                Out<Rows> y;                 // as x
                Optional<Out<Rows>> y_dot;   // [tangent rows, width]
                Out<Floats> statistics;      // [3 rows]: mean, correction, rstd of each
                float one; float eps;)
};

struct LayerNormBackward {
  IMF_ARGUMENTS(Rows x; Rows dy; Optional<Floats> scale; Floats statistics;  //
                Out<Rows> dx; Out<Floats> partial;  // [groups, shares, 2, width], scratch
                Out<Floats> sums;                   // [groups, 2, width]: dscale, dshift
                float one;)
};

// The pair's backward: (dx_dot, dx) is the backward of the duals (x, x_dot) and (dy_dot, dy), its value and
// its tangent (imf_kernels/backends/operators.py).
struct LayerNormPairBackward {
  IMF_ARGUMENTS(Rows x;                      // [rows, width]
                Optional<Rows> x_dot;        // as dy_dot
                Rows dy; Rows dy_dot;        // [rows, width], [tangent rows, width]
                Optional<Floats> scale;      // [groups, width]
                Optional<Floats> scale_dot;  // [tangent groups, width]
                Floats statistics; Out<Rows> dx; Optional<Out<Rows>> dx_dot;  // as x_dot
                Out<Floats> partial;  // [groups, shares, 4, width], scratch
                Out<Floats> sums;     // [groups, 4, width]: dscale, dshift, dscale_dot, dshift_dot
                float one;)
};

IMF_DECLARE(layer_norm_forward, LayerNormForward, CPU)
IMF_DECLARE(layer_norm_backward, LayerNormBackward, CPU)
IMF_DECLARE(layer_norm_pair_backward, LayerNormPairBackward, CPU)

}  // namespace imf

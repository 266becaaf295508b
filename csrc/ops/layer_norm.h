#pragma once

#include "ops/operation.h"

namespace imf {

// y = n (one + scale) + shift with n = (x - mean - correction) rstd, rstd = 1 / sqrt(variance + eps). The
// correction is for the mean's rounding. Parameters have one row per group of rows; an absent one is zero.
struct LayerNormForward {
  IMF_ARGUMENTS(Rows x IMF_IS(X, rows, width); Optional<Rows> x_dot IMF_IS(X, tangents, width);
                Optional<Floats> scale IMF_IS(groups, width);
                Optional<Floats> scale_dot IMF_IS(tangent_groups, width);
                Optional<Floats> shift IMF_IS(groups, width);
                Optional<Floats> shift_dot IMF_IS(tangent_groups, width); Out<Rows> y IMF_IS(Y, rows, width);
                Optional<Out<Rows>> y_dot IMF_IS(Y, tangents, width);
                Out<Floats> statistics IMF_IS(3 rows);  // mean, correction, rstd of each
                float one; float eps;)
};

struct LayerNormBackward {
  IMF_ARGUMENTS(Rows x IMF_IS(X, rows, width); Rows dy IMF_IS(Y, rows, width);
                Optional<Floats> scale IMF_IS(groups, width); Floats statistics IMF_IS(3 rows);
                Out<Rows> dx IMF_IS(X, rows, width);
                Out<Floats> partial;                       // [groups, shares, 2, width], scratch
                Out<Floats> sums IMF_IS(2 groups, width);  // dscale, dshift of each group
                float one;)
};

// The pair's backward: (dx_dot, dx) is the backward of the duals (x, x_dot) and (dy_dot, dy), its value and
// its tangent (imf_kernels/backends/operators.py).
struct LayerNormPairBackward {
  IMF_ARGUMENTS(Rows x IMF_IS(X, rows, width); Optional<Rows> x_dot IMF_IS(X, tangents, width);
                Rows dy IMF_IS(Y, rows, width); Rows dy_dot IMF_IS(Y, tangents, width);
                Optional<Floats> scale IMF_IS(groups, width);
                Optional<Floats> scale_dot IMF_IS(tangent_groups, width); Floats statistics IMF_IS(3 rows);
                Out<Rows> dx IMF_IS(X, rows, width); Optional<Out<Rows>> dx_dot IMF_IS(X, tangents, width);
                Out<Floats> partial;                       // [groups, shares, 4, width], scratch
                Out<Floats> sums IMF_IS(4 groups, width);  // dscale, dshift, dscale_dot, dshift_dot of each
                float one;)
};

IMF_DECLARE(layer_norm_forward, LayerNormForward, CPU)
IMF_DECLARE(layer_norm_backward, LayerNormBackward, CPU)
IMF_DECLARE(layer_norm_pair_backward, LayerNormPairBackward, CPU)

}  // namespace imf

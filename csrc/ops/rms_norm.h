#pragma once

#include "ops/operation.h"

namespace imf {

// y = x rstd w with rstd = 1 / sqrt(mean(x^2) + eps).
struct RmsNormForward {
  IMF_ARGUMENTS(Rows x IMF_IS(X, rows, width); Optional<Rows> x_dot IMF_IS(X, tangents, width);
                Floats weight IMF_IS(width); Out<Rows> y IMF_IS(Y, rows, width);
                Optional<Out<Rows>> y_dot IMF_IS(Y, tangents, width); Out<Floats> rstd IMF_IS(rows);
                float eps;)
};

struct RmsNormBackward {
  IMF_ARGUMENTS(Rows x IMF_IS(X, rows, width); Rows dy IMF_IS(Y, rows, width); Floats weight IMF_IS(width);
                Floats rstd IMF_IS(rows); Out<Rows> dx IMF_IS(X, rows, width);
                Out<Floats> partial;  // [1, shares, 1, width], scratch
                Out<Floats> dweight IMF_IS(width);)
};

// The pair's backward: (dx_dot, dx) is the backward of the duals (x, x_dot) and (dy_dot, dy), its value and
// its tangent (imf_kernels/backends/operators.py).
struct RmsNormPairBackward {
  IMF_ARGUMENTS(Rows x IMF_IS(X, rows, width); Rows x_dot IMF_IS(X, tangents, width);
                Rows dy IMF_IS(Y, rows, width); Rows dy_dot IMF_IS(Y, tangents, width);
                Floats weight IMF_IS(width); Floats rstd IMF_IS(rows); Out<Rows> dx IMF_IS(X, rows, width);
                Out<Rows> dx_dot IMF_IS(X, tangents, width);
                Out<Floats> partial;  // [1, shares, 1, width], scratch
                Out<Floats> dweight IMF_IS(width);)
};

IMF_DECLARE(rms_norm_forward, RmsNormForward, CPU)
IMF_DECLARE(rms_norm_backward, RmsNormBackward, CPU)
IMF_DECLARE(rms_norm_pair_backward, RmsNormPairBackward, CPU)

}  // namespace imf

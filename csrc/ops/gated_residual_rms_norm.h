#pragma once

#include "ops/operation.h"

namespace imf {

// stream = x + branch gate,  y = stream rstd w with rstd = 1 / sqrt(mean(stream^2) + eps).
struct GatedResidualRmsNormForward {
  IMF_ARGUMENTS(Rows x IMF_IS(X, rows, width); Optional<Rows> x_dot IMF_IS(X, tangents, width);
                Rows branch IMF_IS(B, rows, width); Optional<Rows> branch_dot IMF_IS(B, tangents, width);
                Floats gate IMF_IS(width); Floats weight IMF_IS(width);
                Out<Rows> stream IMF_IS(X, rows, width);
                Optional<Out<Rows>> stream_dot IMF_IS(X, tangents, width); Out<Rows> y IMF_IS(Y, rows, width);
                Optional<Out<Rows>> y_dot IMF_IS(Y, tangents, width); Out<Floats> rstd IMF_IS(rows);
                float eps;)
};

struct GatedResidualRmsNormBackward {
  IMF_ARGUMENTS(Rows stream IMF_IS(X, rows, width); Optional<Rows> dstream IMF_IS(X, rows, width);
                Rows dy IMF_IS(Y, rows, width); Rows branch IMF_IS(B, rows, width); Floats gate IMF_IS(width);
                Floats weight IMF_IS(width); Floats rstd IMF_IS(rows); Out<Rows> dx IMF_IS(X, rows, width);
                Out<Rows> dbranch IMF_IS(B, rows, width);
                Out<Floats> partial;                 // [1, shares, 2, width], scratch
                Out<Floats> sums IMF_IS(2, width);)  // dgate and dweight
};

// The pair's backward: (dx_dot, dx) is the backward of the duals (x, x_dot) and (dy_dot, dy), its value and
// its tangent (imf_kernels/backends/operators.py).
struct GatedResidualRmsNormPairBackward {
  IMF_ARGUMENTS(Rows stream IMF_IS(X, rows, width); Optional<Rows> x_dot IMF_IS(X, tangents, width);
                Optional<Rows> dstream IMF_IS(X, rows, width);
                Optional<Rows> dstream_dot IMF_IS(X, tangents, width); Rows dy IMF_IS(Y, rows, width);
                Rows dy_dot IMF_IS(Y, tangents, width); Rows branch IMF_IS(B, rows, width);
                Optional<Rows> branch_dot IMF_IS(B, tangents, width); Floats gate IMF_IS(width);
                Floats weight IMF_IS(width); Floats rstd IMF_IS(rows); Out<Rows> dx IMF_IS(X, rows, width);
                Optional<Out<Rows>> dx_dot IMF_IS(X, tangents, width);
                Out<Rows> dbranch IMF_IS(B, rows, width);
                Optional<Out<Rows>> dbranch_dot IMF_IS(B, tangents, width);
                Out<Floats> partial;                 // [1, shares, 2, width], scratch
                Out<Floats> sums IMF_IS(2, width);)  // dgate and dweight
};

IMF_DECLARE(gated_residual_rms_norm_forward, GatedResidualRmsNormForward, CPU)
IMF_DECLARE(gated_residual_rms_norm_backward, GatedResidualRmsNormBackward, CPU)
IMF_DECLARE(gated_residual_rms_norm_pair_backward, GatedResidualRmsNormPairBackward, CPU)

}  // namespace imf

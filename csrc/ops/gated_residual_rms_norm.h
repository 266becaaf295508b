#pragma once

#include "ops/operation.h"

namespace imf {

// stream = x + branch gate,  y = stream rstd w with rstd = 1 / sqrt(mean(stream^2) + eps).
struct GatedResidualRmsNormForward {
  IMF_ARGUMENTS(Rows x;                          // [rows, width]
                Optional<Rows> x_dot;            // [tangent rows, width], of the last rows
                Rows branch;                     // as x
                Optional<Rows> branch_dot;       // as x_dot
                Floats gate;                     // [width]
                Floats weight;                   // [width]
                Out<Rows> stream;                // as x
                Optional<Out<Rows>> stream_dot;  // [tangent rows, width]
                Out<Rows> y;                     // as x
                Optional<Out<Rows>> y_dot;       // as stream_dot
                Out<Floats> rstd;                // [rows]
                float eps;)
};

struct GatedResidualRmsNormBackward {
  IMF_ARGUMENTS(Rows stream; Optional<Rows> dstream; Rows dy; Rows branch; Floats gate; Floats weight;  //
                Floats rstd; Out<Rows> dx; Out<Rows> dbranch;
                Out<Floats> partial;  // [1, shares, 2, width], scratch
                Out<Floats> sums;)    // [1, 2, width]: dgate and dweight
};

// The pair's backward: (dx_dot, dx) is the backward of the duals (x, x_dot) and (dy_dot, dy), its value and
// its tangent (imf_kernels/backends/operators.py).
struct GatedResidualRmsNormPairBackward {
  IMF_ARGUMENTS(Rows stream; Optional<Rows> x_dot;  // [rows, width], [tangent rows, width]
                Optional<Rows> dstream;             // as stream
                Optional<Rows> dstream_dot;         // [tangent rows, width]
                Rows dy; Rows dy_dot;               // [rows, width], [tangent rows, width]
                Rows branch; Optional<Rows> branch_dot; Floats gate; Floats weight; Floats rstd;  //
                Out<Rows> dx; Optional<Out<Rows>> dx_dot;            // as stream and x_dot
                Out<Rows> dbranch; Optional<Out<Rows>> dbranch_dot;  // as branch and branch_dot
                Out<Floats> partial;                                 // [1, shares, 2, width], scratch
                Out<Floats> sums;)                                   // [1, 2, width]: dgate and dweight
};

IMF_DECLARE(gated_residual_rms_norm_forward, GatedResidualRmsNormForward, CPU)
IMF_DECLARE(gated_residual_rms_norm_backward, GatedResidualRmsNormBackward, CPU)
IMF_DECLARE(gated_residual_rms_norm_pair_backward, GatedResidualRmsNormPairBackward, CPU)

}  // namespace imf

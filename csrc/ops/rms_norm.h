#pragma once

#include "ops/operation.h"

namespace imf {

// y = x rstd w with rstd = 1 / sqrt(mean(x^2) + eps).
struct RmsNormForward {
  IMF_ARGUMENTS(Rows x;                     // [rows, width]
                Optional<Rows> x_dot;       // [tangent rows, width], of the last rows
                Floats weight;              // [width]
                Out<Rows> y;                // as x
                Optional<Out<Rows>> y_dot;  // as x_dot
                Out<Floats> rstd;           // [rows]
                float eps;)
};

struct RmsNormBackward {
  IMF_ARGUMENTS(Rows x; Rows dy; Floats weight; Floats rstd;  //
                Out<Rows> dx; Out<Floats> partial;            // [1, shares, 1, width], scratch
                Out<Floats> dweight;                          // [1, 1, width]
  )
};

// The pair's backward: (dx_dot, dx) is the backward of the duals (x, x_dot) and (dy_dot, dy), its value and
// its tangent (imf_kernels/backends/operators.py).
struct RmsNormPairBackward {
  IMF_ARGUMENTS(Rows x; Rows x_dot; Rows dy; Rows dy_dot; Floats weight; Floats rstd;  //
                Out<Rows> dx; Out<Rows> dx_dot; Out<Floats> partial;  // [1, shares, 1, width], scratch
                Out<Floats> dweight;                                  // [1, 1, width]
  )
};

IMF_DECLARE(rms_norm_forward, RmsNormForward, CPU)
IMF_DECLARE(rms_norm_backward, RmsNormBackward, CPU)
IMF_DECLARE(rms_norm_pair_backward, RmsNormPairBackward, CPU)

}  // namespace imf

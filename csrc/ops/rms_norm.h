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

IMF_DECLARE(rms_norm_forward, RmsNormForward, CPU)
IMF_DECLARE(rms_norm_backward, RmsNormBackward, CPU)

}  // namespace imf

#pragma once

#include "ops/operation.h"

namespace imf {

// y = x + branch gate, with one row of `gate` per group of rows.
struct GatedResidualForward {
  IMF_ARGUMENTS(Rows x;                      // [rows, width]
                Optional<Rows> x_dot;        // [tangent rows, width], of the last rows
                Rows branch;                 // as x
                Optional<Rows> branch_dot;   // as x_dot
                Floats gate;                 // [groups, width]
                Optional<Floats> gate_dot;   // [tangent groups, width]
                Out<Rows> y;                 // as x
                Optional<Out<Rows>> y_dot;)  // [tangent rows, width]
};

struct GatedResidualBackward {
  IMF_ARGUMENTS(Rows dy; Rows branch; Floats gate;       //
                Out<Rows> dbranch; Out<Floats> partial;  // [groups, shares, 1, width], scratch
                Out<Floats> dgate;)                      // [groups, 1, width]
};

IMF_DECLARE(gated_residual_forward, GatedResidualForward, CPU)
IMF_DECLARE(gated_residual_backward, GatedResidualBackward, CPU)

}  // namespace imf

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

// The pair's backward: (dx_dot, dx) is the backward of the duals (x, x_dot) and (dy_dot, dy), its value and
// its tangent (imf_kernels/backends/operators.py).
struct GatedResidualPairBackward {
  IMF_ARGUMENTS(Rows dy; Rows dy_dot;             // [rows, width], [tangent rows, width]
                Rows branch;                      // [rows, width]
                Optional<Rows> branch_dot;        // as dy_dot
                Floats gate;                      // [groups, width]
                Optional<Floats> gate_dot;        // [tangent groups, width]
                Out<Rows> dbranch;                // as branch
                Optional<Out<Rows>> dbranch_dot;  // as branch_dot
                Out<Floats> partial;              // [groups, shares, 2, width], scratch
                Out<Floats> sums;)                // [groups, 2, width]: dgate, dgate_dot
};

IMF_DECLARE(gated_residual_forward, GatedResidualForward, CPU)
IMF_DECLARE(gated_residual_backward, GatedResidualBackward, CPU)
IMF_DECLARE(gated_residual_pair_backward, GatedResidualPairBackward, CPU)

}  // namespace imf

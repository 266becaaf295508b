#pragma once

#include "ops/operation.h"

namespace imf {

// y = x + branch gate, with one row of `gate` per group of rows.
struct GatedResidualForward {
  IMF_ARGUMENTS(Rows x IMF_IS(X, rows, width); Optional<Rows> x_dot IMF_IS(X, tangents, width);
                Rows branch IMF_IS(B, rows, width); Optional<Rows> branch_dot IMF_IS(B, tangents, width);
                Floats gate IMF_IS(groups, width); Optional<Floats> gate_dot IMF_IS(tangent_groups, width);
                Out<Rows> y IMF_IS(X, rows, width); Optional<Out<Rows>> y_dot IMF_IS(X, tangents, width);)
};

struct GatedResidualBackward {
  IMF_ARGUMENTS(Rows dy IMF_IS(X, rows, width); Rows branch IMF_IS(B, rows, width);
                Floats gate IMF_IS(groups, width); Out<Rows> dbranch IMF_IS(B, rows, width);
                Out<Floats> partial;  // [groups, shares, 1, width], scratch
                Out<Floats> dgate IMF_IS(groups, width);)
};

// The pair's backward: (dx_dot, dx) is the backward of the duals (x, x_dot) and (dy_dot, dy), its value and
// its tangent (imf_kernels/backends/operators.py).
struct GatedResidualPairBackward {
  IMF_ARGUMENTS(Rows dy IMF_IS(X, rows, width); Rows dy_dot IMF_IS(X, tangents, width);
                Rows branch IMF_IS(B, rows, width); Optional<Rows> branch_dot IMF_IS(B, tangents, width);
                Floats gate IMF_IS(groups, width); Optional<Floats> gate_dot IMF_IS(tangent_groups, width);
                Out<Rows> dbranch IMF_IS(B, rows, width);
                Optional<Out<Rows>> dbranch_dot IMF_IS(B, tangents, width);
                Out<Floats> partial;                        // [groups, shares, 2, width], scratch
                Out<Floats> sums IMF_IS(2 groups, width);)  // dgate, dgate_dot of each group
};

IMF_DECLARE(gated_residual_forward, GatedResidualForward, CPU)
IMF_DECLARE(gated_residual_backward, GatedResidualBackward, CPU)
IMF_DECLARE(gated_residual_pair_backward, GatedResidualPairBackward, CPU)

}  // namespace imf

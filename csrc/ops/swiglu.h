#pragma once

#include "ops/operation.h"

namespace imf {

// y = silu(gate) up with x = [gate | up].
struct SwigluForward {
  IMF_ARGUMENTS(Rows x;                      // [rows, 2 width]
                Optional<Rows> x_dot;        // [tangent rows, 2 width], of the last rows
                Out<Rows> y;                 // [rows, width]
                Optional<Out<Rows>> y_dot;)  // [tangent rows, width]
};

struct SwigluBackward {
  IMF_ARGUMENTS(Rows x; Rows dy; Out<Rows> dx;)
};

// The pair's backward: (dx_dot, dx) is the backward of the duals (x, x_dot) and (dy_dot, dy), its value and
// its tangent (imf_kernels/backends/operators.py).
struct SwigluPairBackward {
  IMF_ARGUMENTS(Rows x; Rows x_dot; Rows dy; Rows dy_dot; Out<Rows> dx; Out<Rows> dx_dot;)
};

IMF_DECLARE(swiglu_forward, SwigluForward, CPU)
IMF_DECLARE(swiglu_backward, SwigluBackward, CPU)
IMF_DECLARE(swiglu_pair_backward, SwigluPairBackward, CPU)

}  // namespace imf

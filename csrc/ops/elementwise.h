#pragma once

#include "ops/operation.h"

namespace imf {

// y = f(x), elementwise.
struct ElementwiseForward {
  IMF_ARGUMENTS(Rows x;                      // any shape
                Optional<Rows> x_dot;        // of the last elements
                Out<Rows> y;                 // as x
                Optional<Out<Rows>> y_dot;)  // as x_dot
};

// dx = f'(x) dy.
struct ElementwiseBackward {
  IMF_ARGUMENTS(Rows x; Rows dy; Out<Rows> dx;)
};

// The pair's backward: (dx_dot, dx) is the backward of the duals (x, x_dot) and (dy_dot, dy), its value and
// its tangent (imf_kernels/backends/operators.py).
struct ElementwisePairBackward {
  IMF_ARGUMENTS(Rows x; Rows x_dot;    // of the last elements
                Rows dy; Rows dy_dot;  // as x, x_dot
                Out<Rows> dx; Out<Rows> dx_dot;)
};

IMF_DECLARE(silu_forward, ElementwiseForward, CPU)
IMF_DECLARE(silu_backward, ElementwiseBackward, CPU)
IMF_DECLARE(silu_pair_backward, ElementwisePairBackward, CPU)
IMF_DECLARE(gelu_forward, ElementwiseForward, CPU)
IMF_DECLARE(gelu_backward, ElementwiseBackward, CPU)
IMF_DECLARE(gelu_pair_backward, ElementwisePairBackward, CPU)
IMF_DECLARE(gelu_tanh_forward, ElementwiseForward, CPU)
IMF_DECLARE(gelu_tanh_backward, ElementwiseBackward, CPU)
IMF_DECLARE(gelu_tanh_pair_backward, ElementwisePairBackward, CPU)

}  // namespace imf

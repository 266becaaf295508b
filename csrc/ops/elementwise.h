#pragma once

#include "ops/operation.h"

namespace imf {

// y = f(x), elementwise.
struct ElementwiseForward {
  IMF_ARGUMENTS(Rows x IMF_IS(T, samples, ...); Optional<Rows> x_dot IMF_IS(T, tangents, ...);
                Out<Rows> y IMF_IS(T, samples, ...); Optional<Out<Rows>> y_dot IMF_IS(T, tangents, ...);)
};

// dx = f'(x) dy.
struct ElementwiseBackward {
  IMF_ARGUMENTS(Rows x IMF_IS(T, samples, ...); Rows dy IMF_IS(T, samples, ...);
                Out<Rows> dx IMF_IS(T, samples, ...);)
};

// The pair's backward: (dx_dot, dx) is the backward of the duals (x, x_dot) and (dy_dot, dy), its value and
// its tangent (imf_kernels/backends/operators.py).
struct ElementwisePairBackward {
  IMF_ARGUMENTS(Rows x IMF_IS(T, samples, ...); Rows x_dot IMF_IS(T, tangents, ...);
                Rows dy IMF_IS(T, samples, ...); Rows dy_dot IMF_IS(T, tangents, ...);
                Out<Rows> dx IMF_IS(T, samples, ...); Out<Rows> dx_dot IMF_IS(T, tangents, ...);)
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

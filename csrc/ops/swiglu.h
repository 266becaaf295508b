#pragma once

#include "ops/operation.h"

namespace imf {

// y = silu(gate) up with x = [gate | up].
struct SwigluForward {
  IMF_ARGUMENTS(Rows x IMF_IS(T, rows, 2 width); Optional<Rows> x_dot IMF_IS(T, tangents, 2 width);
                Out<Rows> y IMF_IS(T, rows, width); Optional<Out<Rows>> y_dot IMF_IS(T, tangents, width);)
};

struct SwigluBackward {
  IMF_ARGUMENTS(Rows x IMF_IS(T, rows, 2 width); Rows dy IMF_IS(T, rows, width);
                Out<Rows> dx IMF_IS(T, rows, 2 width);)
};

// The pair's backward: (dx_dot, dx) is the backward of the duals (x, x_dot) and (dy_dot, dy), its value and
// its tangent (imf_kernels/backends/operators.py).
struct SwigluPairBackward {
  IMF_ARGUMENTS(Rows x IMF_IS(T, rows, 2 width); Rows x_dot IMF_IS(T, tangents, 2 width);
                Rows dy IMF_IS(T, rows, width); Rows dy_dot IMF_IS(T, tangents, width);
                Out<Rows> dx IMF_IS(T, rows, 2 width); Out<Rows> dx_dot IMF_IS(T, tangents, 2 width);)
};

IMF_DECLARE(swiglu_forward, SwigluForward, CPU)
IMF_DECLARE(swiglu_backward, SwigluBackward, CPU)
IMF_DECLARE(swiglu_pair_backward, SwigluPairBackward, CPU)

}  // namespace imf

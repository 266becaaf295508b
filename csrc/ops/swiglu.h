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

IMF_DECLARE(swiglu_forward, SwigluForward, CPU)
IMF_DECLARE(swiglu_backward, SwigluBackward, CPU)

}  // namespace imf

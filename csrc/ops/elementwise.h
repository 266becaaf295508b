#pragma once

#include "ops/operation.h"

namespace imf {

// y = f(x), elementwise.
struct ElementwiseForward {
  IMF_ARGUMENTS(Elements x;                      // any shape
                Optional<Elements> x_dot;        // of the last elements
                Out<Elements> y;                 // as x
                Optional<Out<Elements>> y_dot;)  // as x_dot
};

// dx = f'(x) dy.
struct ElementwiseBackward {
  IMF_ARGUMENTS(Elements x; Elements dy; Out<Elements> dx;)
};

IMF_DECLARE(silu_forward, ElementwiseForward, CPU)
IMF_DECLARE(silu_backward, ElementwiseBackward, CPU)
IMF_DECLARE(gelu_forward, ElementwiseForward, CPU)
IMF_DECLARE(gelu_backward, ElementwiseBackward, CPU)
IMF_DECLARE(gelu_tanh_forward, ElementwiseForward, CPU)
IMF_DECLARE(gelu_tanh_backward, ElementwiseBackward, CPU)

}  // namespace imf

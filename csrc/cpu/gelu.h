#pragma once

#include "cpu/elementwise.h"

namespace imf {

// y = x s(x), with s the normal distribution or its approximation by tanh.
IMF_DECLARE_PER_ISA(void gelu_forward(const ElementwiseForward&, bool by_tanh);
                    void gelu_backward(const ElementwiseBackward&, bool by_tanh))

}  // namespace imf

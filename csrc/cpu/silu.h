#pragma once

#include "cpu/elementwise.h"

namespace imf {

// y = x / (1 + e^-x).
IMF_DECLARE_PER_ISA(void silu_forward(const ElementwiseForward&);
                    void silu_backward(const ElementwiseBackward&))

}  // namespace imf

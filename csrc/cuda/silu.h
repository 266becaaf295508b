#pragma once

#include "cuda/elementwise.h"

namespace imf::cuda {

void silu_forward(const ElementwiseForward&);
void silu_backward(const ElementwiseBackward&);

}  // namespace imf::cuda

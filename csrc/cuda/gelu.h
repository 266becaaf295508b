#pragma once

#include "cuda/elementwise.h"

namespace imf::cuda {

// y = x s(x), with s the normal distribution or its approximation by tanh.
void gelu_forward(const ElementwiseForward&, bool by_tanh);
void gelu_backward(const ElementwiseBackward&, bool by_tanh);

}  // namespace imf::cuda

#pragma once

#include "common/types.h"
#include "cpu/isa.h"

namespace imf {

// y = x s(x), element by element, with s the normal distribution or its approximation by tanh.
struct GeluForward {
  DType type;
  const void* x;      // [elements]
  const void* x_dot;  // [tangent_elements], belonging to the last ones
  void* y;
  void* y_dot;
  index_t elements, tangent_elements;
  bool by_tanh;
  int threads;
};

struct GeluBackward {
  DType type;
  const void* x;   // [elements]
  const void* dy;  // [elements]
  void* dx;        // [elements]
  index_t elements;
  bool by_tanh;
  int threads;
};

IMF_DECLARE_PER_ISA(void gelu_forward(const GeluForward&); void gelu_backward(const GeluBackward&))

}  // namespace imf

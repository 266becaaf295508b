#pragma once

#include "common/types.h"
#include "cpu/isa.h"

namespace imf {

// y = x / (1 + e^-x), element by element.
struct SiluForward {
  DType type;
  const void* x;      // [elements]
  const void* x_dot;  // [tangent_elements], belonging to the last ones
  void* y;
  void* y_dot;
  index_t elements, tangent_elements;
  int threads;
};

struct SiluBackward {
  DType type;
  const void* x;   // [elements]
  const void* dy;  // [elements]
  void* dx;        // [elements]
  index_t elements;
  int threads;
};

IMF_DECLARE_PER_ISA(void silu_forward(const SiluForward&); void silu_backward(const SiluBackward&))

}  // namespace imf

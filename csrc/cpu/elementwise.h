#pragma once

#include "common/types.h"
#include "cpu/isa.h"

namespace imf {

// What operations that work element by element take: y = f(x).
struct ElementwiseForward {
  DType type;
  const void* x;      // [elements]
  const void* x_dot;  // [tangent_elements], belonging to the last ones
  void* y;
  void* y_dot;
  index_t elements, tangent_elements;
  int threads;
};

struct ElementwiseBackward {
  DType type;
  const void* x;   // [elements]
  const void* dy;  // [elements]
  void* dx;        // [elements]
  index_t elements;
  int threads;
};

}  // namespace imf

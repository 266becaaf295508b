#pragma once

#include "cuda/runtime.h"

namespace imf::cuda {

// What operations that work element by element take: y = f(x).
struct ElementwiseForward {
  DType type;
  const void* x;      // [elements]
  const void* x_dot;  // [tangent_elements], belonging to the last ones
  void* y;
  void* y_dot;
  index_t elements, tangent_elements;
  Place place;
};

struct ElementwiseBackward {
  DType type;
  const void* x;   // [elements]
  const void* dy;  // [elements]
  void* dx;        // [elements]
  index_t elements;
  Place place;
};

}  // namespace imf::cuda

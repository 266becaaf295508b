#pragma once

#include "cuda/runtime.h"

namespace imf::cuda {

// y = silu(gate) up over rows of `width` elements; x has gate and up side by side.
struct SwigluForward {
  DType type;
  const void* x;      // [rows, 2 width]; row i begins at x + i x_stride
  const void* x_dot;  // [tangent_rows, 2 width], belonging to the last rows; null where there are none
  void* y;            // [rows, width], contiguous
  void* y_dot;        // [tangent_rows, width], contiguous
  index_t rows, tangent_rows, width, x_stride, x_dot_stride;
  Place place;
};

struct SwigluBackward {
  DType type;
  const void* x;
  const void* dy;  // [rows, width]; row i begins at dy + i dy_stride
  void* dx;        // [rows, 2 width], contiguous
  index_t rows, width, x_stride, dy_stride;
  Place place;
};

void swiglu_forward(const SwigluForward&);
void swiglu_backward(const SwigluBackward&);

}  // namespace imf::cuda

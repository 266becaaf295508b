#pragma once

#include "common/types.h"
#include "cpu/isa.h"

namespace imf {

// y = silu(gate) up, over rows that hold gate and up side by side.
struct SwigluForward {
  DType type;
  const void* x;      // [rows, 2 width]: gate, then up; row i begins at x + i x_stride
  const void* x_dot;  // [tangent_rows, 2 width], belonging to the last rows
  void* y;            // [rows, width], contiguous
  void* y_dot;        // [tangent_rows, width], contiguous
  index_t rows, tangent_rows, width, x_stride, x_dot_stride;
  int threads;
};

struct SwigluBackward {
  DType type;
  const void* x;   // [rows, 2 width], as in forward
  const void* dy;  // [rows, width]; row i begins at dy + i dy_stride
  void* dx;        // [rows, 2 width], contiguous
  index_t rows, width, x_stride, dy_stride;
  int threads;
};

IMF_DECLARE_PER_ISA(void swiglu_forward(const SwigluForward&); void swiglu_backward(const SwigluBackward&))

}  // namespace imf

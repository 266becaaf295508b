#pragma once

#include "common/types.h"
#include "cpu/isa.h"

namespace imf {

// y = x + branch gate, with one gate a channel.
struct GatedResidualForward {
  DType x_type, branch_type;
  const void* x;           // [rows, width]; row i begins at x + i x_stride
  const void* x_dot;       // [tangent_rows, width], belonging to the last rows; null: zero
  const void* branch;      // [rows, width]
  const void* branch_dot;  // [tangent_rows, width]; null: zero
  const float* gate;       // [width]
  void* y;                 // [rows, width], contiguous, of x's type
  void* y_dot;             // [tangent_rows, width], contiguous
  index_t rows, tangent_rows, width, x_stride, x_dot_stride, branch_stride, branch_dot_stride;
  int threads;
};

struct GatedResidualBackward {
  DType x_type, branch_type;
  const void* dy;      // [rows, width]; row i begins at dy + i dy_stride; also the gradient of x
  const void* branch;  // [rows, width]
  const float* gate;   // [width]
  void* dbranch;       // [rows, width], contiguous
  float* dgate;        // [threads, width] scratch; the sum is left in the first row
  index_t rows, width, dy_stride, branch_stride;
  int threads;
};

IMF_DECLARE_PER_ISA(void gated_residual_forward(const GatedResidualForward&);
                    void gated_residual_backward(const GatedResidualBackward&))

}  // namespace imf

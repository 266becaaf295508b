#pragma once

#include "common/types.h"
#include "cpu/isa.h"

namespace imf {

// y = x + branch gate, with one gate a channel. The rows of a group, `length` one after another, have a row
// of gates in common.
struct GatedResidualForward {
  DType x_type, branch_type;
  const void* x;           // [rows, width]; row i begins at x + i x_stride
  const void* x_dot;       // [tangent_rows, width], belonging to the last rows; null: zero
  const void* branch;      // [rows, width]
  const void* branch_dot;  // [tangent_rows, width]; null: zero
  const float* gate;       // [rows / length, width]
  const float* gate_dot;   // [tangent_rows / length, width]; null: zero
  void* y;                 // [rows, width], contiguous, of x's type
  void* y_dot;             // [tangent_rows, width], contiguous
  index_t rows, tangent_rows, length, width;
  index_t x_stride, x_dot_stride, branch_stride, branch_dot_stride;
  int threads;
};

struct GatedResidualBackward {
  DType x_type, branch_type;
  const void* dy;      // [groups * length, width]; row i begins at dy + i dy_stride; also the gradient of x
  const void* branch;  // [groups * length, width]
  const float* gate;   // [groups, width]
  void* dbranch;       // [groups * length, width], contiguous
  float* dgate;        // [groups, width]
  index_t groups, length, width, dy_stride, branch_stride;
  int threads;
};

IMF_DECLARE_PER_ISA(void gated_residual_forward(const GatedResidualForward&);
                    void gated_residual_backward(const GatedResidualBackward&))

}  // namespace imf

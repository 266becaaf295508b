#pragma once

#include "common/types.h"
#include "cpu/isa.h"

namespace imf {

// y = n (one + scale) + shift over rows of `width` elements, with n = (x - mean - correction) rstd,
// rstd = 1 / sqrt(variance + eps); the correction is what the mean, being rounded, lacks. The rows of a
// group, `length` one after another, have a row of scale and one of shift in common.
struct LayerNormForward {
  DType x_type, y_type;
  const void* x;           // [rows, width]; row i begins at x + i x_stride
  const void* x_dot;       // [tangent_rows, width], belonging to the last rows; null: zero
  const float* scale;      // [rows / length, width]; null: zero
  const float* scale_dot;  // [tangent_rows / length, width]; null: zero
  const float* shift;      // as scale
  const float* shift_dot;  // as scale_dot
  void* y;                 // [rows, width], contiguous
  void* y_dot;             // [tangent_rows, width], contiguous
  float* statistics;       // [rows, 3]: mean, correction, rstd
  index_t rows, tangent_rows, length, width, x_stride, x_dot_stride;
  float one, eps;
  int threads;
};

struct LayerNormBackward {
  DType x_type, y_type;
  const void* x;            // [groups * length, width], as in forward
  const void* dy;           // [groups * length, width]; row i begins at dy + i dy_stride
  const float* scale;       // [groups, width]; null: zero
  const float* statistics;  // [groups * length, 3]
  void* dx;                 // [groups * length, width], contiguous, of x's type
  float* sums;              // [groups, 2, width]: dscale, dshift
  index_t groups, length, width, x_stride, dy_stride;
  float one;
  int threads;
};

IMF_DECLARE_PER_ISA(void layer_norm_forward(const LayerNormForward&);
                    void layer_norm_backward(const LayerNormBackward&))

}  // namespace imf

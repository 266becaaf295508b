#pragma once

#include "common/types.h"
#include "cpu/isa.h"

namespace imf {

// y = x rstd w, rstd = 1 / sqrt(mean(x^2) + eps), over rows of `width` elements.
struct RmsNormForward {
  DType x_type, y_type;
  const void* x;        // [rows, width]; row i begins at x + i x_stride
  const void* x_dot;    // [tangent_rows, width], belonging to the last rows; null where there are none
  const float* weight;  // [width]
  void* y;              // [rows, width], contiguous
  void* y_dot;          // [tangent_rows, width], contiguous
  float* rstd;          // [rows]
  index_t rows, tangent_rows, width, x_stride, x_dot_stride;
  float eps;
  int threads;
};

struct RmsNormBackward {
  DType x_type, y_type;
  const void* x;        // [rows, width], as in forward
  const void* dy;       // [rows, width]; row i begins at dy + i dy_stride
  const float* weight;  // [width]
  const float* rstd;    // [rows]
  void* dx;             // [rows, width], contiguous, of x's type
  float* dweight;       // [width]
  index_t rows, width, x_stride, dy_stride;
  int threads;
};

IMF_DECLARE_PER_ISA(void rms_norm_forward(const RmsNormForward&);
                    void rms_norm_backward(const RmsNormBackward&))

}  // namespace imf

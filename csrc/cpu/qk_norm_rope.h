#pragma once

#include "common/types.h"
#include "cpu/isa.h"

namespace imf {

// y = rotate(rms_norm(x) w) for queries or keys: pairs (2i, 2i+1) of position l turned by the angle
// whose cosine and sine are cos[l, i] and sin[l, i].
struct QkNormRopeForward {
  DType type;
  const void* x;        // [batch, heads, length, width], strides below, rows contiguous
  const void* x_dot;    // [tangent_batch, heads, length, width], of the last samples
  const float* weight;  // [width]
  const float* cos;     // [length, width / 2]
  const float* sin;     // [length, width / 2]
  void* y;              // [batch, length, heads, width], contiguous
  void* y_dot;          // [tangent_batch, length, heads, width], contiguous
  float* rstd;          // [batch, length, heads]
  index_t batch, tangent_batch, heads, length, width;
  index_t x_stride[3], x_dot_stride[3];  // of batch, head, position
  float eps;
  int threads;
};

struct QkNormRopeBackward {
  DType type;
  const void* x;   // as in forward
  const void* dy;  // [batch, heads, length, width]
  const float* weight;
  const float* cos;
  const float* sin;
  const float* rstd;
  void* dx;        // [batch, length, heads, width], contiguous
  float* dweight;  // [width]
  index_t batch, heads, length, width;
  index_t x_stride[3], dy_stride[3];
  int threads;
};

IMF_DECLARE_PER_ISA(void qk_norm_rope_forward(const QkNormRopeForward&);
                    void qk_norm_rope_backward(const QkNormRopeBackward&))

}  // namespace imf

// Tensor views for kernels; Python keeps the memory during a call. Sizes and strides count elements.
#pragma once

#include "types.h"

namespace imf {

// Any tensor from Python; the views below are made from it.
struct Tensor {
  void* data;  // null where there are no elements
  DType dtype;
  int device;  // index of the GPU, or cpu_device
  int dim;
  const index_t *sizes, *strides;
};

constexpr int cpu_device = -1;

// [..., width] with contiguous rows at one stride.
struct Rows {
  void* data;
  DType dtype;
  index_t rows, width, stride;
};

// Contiguous, of any shape.
struct Elements {
  void* data;
  DType dtype;
  index_t count;
};

// [..., width] in float32, contiguous.
struct Floats {
  float* data;
  index_t rows, width;
};

// [batch, heads, length, width], whose rows are contiguous.
struct Heads {
  void* data;
  DType dtype;
  index_t batch, heads, length, width;
  index_t stride[3];  // of batch, head, position
};

// [samples, channels, ...], contiguous, with channels last in memory, or both.
struct Planes {
  void* data;
  DType dtype;
  index_t samples, channels, positions;
  bool contiguous, channels_last;
};

// [batch, heads, queries, keys] of any strides.
struct Mask {
  void* data;
  DType dtype;
  index_t stride[4];
};

// A view that may be absent: data is null, sizes and strides are 0.
template <typename View>
struct Optional : View {};

// A view that the kernel writes.
template <typename View>
struct Out : View {};

// Device, stream and threads of a call.
struct Place {
  int device;
  void* stream;  // cudaStream_t
  int threads;   // of the CPU
};

}  // namespace imf

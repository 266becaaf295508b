// Conversion of tensors into the views of tensor.h; throws with the argument's name if the layout is wrong.
#pragma once

#include <stdexcept>
#include <string>

#include "tensor.h"

namespace imf {

inline std::string list_of(const index_t* numbers, int count) {
  std::string text = "[";
  for (int i = 0; i < count; ++i) text += (i ? ", " : "") + std::to_string(numbers[i]);
  return text + "]";
}

[[noreturn]] inline void refuse(const Tensor& x, const std::string& name, const char* wanted) {
  throw std::invalid_argument(name + " must be " + wanted + ", got " + list_of(x.sizes, x.dim) +
                              " with strides " + list_of(x.strides, x.dim));
}

inline index_t count_of(const Tensor& x, int first, int end) {
  index_t count = 1;
  for (int i = first; i < end; ++i) count *= x.sizes[i];
  return count;
}

// Whether the elements lie one after the other, with the second dimension innermost if channels are last.
inline bool is_contiguous(const Tensor& x, bool channels_last = false) {
  if (count_of(x, 0, x.dim) == 0) return true;
  index_t expected = 1;
  for (int i = x.dim; i-- > 0;) {
    const int d = !channels_last || i == 0 ? i : i == x.dim - 1 ? 1 : i + 1;
    if (x.sizes[d] != 1 && x.strides[d] != expected) return false;
    expected *= x.sizes[d];
  }
  return true;
}

// Returns the stride between rows; negative if there is no single one.
inline index_t row_stride(const Tensor& x) {
  if (x.dim == 0) return 1;
  const index_t width = x.sizes[x.dim - 1];
  if (count_of(x, 0, x.dim) == 0) return width;
  if (width > 1 && x.strides[x.dim - 1] != 1) return -1;
  index_t stride = width, expected = -1;
  for (int i = x.dim - 1; i-- > 0;) {
    if (x.sizes[i] == 1) continue;
    if (expected < 0) stride = expected = x.strides[i];
    if (x.strides[i] != expected) return -1;
    expected *= x.sizes[i];
  }
  return stride;
}

inline void view(const Tensor& x, const std::string& name, Rows& rows) {
  const index_t stride = row_stride(x);
  if (stride < 0) refuse(x, name, "contiguous rows at one distance");
  rows = {x.data, x.dtype, count_of(x, 0, x.dim - 1), x.dim ? x.sizes[x.dim - 1] : 1, stride};
}

inline void view(const Tensor& x, const std::string& name, Elements& elements) {
  if (!is_contiguous(x)) refuse(x, name, "contiguous");
  elements = {x.data, x.dtype, count_of(x, 0, x.dim)};
}

inline void view(const Tensor& x, const std::string& name, Floats& floats) {
  if (x.dtype != DType::float32) throw std::invalid_argument(name + " must be float32");
  if (x.dim == 0 || !is_contiguous(x)) refuse(x, name, "contiguous");
  floats = {static_cast<float*>(x.data), count_of(x, 0, x.dim - 1), x.sizes[x.dim - 1]};
}

inline void view(const Tensor& x, const std::string& name, Heads& heads) {
  if (x.dim != 4 || (x.sizes[3] > 1 && x.strides[3] != 1 && count_of(x, 0, 4))) {
    refuse(x, name, "[batch, heads, length, width] with contiguous rows");
  }
  heads = {x.data, x.dtype, x.sizes[0], x.sizes[1], x.sizes[2], x.sizes[3], {}};
  // A tensor without elements has no memory: every address in it must stay null.
  for (int i = 0; i < 3; ++i) heads.stride[i] = x.data ? x.strides[i] : 0;
}

inline void view(const Tensor& x, const std::string& name, Planes& planes) {
  const bool first = x.dim > 1 && is_contiguous(x), last = x.dim > 1 && is_contiguous(x, true);
  if (!first && !last) refuse(x, name, "[samples, channels, ...], contiguous or with channels last");
  planes = {x.data, x.dtype, x.sizes[0], x.sizes[1], count_of(x, 2, x.dim), first, last};
}

inline void view(const Tensor& x, const std::string& name, Mask& mask) {
  if (x.dim != 4) refuse(x, name, "[batch, heads, queries, keys]");
  mask = {x.data, x.dtype, {x.strides[0], x.strides[1], x.strides[2], x.strides[3]}};
}

}  // namespace imf

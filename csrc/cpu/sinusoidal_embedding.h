#pragma once

#include "common/types.h"
#include "cpu/isa.h"

namespace imf {

// y = [cos(t f_0) ... cos(t f_{half-1}), sin(t f_0) ... sin(t f_{half-1})].
struct SinusoidalEmbeddingForward {
  DType type;                // of t, y and their tangents
  const void* t;             // [rows]
  const void* t_dot;         // [tangent_rows], belonging to the last rows
  const float* frequencies;  // [half]
  void* y;                   // [rows, 2 half]
  void* y_dot;               // [tangent_rows, 2 half]
  index_t rows, tangent_rows, half;
  int threads;
};

IMF_DECLARE_PER_ISA(void sinusoidal_embedding_forward(const SinusoidalEmbeddingForward&))

}  // namespace imf

#pragma once

#include "common/rows.h"
#include "ops/operation.h"

namespace imf {

// y = rotate(rms_norm(x) w) of queries or keys: pair (2i, 2i+1) of position l is rotated by the angle with
// cosine cos[l, i] and sine sin[l, i].
struct QkNormRopeForward {
  IMF_ARGUMENTS(Heads x;                     // [batch, heads, length, width]
                Optional<Heads> x_dot;       // [tangent batch, ...], of the last samples
                Floats weight;               // [width]
                Floats cos;                  // [length, width / 2]
                Floats sin;                  // as cos
                Out<Heads> y;                // as x; in memory [batch, length, heads, width]
                Optional<Out<Heads>> y_dot;  // as x_dot; in memory as y
                Out<Floats> rstd;            // [batch length heads]
                float eps;)
};

struct QkNormRopeBackward {
  IMF_ARGUMENTS(Heads x; Heads dy; Floats weight; Floats cos; Floats sin; Floats rstd;  //
                Out<Heads> dx;         // in memory [batch, length, heads, width]
                Out<Floats> partial;   // [1, shares, 1, width], scratch
                Out<Floats> dweight;)  // [1, 1, width]
};

IMF_DECLARE(qk_norm_rope_forward, QkNormRopeForward, CUDA)
IMF_DECLARE(qk_norm_rope_backward, QkNormRopeBackward, CUDA)

// Row (b, l, h), counted in this order, the memory order of projections.
struct RowPosition {
  index_t b, l, h;
};

IMF_HOST_DEVICE RowPosition position_of(index_t row, const Heads& x) {
  const index_t position = quotient(row, x.heads), b = quotient(position, x.length);
  return {b, position - b * x.length, row - position * x.heads};
}

// Returns the address of a row in x, which begins with sample `first`.
template <typename T>
IMF_HOST_DEVICE T* row_of(const Heads& x, RowPosition at, index_t first = 0) {
  return static_cast<T*>(x.data) + (at.b - first) * x.stride[0] + at.h * x.stride[1] + at.l * x.stride[2];
}

// Returns whether x lies in memory as [batch, length, heads, width].
inline bool positions_first(const Heads& x) {
  return x.batch * x.heads * x.length * x.width == 0 ||
         ((x.heads == 1 || x.stride[1] == x.width) && (x.length == 1 || x.stride[2] == x.heads * x.width) &&
          (x.batch == 1 || x.stride[0] == x.length * x.heads * x.width));
}

}  // namespace imf

// Per-head RMSNorm and RoPE with tangent, and the primal backward. Formulas: imf_kernels/ops/qk_norm_rope.py.
#include "ops/qk_norm_rope.h"

#include <stdexcept>

#include "cpu/dtypes.h"
#include "cpu/parallel.h"
#include "cpu/rows.h"

namespace imf::IMF_ISA {
namespace {

// The rotation of one position: y = c n + s swap(n), where c holds each cosine twice and s each sine twice,
// first negated. Reused for all heads of the position.
struct Rotation {
  float *c, *s;

  Rotation(Scratch& scratch, index_t width) : c(scratch.take<float>(width)), s(scratch.take<float>(width)) {}
  void set(const float* cos, const float* sin, index_t width) {
    alignas(64) static constexpr float signs[16] = {-1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1};
    for_each_vec(width, [&](index_t j, int lanes) {
      store_lanes(c + j, duplicate_lower(load(cos + j / 2, lanes / 2)), lanes);
      store_lanes(s + j, duplicate_lower(load(sin + j / 2, lanes / 2)) * load(signs), lanes);
    });
  }
  Vec apply(Vec n, index_t j, int lanes) const {
    return fma(load_lanes(c + j, lanes), n, load_lanes(s + j, lanes) * swap_pairs(n));
  }
  Dual<Vec> apply(Dual<Vec> n, index_t j, int lanes) const {
    return {apply(n.primal, j, lanes), apply(n.tangent, j, lanes)};
  }
  Vec transposed(Vec dy, index_t j, int lanes) const {
    return fma(load_lanes(c + j, lanes), dy, Vec(0.0f) - load_lanes(s + j, lanes) * swap_pairs(dy));
  }
};

// Row (b, l, h), counted in this order, the memory order of projections.
struct RowPosition {
  index_t b = 0, l = -1, h = 0;
  RowPosition() = default;
  RowPosition(index_t row, index_t heads, index_t length)
      : b(row / (heads * length)), l(row / heads % length), h(row % heads) {}
  void next(index_t heads, index_t length) {
    if (++h < heads) return;
    h = 0;
    if (++l < length) return;
    l = 0;
    ++b;
  }
  // Offset of the row in a tensor that begins with sample `first`.
  index_t offset(const index_t (&stride)[3], index_t first = 0) const {
    return (b - first) * stride[0] + h * stride[1] + l * stride[2];
  }
};

template <typename T>
void forward(const QkNormRopeForward& a) {
  const T* x = static_cast<const T*>(a.x.data);
  const T* x_dot = static_cast<const T*>(a.x_dot.data);
  T* y = static_cast<T*>(a.y.data);
  T* y_dot = static_cast<T*>(a.y_dot.data);
  const index_t heads = a.x.heads, length = a.x.length, width = a.x.width;
  const index_t rows = a.x.batch * heads * length, tangent_rows = a.x_dot.batch * heads * length;
  const index_t first_tangent = rows - tangent_rows;
  const double share_of_mean = 1.0 / static_cast<double>(width);
  const int team = team_size(a.place.threads, (rows + tangent_rows) * width, rows);

  if (rows == 0) return;  // RowPosition divides by the numbers of heads and positions
  on_each_thread(team, [&](int thread) {
    const Range share = share_of_rows(rows, tangent_rows, thread, team);
    Scratch scratch(2 * width);
    Rotation rotation(scratch, width);
    RowPosition at(share.begin, heads, length);
    for (index_t row = share.begin; row < share.end; ++row, at.next(heads, length)) {
      if (row == share.begin || at.h == 0) {
        rotation.set(a.cos.data + at.l * (width / 2), a.sin.data + at.l * (width / 2), width);
      }
      const T* xi = x + at.offset(a.x.stride);
      T* yi = y + row * width;
      if (row < first_tangent) {
        const float rstd = inverse_rms(sum_of_squares(xi, width), share_of_mean, a.eps);
        a.rstd.data[row] = rstd;
        for_each_vec(width, [&](index_t j, int lanes) {
          prefetch(xi + j + a.x.stride[2]);
          const Vec n = load_lanes(xi + j, lanes) * Vec(rstd) * load_lanes(a.weight.data + j, lanes);
          store_lanes(yi + j, rotation.apply(n, j, lanes), lanes);
        });
        continue;
      }
      const T* ti = x_dot + at.offset(a.x_dot.stride, a.x.batch - a.x_dot.batch);
      T* y_dot_i = y_dot + (row - first_tangent) * width;
      const Dual<float> rstd = inverse_rms(sum_of_squares(xi, ti, width), share_of_mean, a.eps);
      a.rstd.data[row] = rstd.primal;
      const Dual<Vec> r{Vec(rstd.primal), Vec(rstd.tangent)};
      for_each_vec(width, [&](index_t j, int lanes) {
        prefetch(xi + j + a.x.stride[2]);
        prefetch(ti + j + a.x_dot.stride[2]);
        const Dual<Vec> n = load_dual(xi + j, ti + j, lanes) * r * load_lanes(a.weight.data + j, lanes);
        store_dual(yi + j, y_dot_i + j, rotation.apply(n, j, lanes), lanes);
      });
    }
  });
}

// dy rotated back is the cotangent of rms_norm's output; the rest is as in rms_norm.cpp.
template <typename T>
void backward(const QkNormRopeBackward& a) {
  const T* x = static_cast<const T*>(a.x.data);
  const T* dy = static_cast<const T*>(a.dy.data);
  T* dx = static_cast<T*>(a.dx.data);
  const index_t heads = a.x.heads, length = a.x.length, width = a.x.width;
  const index_t rows = a.x.batch * heads * length;
  const float scale = 1.0f / static_cast<float>(width);
  const int team = team_size(a.place.threads, 2 * rows * width, rows);

  GroupSums sums(1, rows, width, a.partial, a.dweight);
  on_each_thread(team, [&](int thread) {
    Scratch scratch(3 * width);
    Rotation rotation(scratch, width);
    float* g = scratch.take<float>(width);  // dy rotated back, times w
    RowPosition at;
    index_t row_before = -2;
    sums.add(share_of(sums.blocks(), thread, team), [&](index_t row, float* dweight) {
      const index_t position_before = at.l;
      if (row == row_before + 1) {
        at.next(heads, length);
      } else {
        at = RowPosition(row, heads, length);
      }
      row_before = row;
      if (at.l != position_before) {
        rotation.set(a.cos.data + at.l * (width / 2), a.sin.data + at.l * (width / 2), width);
      }
      const T* xi = x + at.offset(a.x.stride);
      const T* dyi = dy + at.offset(a.dy.stride);
      T* dxi = dx + row * width;
      const Vec rstd(a.rstd.data[row]);
      const Vec dot = sum_over_row<Vec>(width, [&](index_t j, int lanes, Vec& sum) {
        prefetch(xi + j + a.x.stride[2]);
        const Vec dn = rotation.transposed(load_lanes(dyi + j, lanes), j, lanes);
        const Vec dyn = dn * (load_lanes(xi + j, lanes) * rstd);
        const Vec w = load_lanes(a.weight.data + j, lanes);
        store_lanes(dweight + j, load_lanes(dweight + j, lanes) + dyn, lanes);
        store_lanes(g + j, dn * w, lanes);
        sum = fma(dyn, w, sum);
      });
      const Vec mean(reduce_add(dot) * scale);
      for_each_vec(width, [&](index_t j, int lanes) {
        const Vec n = load_lanes(xi + j, lanes) * rstd;
        store_lanes(dxi + j, rstd * (load_lanes(g + j, lanes) - n * mean), lanes);
      });
    });
  });
  sums.finish(team);
}

}  // namespace

void qk_norm_rope_forward(const QkNormRopeForward& a) {
  if (!positions_first(a.y) || !positions_first(a.y_dot)) {
    throw std::invalid_argument("y must be [batch, length, heads, width] in memory");
  }
  with_type(a.x.dtype, [&](auto t) { forward<decltype(t)>(a); });
}

void qk_norm_rope_backward(const QkNormRopeBackward& a) {
  if (!positions_first(a.dx)) {
    throw std::invalid_argument("dx must be [batch, length, heads, width] in memory");
  }
  with_type(a.x.dtype, [&](auto t) { backward<decltype(t)>(a); });
}

}  // namespace imf::IMF_ISA

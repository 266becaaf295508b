// Per-head RMSNorm and rotary positions with their tangent, and the primal backward. The formulas
// are in imf_kernels/ops/qk_norm_rope.py.
#include "cpu/qk_norm_rope.h"

#include "cpu/dtypes.h"
#include "cpu/parallel.h"
#include "cpu/rows.h"

namespace imf {
namespace IMF_ISA {
namespace {

// The turn of one position: y = c n + s swap(n), where c holds each cosine twice and s each sine twice, first
// with a minus sign. Kept for all heads of the position.
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

// Row (b, l, h), counted in this order, in which projections leave their results.
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
  // Where it begins; `first` is the b whose data comes first.
  index_t offset(const index_t (&stride)[3], index_t first = 0) const {
    return (b - first) * stride[0] + h * stride[1] + l * stride[2];
  }
};

template <typename T>
void forward(const QkNormRopeForward& a) {
  const T* x = static_cast<const T*>(a.x);
  const T* x_dot = static_cast<const T*>(a.x_dot);
  T* y = static_cast<T*>(a.y);
  T* y_dot = static_cast<T*>(a.y_dot);
  const index_t rows = a.batch * a.heads * a.length;
  const index_t tangent_rows = a.tangent_batch * a.heads * a.length;
  const index_t first_tangent = rows - tangent_rows;
  const double share_of_mean = 1.0 / static_cast<double>(a.width);
  const int team = team_size(a.threads, (rows + tangent_rows) * a.width, rows);

  if (rows == 0) return;  // RowPosition divides by the numbers of heads and positions
  on_each_thread(team, [&](int thread) {
    const Range share = share_of_rows(rows, tangent_rows, thread, team);
    Scratch scratch(2 * a.width);
    Rotation rotation(scratch, a.width);
    RowPosition at(share.begin, a.heads, a.length);
    for (index_t row = share.begin; row < share.end; ++row, at.next(a.heads, a.length)) {
      if (row == share.begin || at.h == 0) {
        rotation.set(a.cos + at.l * (a.width / 2), a.sin + at.l * (a.width / 2), a.width);
      }
      const T* xi = x + at.offset(a.x_stride);
      T* yi = y + row * a.width;
      if (row < first_tangent) {
        const float rstd = inverse_rms(sum_of_squares(xi, a.width), share_of_mean, a.eps);
        a.rstd[row] = rstd;
        for_each_vec(a.width, [&](index_t j, int lanes) {
          prefetch(xi + j + a.x_stride[2]);
          const Vec n = load_lanes(xi + j, lanes) * Vec(rstd) * load_lanes(a.weight + j, lanes);
          store_lanes(yi + j, rotation.apply(n, j, lanes), lanes);
        });
        continue;
      }
      const T* ti = x_dot + at.offset(a.x_dot_stride, a.batch - a.tangent_batch);
      T* y_dot_i = y_dot + (row - first_tangent) * a.width;
      const Dual<float> rstd = inverse_rms(sum_of_squares(xi, ti, a.width), share_of_mean, a.eps);
      a.rstd[row] = rstd.primal;
      const Dual<Vec> r{Vec(rstd.primal), Vec(rstd.tangent)};
      for_each_vec(a.width, [&](index_t j, int lanes) {
        prefetch(xi + j + a.x_stride[2]);
        prefetch(ti + j + a.x_dot_stride[2]);
        const Dual<Vec> n = load_dual(xi + j, ti + j, lanes) * r * load_lanes(a.weight + j, lanes);
        store_dual(yi + j, y_dot_i + j, rotation.apply(n, j, lanes), lanes);
      });
    }
  });
}

// dy turned back is the cotangent of rms_norm's output; the rest as in rms_norm.cpp.
template <typename T>
void backward(const QkNormRopeBackward& a) {
  const T* x = static_cast<const T*>(a.x);
  const T* dy = static_cast<const T*>(a.dy);
  T* dx = static_cast<T*>(a.dx);
  const index_t rows = a.batch * a.heads * a.length;
  const float scale = 1.0f / static_cast<float>(a.width);
  const int team = team_size(a.threads, 2 * rows * a.width, rows);

  GroupSums sums(1, rows, a.width, a.dweight);
  on_each_thread(team, [&](int thread) {
    Scratch scratch(3 * a.width);
    Rotation rotation(scratch, a.width);
    float* g = scratch.take<float>(a.width);  // dy turned back, times w
    RowPosition at;
    index_t row_before = -2;
    sums.add(share_of(sums.blocks(), thread, team), [&](index_t row, float* dweight) {
      const index_t position_before = at.l;
      if (row == row_before + 1) {
        at.next(a.heads, a.length);
      } else {
        at = RowPosition(row, a.heads, a.length);
      }
      row_before = row;
      if (at.l != position_before) {
        rotation.set(a.cos + at.l * (a.width / 2), a.sin + at.l * (a.width / 2), a.width);
      }
      const T* xi = x + at.offset(a.x_stride);
      const T* dyi = dy + at.offset(a.dy_stride);
      T* dxi = dx + row * a.width;
      const Vec rstd(a.rstd[row]);
      const Vec dot = sum_over_row<Vec>(a.width, [&](index_t j, int lanes, Vec& sum) {
        prefetch(xi + j + a.x_stride[2]);
        const Vec dn = rotation.transposed(load_lanes(dyi + j, lanes), j, lanes);
        const Vec dyn = dn * (load_lanes(xi + j, lanes) * rstd);
        const Vec w = load_lanes(a.weight + j, lanes);
        store_lanes(dweight + j, load_lanes(dweight + j, lanes) + dyn, lanes);
        store_lanes(g + j, dn * w, lanes);
        sum = fma(dyn, w, sum);
      });
      const Vec mean(reduce_add(dot) * scale);
      for_each_vec(a.width, [&](index_t j, int lanes) {
        const Vec n = load_lanes(xi + j, lanes) * rstd;
        store_lanes(dxi + j, rstd * (load_lanes(g + j, lanes) - n * mean), lanes);
      });
    });
  });
  sums.finish(team);
}

}  // namespace

void qk_norm_rope_forward(const QkNormRopeForward& a) {
  with_type(a.type, [&](auto t) { forward<decltype(t)>(a); });
}

void qk_norm_rope_backward(const QkNormRopeBackward& a) {
  with_type(a.type, [&](auto t) { backward<decltype(t)>(a); });
}

}  // namespace IMF_ISA
}  // namespace imf

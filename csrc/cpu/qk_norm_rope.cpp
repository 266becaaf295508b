// Per-head RMSNorm and RoPE with tangent, the primal backward and that of the pair. Formulas:
// imf_kernels/ops/qk_norm_rope.py.
#include "ops/qk_norm_rope.h"

#include <stdexcept>
#include <type_traits>

#include "cpu/dtypes.h"
#include "cpu/rms.h"

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
  Dual<Vec> transposed(Dual<Vec> dy, index_t j, int lanes) const {
    return {transposed(dy.primal, j, lanes), transposed(dy.tangent, j, lanes)};
  }
};

// Row (b, l, h), counted in this order, the memory order of projections.
struct RowPosition {
  index_t b, l, h;
};

inline RowPosition position_of(index_t row, const Heads& x) {
  const index_t position = row / x.heads, b = position / x.length;
  return {b, position - b * x.length, row - position * x.heads};
}

// Moves to the next row of x.
inline void advance(RowPosition& at, const Heads& x) {
  if (++at.h < x.heads) return;
  at.h = 0;
  if (++at.l < x.length) return;
  at.l = 0;
  ++at.b;
}

// Returns the address of a row in x, which begins with sample `first`.
template <typename T>
inline T* row_of(const Heads& x, RowPosition at, index_t first = 0) {
  return static_cast<T*>(x.data) + (at.b - first) * x.stride[0] + at.h * x.stride[1] + at.l * x.stride[2];
}

// Returns whether x lies in memory as [batch, length, heads, width].
inline bool positions_first(const Heads& x) {
  return x.batch * x.heads * x.length * x.width == 0 ||
         ((x.heads == 1 || x.stride[1] == x.width) && (x.length == 1 || x.stride[2] == x.heads * x.width) &&
          (x.batch == 1 || x.stride[0] == x.length * x.heads * x.width));
}

template <typename T>
void forward(const QkNormRopeForward& a) {
  const index_t width = a.x.width, per_sample = a.x.heads * a.x.length, first = a.x.batch - a.x_dot.batch;
  const index_t rows = a.x.batch * per_sample, tangent_rows = a.x_dot.batch * per_sample;
  const int team = team_size(a.place.threads, (rows + tangent_rows) * width, rows);

  const double share_of_mean = 1.0 / static_cast<double>(width);
  if (rows == 0) return;  // RowPosition divides by the numbers of heads and positions
  on_each_thread(team, [&](int thread) {
    const Range share = share_of_rows(rows, tangent_rows, thread, team);
    Scratch scratch(2 * width);
    Rotation rotation(scratch, width);
    RowPosition at = position_of(share.begin, a.x);
    for_rows(share, rows - tangent_rows, [&](auto number, index_t row, index_t t) {
      const RowPosition here = at;
      advance(at, a.x);
      if (row == share.begin || here.h == 0)
        rotation.set(row_of(a.cos, here.l), row_of(a.sin, here.l), width);
      using Number = decltype(number);
      const DualRow<Number, const T> x{row_of<const T>(a.x, here), row_of<const T>(a.x_dot, here, first)};
      const DualRow<Number, T> y{static_cast<T*>(a.y.data) + row * width,
                                 static_cast<T*>(a.y_dot.data) + t * width};
      const float* weight = a.weight.data;
      const index_t next = a.x.stride[2], next_dot = a.x_dot.stride[2];
      const Rotation turn = rotation;  // in registers
      const Number rstd = inverse_rms(x, width, share_of_mean, a.eps, a.rstd.data + row);
      for_each_vec(width, [&](index_t j, int lanes) {
        x.prefetch(j + next, j + next_dot);
        const Number n = x(j, lanes) * rstd * load_lanes(weight + j, lanes);
        y.store(j, turn.apply(n, j, lanes), lanes);
      });
    });
  });
}

// Parts of a row of the duals (x, x_dot) and (dy_dot, dy), or of x and dy.
template <typename Number, typename T, typename Arguments>
struct BackwardRow {
  DualRow<Number, const T> x, dy;
  DualRow<Number, T> dx;

  BackwardRow(const Arguments& a, RowPosition at, index_t row) {
    const index_t width = a.x.width;
    const T* of_dy = row_of<const T>(a.dy, at);
    T* of_dx = static_cast<T*>(a.dx.data) + row * width;
    x.primal = row_of<const T>(a.x, at);
    if constexpr (is_dual<Number>) {
      const index_t first = a.x.batch - a.x_dot.batch;
      x.tangent = row_of<const T>(a.x_dot, at, first);
      dy = cotangents<Number>(of_dy, row_of<const T>(a.dy_dot, at, first));
      const index_t t = row - first * a.x.heads * a.x.length;
      dx = cotangents<Number>(of_dx, static_cast<T*>(a.dx_dot.data) + t * width);
    } else {
      dy = cotangents<Number, const T>(of_dy, nullptr);
      dx = cotangents<Number, T>(of_dx, nullptr);
    }
  }
};

// dy rotated back is the cotangent of rms_norm's output.
template <typename T, typename Arguments>
void backward(const Arguments& a) {
  constexpr bool pair = std::is_same_v<Arguments, QkNormRopePairBackward>;
  const index_t rows = a.x.batch * a.x.heads * a.x.length, width = a.x.width;
  const int team = team_size(a.place.threads, 2 * rows * width, rows);

  GroupSums sums(1, rows, width, a.partial, a.dweight);
  on_each_thread(team, [&](int thread) {
    Scratch scratch((pair ? 4 : 3) * width);
    Rotation rotation(scratch, width);
    float* g = scratch.take<float>((pair ? 2 : 1) * width);  // dy rotated back, times w
    RowPosition at{0, -1, 0};
    index_t row_before = -2;
    sums.add(share_of(sums.blocks(), thread, team), [&](index_t row, float* dweight) {
      const index_t position_before = at.l;
      if (row == row_before + 1) {
        advance(at, a.x);
      } else {
        at = position_of(row, a.x);
      }
      row_before = row;
      if (at.l != position_before) rotation.set(row_of(a.cos, at.l), row_of(a.sin, at.l), width);
      const auto of_row = [&](auto number) {
        using Number = decltype(number);
        const BackwardRow<Number, T, Arguments> parts(a, at, row);
        const DualRow<Number, float> product{g, g + width};
        const auto dn = [&](index_t j, int lanes) {
          prefetch(parts.x.primal + j + a.x.stride[2]);
          const Number back = rotation.transposed(parts.dy(j, lanes), j, lanes);
          product.store(j, back * load_lanes(a.weight.data + j, lanes), lanes);
          return back;
        };
        const Number rstd = stored_rstd(parts.x, width, a.rstd.data[row]);
        rms_norm_backward<Number, T>(width, parts.x, a.weight.data, rstd, dn, product, dweight, parts.dx);
      };
      if constexpr (pair) {
        with_number(at.b >= a.x.batch - a.x_dot.batch, of_row);
      } else {
        of_row(Vec());
      }
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

void qk_norm_rope_pair_backward(const QkNormRopePairBackward& a) {
  if (!positions_first(a.dx) || !positions_first(a.dx_dot)) {
    throw std::invalid_argument("dx and dx_dot must be [batch, length, heads, width] in memory");
  }
  with_type(a.x.dtype, [&](auto t) { backward<decltype(t)>(a); });
}

}  // namespace imf::IMF_ISA

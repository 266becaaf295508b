// Per-head RMSNorm and RoPE with tangent, the primal backward and that of the pair. Formulas:
// imf_kernels/ops/qk_norm_rope.py.
#include "ops/qk_norm_rope.h"

#include <algorithm>
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

// The heads of queries and keys of a projection, and those of values after them.
struct Projection {
  index_t batch, length, heads, key_heads, width;

  Projection(const Heads& q, const Heads& k) : Projection{q.batch, q.length, q.heads, k.heads, q.width} {}
  Projection(index_t batch, index_t length, index_t heads, index_t key_heads, index_t width)
      : batch(batch), length(length), heads(heads), key_heads(key_heads), width(width) {}

  index_t normed() const { return heads + key_heads; }
  index_t all() const { return heads + 2 * key_heads; }
  // Returns the number of elements before head h of a position.
  index_t offset(index_t position, index_t h) const { return (position * all() + h) * width; }
  // Throws unless `qkv` and `rstd` are of this projection.
  void check(const Elements& qkv, const Floats& rstd) const {
    const index_t positions = batch * length;
    if (qkv.count != positions * all() * width || rstd.rows * rstd.width != positions * normed()) {
      refuse("qkv and rstd must be of % positions with % heads and % heads of keys, got % and % elements",
             {positions, heads, key_heads, qkv.count, rstd.rows * rstd.width});
    }
  }
  index_t samples(const Elements& x) const {
    const index_t of_one = length * all() * width;
    return of_one ? x.count / of_one : 0;
  }
};

// Row (position, h), counted in this order for the first `heads` heads; position is b length + l.
struct RowPosition {
  index_t position, l, h;
};

inline RowPosition position_of(index_t row, index_t heads, index_t length) {
  const index_t position = row / heads;
  return {position, position % length, row - position * heads};
}

// Moves to the next row.
inline void advance(RowPosition& at, index_t heads, index_t length) {
  if (++at.h < heads) return;
  at.h = 0;
  ++at.position;
  if (++at.l == length) at.l = 0;
}

// Returns the address of head h at a position of x, whose first sample has number `first`.
template <typename T>
inline T* head_of(const Heads& x, RowPosition at, index_t h, index_t first = 0) {
  const index_t b = (at.position - at.l) / x.length - first;
  return static_cast<T*>(x.data) + b * x.stride[0] + h * x.stride[1] + at.l * x.stride[2];
}

// Returns the address of row `at` in the contiguous q or k, whose first position has number `first`.
template <typename T>
inline T* result_of(const Projection& x, const Heads& q, const Heads& k, RowPosition at, index_t first = 0) {
  const index_t position = at.position - first;
  return at.h < x.heads ? static_cast<T*>(q.data) + (position * x.heads + at.h) * x.width
                        : static_cast<T*>(k.data) + (position * x.key_heads + at.h - x.heads) * x.width;
}

// Returns whether x lies in memory as [batch, length, heads, width].
inline bool positions_first(const Heads& x) {
  return x.batch * x.heads * x.length * x.width == 0 ||
         ((x.heads == 1 || x.stride[1] == x.width) && (x.length == 1 || x.stride[2] == x.heads * x.width) &&
          (x.batch == 1 || x.stride[0] == x.length * x.heads * x.width));
}

template <typename T>
void forward(const QkNormRopeForward& a) {
  const Projection heads(a.q, a.k);
  heads.check(a.qkv, a.rstd);
  const index_t width = heads.width, normed = heads.normed(), rows = heads.batch * heads.length * normed;
  const index_t tangent_rows = heads.samples(a.qkv_dot) * heads.length * normed;
  const index_t first = heads.length * (heads.batch - heads.samples(a.qkv_dot));  // position with a tangent
  const int team = team_size(a.place.threads, (rows + tangent_rows) * width, rows);

  const double share_of_mean = 1.0 / static_cast<double>(width);
  if (rows == 0) return;  // RowPosition divides by the numbers of heads and positions
  const T* qkv = static_cast<const T*>(a.qkv.data);
  const T* qkv_dot = static_cast<const T*>(a.qkv_dot.data);
  on_each_thread(team, [&](int thread) {
    const Range share = share_of_rows(rows, tangent_rows, thread, team);
    Scratch scratch(2 * width);
    Rotation rotation(scratch, width);
    RowPosition at = position_of(share.begin, normed, heads.length);
    for_rows(share, rows - tangent_rows, [&](auto number, index_t row, index_t) {
      const RowPosition here = at;
      advance(at, normed, heads.length);
      if (row == share.begin || here.h == 0)
        rotation.set(row_of(a.cos, here.l), row_of(a.sin, here.l), width);
      using Number = decltype(number);
      DualRow<Number, const T> x{qkv + heads.offset(here.position, here.h), nullptr};
      DualRow<Number, T> y{result_of<T>(heads, a.q, a.k, here), nullptr};
      if constexpr (is_dual<Number>) {
        x.tangent = qkv_dot + heads.offset(here.position - first, here.h);
        y.tangent = result_of<T>(heads, a.q_dot, a.k_dot, here, first);
      }
      const float* weight = here.h < heads.heads ? a.q_weight.data : a.k_weight.data;
      const index_t next = heads.offset(1, 0);
      const Rotation turn = rotation;  // in registers
      const Number rstd = inverse_rms(x, width, share_of_mean, a.eps, a.rstd.data + row);
      for_each_vec(width, [&](index_t j, int lanes) {
        x.prefetch(j + next, j + next);
        const Number n = x(j, lanes) * rstd * load_lanes(weight + j, lanes);
        y.store(j, turn.apply(n, j, lanes), lanes);
      });
    });
  });
}

template <typename T>
inline void copy(const T* from, index_t width, T* to) {
  std::copy(from, from + width, to);
}

// Backward of x, or of the duals (x, x_dot): dy rotated back is the cotangent of rms_norm's output. The
// cotangent of values is copied.
template <typename T, typename Arguments>
void backward(const Arguments& a) {
  constexpr bool pair = std::is_same_v<Arguments, QkNormRopePairBackward>;
  const Projection heads(a.dq, a.dk);
  heads.check(a.qkv, a.rstd);
  const index_t all = heads.all(), rows = heads.batch * heads.length * all, width = heads.width;
  const int team = team_size(a.place.threads, 2 * rows * width, rows);
  index_t first = heads.batch;  // sample with a tangent
  if constexpr (pair) first -= heads.samples(a.qkv_dot);

  const T* qkv = static_cast<const T*>(a.qkv.data);
  T* dqkv = static_cast<T*>(a.dqkv.data);
  GroupSums sums(1, rows, 2 * width, a.partial, a.weights);
  on_each_thread(team, [&](int thread) {
    Scratch scratch((pair ? 4 : 3) * width);
    Rotation rotation(scratch, width);
    float* g = scratch.take<float>((pair ? 2 : 1) * width);  // dy rotated back, times w
    RowPosition at{-1, -1, 0};
    index_t row_before = -2;
    sums.add(share_of(sums.blocks(), thread, team), [&](index_t row, float* dweights) {
      const index_t position_before = at.l;
      if (row == row_before + 1) {
        advance(at, all, heads.length);
      } else {
        at = position_of(row, all, heads.length);
      }
      row_before = row;
      if (at.l != position_before) rotation.set(row_of(a.cos, at.l), row_of(a.sin, at.l), width);
      const index_t offset = row * width, offset_dot = offset - heads.offset(first * heads.length, 0);
      const bool moves = at.position >= first * heads.length;
      if (at.h >= heads.normed()) {
        const index_t h = at.h - heads.normed();
        copy(head_of<const T>(a.dv, at, h), width, dqkv + offset);
        if constexpr (pair) {
          T* to = static_cast<T*>(a.dqkv_dot.data) + offset_dot;
          if (moves) copy(head_of<const T>(a.dv_dot, at, h, first), width, to);
        }
        return;
      }
      const bool of_query = at.h < heads.heads;
      const index_t h = of_query ? at.h : at.h - heads.heads;
      const float* weight = of_query ? a.q_weight.data : a.k_weight.data;
      float* dweight = dweights + (of_query ? 0 : width);
      const auto of_row = [&](auto number) {
        using Number = decltype(number);
        const T* of_dy = head_of<const T>(of_query ? a.dq : a.dk, at, h);
        DualRow<Number, const T> x{qkv + offset, nullptr}, dy = cotangents<Number, const T>(of_dy, nullptr);
        DualRow<Number, T> dx = cotangents<Number, T>(dqkv + offset, nullptr);
        if constexpr (is_dual<Number>) {
          x.tangent = static_cast<const T*>(a.qkv_dot.data) + offset_dot;
          dy = cotangents<Number>(of_dy, head_of<const T>(of_query ? a.dq_dot : a.dk_dot, at, h, first));
          dx = cotangents<Number>(dqkv + offset, static_cast<T*>(a.dqkv_dot.data) + offset_dot);
        }
        const DualRow<Number, float> product{g, g + width};
        const auto dn = [&](index_t j, int lanes) {
          prefetch(x.primal + j + heads.offset(1, 0));
          const Number back = rotation.transposed(dy(j, lanes), j, lanes);
          product.store(j, back * load_lanes(weight + j, lanes), lanes);
          return back;
        };
        const Number rstd = stored_rstd<Number>(x, width, a.rstd.data[at.position * heads.normed() + at.h]);
        rms_norm_backward(width, x, weight, rstd, dn, product, dweight, dx);
      };
      if constexpr (pair) {
        with_number(moves, of_row);
      } else {
        of_row(Vec());
      }
    });
  });
  sums.finish(team);
}

}  // namespace

void qk_norm_rope_forward(const QkNormRopeForward& a) {
  for (const Heads& y : {Heads(a.q), Heads(a.q_dot), Heads(a.k), Heads(a.k_dot)}) {
    if (!positions_first(y)) {
      refuse("q and k must be [batch, length, heads, width] in memory");
    }
  }
  with_type(a.qkv.dtype, [&](auto t) { forward<decltype(t)>(a); });
}

void qk_norm_rope_backward(const QkNormRopeBackward& a) {
  with_type(a.qkv.dtype, [&](auto t) { backward<decltype(t)>(a); });
}

void qk_norm_rope_pair_backward(const QkNormRopePairBackward& a) {
  with_type(a.qkv.dtype, [&](auto t) { backward<decltype(t)>(a); });
}

}  // namespace imf::IMF_ISA

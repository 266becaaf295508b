// LayerNorm with its tangent, and its primal backward. Formulas: imf_kernels/ops/layer_norm{,_modulate}.py.
#include "ops/layer_norm.h"

#include <cmath>
#include <type_traits>

#include "cpu/dtypes.h"
#include "cpu/parallel.h"
#include "cpu/rows.h"

namespace imf::IMF_ISA {
namespace {

inline float primal(float x) { return x; }
inline float primal(Dual<float> x) { return x.primal; }

// Moments of a row, whose mean is mean + correction: with an offset the sum of the row is off by about an ulp
// of the values. The mean of x - mean corrects the mean, exactly if all values are equal, and the variance:
// the two-pass algorithm of Chan, Golub and LeVeque, "Algorithms for Computing the Sample Variance" (1983).
template <typename Scalar>
struct Moments {
  Scalar mean, correction, variance;
};

// Computes moments where the sum of a row overflows, or the square of its mean's rounding error (equal values
// from 1e26 on): sums values shrunk by a power of two, and corrects the mean before squaring.
template <typename Number, typename Row>
[[gnu::noinline]] auto moments_of_large(index_t width, Row x) {
  const float count = static_cast<float>(width);
  float shrink = 1.0f;
  while (count * shrink > 1.0f) shrink *= 0.5f;
  const auto mean_of = [&](auto value) {
    const Number total = sum_over_row<Number>(
        width, [&](index_t j, int lanes, Number& sum) { sum = sum + value(j, lanes) * Vec(shrink); });
    return reduce_add(total) / (count * shrink);
  };
  const auto mean = mean_of(x);
  const auto centered = [&](index_t j, int lanes) {
    return keep_lanes(x(j, lanes) - broadcast(mean), lanes, 0.0f);
  };
  const auto correction = mean_of(centered);
  const Number squares = sum_over_row<Number>(width, [&](index_t j, int lanes, Number& sum) {
    const Number c = keep_lanes(centered(j, lanes) - broadcast(correction), lanes, 0.0f);
    sum = add_square(sum, c);
  });
  return Moments<std::decay_t<decltype(mean)>>{mean, correction,
                                               with_whole_tangent(reduce_add(squares)) / count};
}

template <typename Row>
inline auto moments(index_t width, Row x) {
  using Number = decltype(x(0, 0));
  const float count = static_cast<float>(width);
  const Number total =
      sum_over_row<Number, 2>(width, [&](index_t j, int lanes, Number& sum) { sum = sum + x(j, lanes); });
  const auto mean = reduce_add(total) / count;
  const auto sums = sum_over_row<Pair<Number>, 1>(width, [&](index_t j, int lanes, Pair<Number>& sum) {
    const Number c = keep_lanes(x(j, lanes) - broadcast(mean), lanes, 0.0f);
    sum = {sum.first + c, add_square(sum.second, c)};
  });
  const auto correction = reduce_add(sums.first) / count;
  const auto variance = with_whole_tangent(reduce_add(sums.second)) / count - correction * correction;
  if (!std::isfinite(primal(variance))) return moments_of_large<Number>(width, x);
  return Moments<std::decay_t<decltype(mean)>>{mean, correction, variance};
}

// Passes each part of a row's n gain + shift to write(j, part, lanes). x, gain and shift are functions of (j,
// lanes) that return Vec, or Dual<Vec> if the row has a tangent.
template <typename Row, typename Gain, typename Shift, typename Write>
inline void normalize(index_t width, float eps, float* statistics, Row x, Gain gain, Shift shift,
                      Write write) {
  const auto of_row = moments(width, x);
  const auto mean = of_row.mean, correction = of_row.correction, rstd = rsqrt(of_row.variance + eps);
  for_each_vec(width, [&](index_t j, int lanes) {
    const auto n = (x(j, lanes) - broadcast(mean) - broadcast(correction)) * broadcast(rstd);
    write(j, fma(n, gain(j, lanes), shift(j, lanes)), lanes);
  });
  statistics[0] = primal(mean);
  statistics[1] = primal(correction);
  statistics[2] = primal(rstd);
}

// Returns the number of rows per group.
inline index_t length_of(index_t rows, index_t groups) { return groups > 1 ? rows / groups : rows; }

template <typename X, typename Y>
void forward(const LayerNormForward& a) {
  const X* x = static_cast<const X*>(a.x.data);
  const X* x_dot = static_cast<const X*>(a.x_dot.data);
  Y* y = static_cast<Y*>(a.y.data);
  Y* y_dot = static_cast<Y*>(a.y_dot.data);
  const index_t rows = a.x.rows, tangent_rows = a.y_dot.rows, width = a.x.width;
  const index_t length = length_of(rows, a.scale.data ? a.scale.rows : a.shift.rows),
                first_tangent = rows - tangent_rows;
  const int team = team_size(a.place.threads, (rows + tangent_rows) * width, rows);

  on_each_thread(team, [&](int thread) {
    const Range share = share_of_rows(rows, tangent_rows, thread, team);
    for (index_t row = share.begin; row < share.end; ++row) {
      const X* xi = x + row * a.x.stride;
      Y* yi = y + row * a.y.stride;
      const index_t group = row / length * width;
      const auto primal_x = [&](index_t j, int lanes) { return load_lanes(xi + j, lanes); };
      const auto primal_gain = [&](index_t j, int lanes) {
        return Vec(a.one) + load_or_zero(a.scale.data, group + j, lanes);
      };
      const auto primal_shift = [&](index_t j, int lanes) {
        return load_or_zero(a.shift.data, group + j, lanes);
      };
      if (row < first_tangent) {
        normalize(width, a.eps, a.statistics.data + 3 * row, primal_x, primal_gain, primal_shift,
                  [&](index_t j, Vec part, int lanes) { store_lanes(yi + j, part, lanes); });
        continue;
      }
      const index_t t = row - first_tangent, t_row = t * a.x_dot.stride;
      const index_t t_group = group - first_tangent / length * width;
      Y* y_dot_i = y_dot + t * a.y_dot.stride;
      normalize(
          width, a.eps, a.statistics.data + 3 * row,
          [&](index_t j, int lanes) {
            return Dual<Vec>{primal_x(j, lanes), load_or_zero(x_dot, t_row + j, lanes)};
          },
          [&](index_t j, int lanes) {
            return Dual<Vec>{primal_gain(j, lanes), load_or_zero(a.scale_dot.data, t_group + j, lanes)};
          },
          [&](index_t j, int lanes) {
            return Dual<Vec>{primal_shift(j, lanes), load_or_zero(a.shift_dot.data, t_group + j, lanes)};
          },
          [&](index_t j, Dual<Vec> part, int lanes) { store_dual(yi + j, y_dot_i + j, part, lanes); });
    }
  });
}

// With g = dy (one + scale): dx = rstd (g - mean(g) - n mean(g n)), dscale = sum dy n, dshift = sum dy.
template <typename X, typename Y>
void backward(const LayerNormBackward& a) {
  const X* x = static_cast<const X*>(a.x.data);
  const Y* dy = static_cast<const Y*>(a.dy.data);
  X* dx = static_cast<X*>(a.dx.data);
  const index_t rows = a.x.rows, width = a.x.width;
  const index_t groups = a.sums.rows / 2, length = length_of(rows, groups);
  const float scale = 1.0f / static_cast<float>(width);
  const int team = team_size(a.place.threads, 2 * rows * width, rows);

  sum_over_groups(groups, length, 2 * width, team, a.partial, a.sums, [&](index_t row, float* dscale) {
    const X* xi = x + row * a.x.stride;
    const Y* dyi = dy + row * a.dy.stride;
    X* dxi = dx + row * a.dx.stride;
    float* dshift = dscale + width;
    const index_t group = row / length * width;
    const float* statistics = a.statistics.data + 3 * row;
    const Vec mean(statistics[0]), correction(statistics[1]), rstd(statistics[2]);
    const auto normalized = [&](index_t j, int lanes) {
      return keep_lanes((load_lanes(xi + j, lanes) - mean - correction) * rstd, lanes, 0.0f);
    };
    const auto gain = [&](index_t j, int lanes) {
      return Vec(a.one) + load_or_zero(a.scale.data, group + j, lanes);
    };
    const Pair<Vec> total = sum_over_row<Pair<Vec>, 2>(width, [&](index_t j, int lanes, Pair<Vec>& sum) {
      const Vec d = load_lanes(dyi + j, lanes);
      const Vec n = normalized(j, lanes);
      const Vec g = d * gain(j, lanes);
      store_lanes(dscale + j, fma(d, n, load_lanes(dscale + j, lanes)), lanes);
      store_lanes(dshift + j, load_lanes(dshift + j, lanes) + d, lanes);
      sum = {sum.first + g, fma(g, n, sum.second)};
    });
    const Vec mean_g(reduce_add(total.first) * scale), mean_gn(reduce_add(total.second) * scale);
    for_each_vec(width, [&](index_t j, int lanes) {
      const Vec g = load_lanes(dyi + j, lanes) * gain(j, lanes);
      store_lanes(dxi + j, rstd * (g - mean_g - normalized(j, lanes) * mean_gn), lanes);
    });
  });
}

}  // namespace

void layer_norm_forward(const LayerNormForward& a) {
  with_types(a.x.dtype, a.y.dtype, [&](auto x, auto y) { forward<decltype(x), decltype(y)>(a); });
}

void layer_norm_backward(const LayerNormBackward& a) {
  with_types(a.x.dtype, a.dy.dtype, [&](auto x, auto y) { backward<decltype(x), decltype(y)>(a); });
}

}  // namespace imf::IMF_ISA

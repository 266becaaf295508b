// LayerNorm with its tangent, its primal backward and that of the pair. Formulas:
// imf_kernels/ops/layer_norm{,_modulate}.py.
#include "ops/layer_norm.h"

#include "cpu/dtypes.h"
#include "cpu/duals.h"
#include "cpu/moments.h"

namespace imf::IMF_ISA {
namespace {

template <typename X, typename Y>
void forward(const LayerNormForward& a) {
  const index_t width = a.x.width, first_tangent = a.x.rows - a.y_dot.rows;
  const index_t length = length_of(a.x.rows,
                                   a.scale.data   ? a.scale.rows
                                   : a.shift.data ? a.shift.rows
                                                  : 1,
                                   a.y_dot.rows, a.scale_dot.data ? a.scale_dot.rows : a.shift_dot.rows);
  for_each_row(a.y, a.y_dot, a.place.threads, [&](auto number, index_t row, index_t t) {
    using Number = decltype(number);
    const index_t group = row / length, t_group = group - first_tangent / length;
    const auto x = dual_row<Number, const X>(a.x, row, a.x_dot, t);
    const auto scale = dual_row<Number>(a.scale, group, a.scale_dot, t_group);
    const auto shift = dual_row<Number>(a.shift, group, a.shift_dot, t_group);
    const auto y = dual_row<Number, Y>(a.y, row, a.y_dot, t);
    const auto xj = [&](index_t j, int lanes) { return x.or_zero(j, lanes); };
    const auto of_row = moments<Number>(width, xj);
    const auto rstd = rsqrt(of_row.variance + a.eps);
    const Number mean = broadcast(of_row.mean), correction = broadcast(of_row.correction);
    for_each_vec(width, [&](index_t j, int lanes) {
      const Number n = (xj(j, lanes) - mean - correction) * broadcast(rstd);
      y.store(j, fma(n, scale.or_zero(j, lanes) + Vec(a.one), shift.or_zero(j, lanes)), lanes);
    });
    float* statistics = a.statistics.data + 3 * row;
    statistics[0] = primal(of_row.mean);
    statistics[1] = primal(of_row.correction);
    statistics[2] = primal(rstd);
  });
}

// With g = dy (one + scale): dx = rstd (g - mean(g) - n mean(g n)), dscale = sum dy n, dshift = sum dy.
template <typename X, typename Y>
void backward(const LayerNormBackward& a) {
  const index_t rows = a.x.rows, width = a.x.width;
  const index_t groups = a.sums.rows / 2, length = length_of(rows, groups);
  const float share = 1.0f / static_cast<float>(width);
  const int team = team_size(a.place.threads, 2 * rows * width, rows);

  sum_over_groups(groups, length, 2 * width, team, a.partial, a.sums, [&](index_t row, float* dscale) {
    const X* x = row_of<const X>(a.x, row);
    const Y* dy = row_of<const Y>(a.dy, row);
    const float* scale = row_of(a.scale, row / length);
    X* dx = row_of<X>(a.dx, row);
    float* dshift = dscale + width;
    const float* statistics = a.statistics.data + 3 * row;
    const Vec mean(statistics[0]), correction(statistics[1]), rstd(statistics[2]), one(a.one);
    const auto normalized = [&](index_t j, int lanes) {
      return keep_lanes((load_lanes(x + j, lanes) - mean - correction) * rstd, lanes, 0.0f);
    };
    const auto gain = [&](index_t j, int lanes) { return one + load_or_zero(scale, j, lanes); };
    const Pair<Vec> total = sum_over_row<Pair<Vec>, 2>(width, [&](index_t j, int lanes, Pair<Vec>& sum) {
      const Vec d = load_lanes(dy + j, lanes);
      const Vec n = normalized(j, lanes);
      const Vec g = d * gain(j, lanes);
      store_lanes(dscale + j, fma(d, n, load_lanes(dscale + j, lanes)), lanes);
      store_lanes(dshift + j, load_lanes(dshift + j, lanes) + d, lanes);
      sum = {sum.first + g, fma(g, n, sum.second)};
    });
    const Vec mean_g(reduce_add(total.first) * share), mean_gn(reduce_add(total.second) * share);
    for_each_vec(width, [&](index_t j, int lanes) {
      const Vec g = load_lanes(dy + j, lanes) * gain(j, lanes);
      store_lanes(dx + j, rstd * (g - mean_g - normalized(j, lanes) * mean_gn), lanes);
    });
  });
}

// The same of duals. A row's rstd has the derivative -rstd^2 mean(n (x_dot - mean(x_dot))).
template <typename X, typename Y>
void backward(const LayerNormPairBackward& a) {
  const index_t rows = a.x.rows, width = a.x.width, first = rows - a.dy_dot.rows;
  const index_t groups = a.sums.rows / 4;
  const index_t length = length_of(rows, groups, a.dy_dot.rows, a.scale_dot.rows);
  const float share = 1.0f / static_cast<float>(width);
  const int team = team_size(a.place.threads, 4 * rows * width, rows);

  sum_over_groups(groups, length, 4 * width, team, a.partial, a.sums, [&](index_t row, float* sums) {
    const index_t t = row - first, group = row / length, t_group = group - first / length;
    const float* statistics = a.statistics.data + 3 * row;
    with_number(t >= 0, [&](auto number) {
      using Number = decltype(number);
      const auto x = dual_row<Number, const X>(a.x, row, a.x_dot, t);
      const auto dy = cotangent_row<Number, const Y>(a.dy, row, a.dy_dot, t);
      const auto scale = dual_row<Number>(a.scale, group, a.scale_dot, t_group);
      const auto gain = [&](index_t j, int lanes) { return scale.or_zero(j, lanes) + Vec(a.one); };
      Number mean{}, rstd{};
      const auto centered = [&](index_t j, int lanes) {
        return keep_lanes(x.or_zero(j, lanes) - mean, lanes, 0.0f);
      };
      if constexpr (is_dual<Number>) {
        mean.primal = Vec(statistics[0]);
        rstd.primal = Vec(statistics[2]);
        mean.tangent = Vec(
            reduce_add(sum_over_row<Vec>(
                width, [&](index_t j, int lanes, Vec& sum) { sum = sum + x.or_zero(j, lanes).tangent; })) *
            share);
        const Vec products = sum_over_row<Vec>(width, [&](index_t j, int lanes, Vec& sum) {
          const Number c = centered(j, lanes);
          sum = fma(c.primal - Vec(statistics[1]), c.tangent, sum);
        });
        const float r = statistics[2];
        rstd.tangent = Vec(-r * r * r * (reduce_add(products) * share));
      } else {
        mean = Vec(statistics[0]);
        rstd = Vec(statistics[2]);
      }
      const auto normalized = [&](index_t j, int lanes) {
        Number c = centered(j, lanes);
        const Vec correction(statistics[1]);
        if constexpr (is_dual<Number>) {
          c.primal = c.primal - correction;
        } else {
          c = c - correction;
        }
        return keep_lanes(c * rstd, lanes, 0.0f);
      };
      const auto add = [&](index_t sum, index_t j, Vec x, int lanes) {
        float* to = sums + sum * width + j;
        store_lanes(to, load_lanes(to, lanes) + x, lanes);
      };
      const auto total = sum_over_row<Pair<Number>, 2>(width, [&](index_t j, int lanes, Pair<Number>& sum) {
        const Number d = dy(j, lanes), n = normalized(j, lanes);
        const Number g = d * gain(j, lanes), dn = d * n;
        add(0, j, of_weight(dn), lanes);
        add(1, j, of_weight(d), lanes);
        if constexpr (is_dual<Number>) {
          add(2, j, dn.primal, lanes);
          add(3, j, d.primal, lanes);
        }
        sum = {sum.first + g, fma(g, n, sum.second)};
      });
      const Number mean_g = broadcast(reduce_add(total.first) * share);
      const Number mean_gn = broadcast(reduce_add(total.second) * share);
      const auto dx = cotangent_row<Number, X>(a.dx, row, a.dx_dot, t);
      for_each_vec(width, [&](index_t j, int lanes) {
        const Number g = dy(j, lanes) * gain(j, lanes);
        dx.store_given(j, rstd * (g - mean_g - normalized(j, lanes) * mean_gn), lanes);
      });
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

void layer_norm_pair_backward(const LayerNormPairBackward& a) {
  with_types(a.x.dtype, a.dy.dtype, [&](auto x, auto y) { backward<decltype(x), decltype(y)>(a); });
}

}  // namespace imf::IMF_ISA

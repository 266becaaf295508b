// RMSNorm with its tangent, and its primal backward. The formulas are in imf_kernels/ops/rms_norm.py.
#include "cpu/rms_norm.h"

#include "cpu/dtypes.h"
#include "cpu/parallel.h"
#include "cpu/rows.h"

namespace imf {
namespace IMF_ISA {
namespace {

template <typename X, typename Y>
void forward(const RmsNormForward& a) {
  const X* x = static_cast<const X*>(a.x);
  const X* x_dot = static_cast<const X*>(a.x_dot);
  Y* y = static_cast<Y*>(a.y);
  Y* y_dot = static_cast<Y*>(a.y_dot);
  const index_t first_tangent = a.rows - a.tangent_rows;
  const double share_of_mean = 1.0 / static_cast<double>(a.width);
  const int team = team_size(a.threads, (a.rows + a.tangent_rows) * a.width, a.rows);

  on_each_thread(team, [&](int thread) {
    const Range share = share_of_rows(a.rows, a.tangent_rows, thread, team);
    for (index_t row = share.begin; row < share.end; ++row) {
      const X* xi = x + row * a.x_stride;
      Y* yi = y + row * a.width;
      if (row < first_tangent) {
        const float rstd = inverse_rms(sum_of_squares(xi, a.width), share_of_mean, a.eps);
        a.rstd[row] = rstd;
        for_each_vec(a.width, [&](index_t j, int lanes) {
          store_lanes(yi + j, load_lanes(xi + j, lanes) * Vec(rstd) * load_lanes(a.weight + j, lanes), lanes);
        });
        continue;
      }
      const X* ti = x_dot + (row - first_tangent) * a.x_dot_stride;
      Y* y_dot_i = y_dot + (row - first_tangent) * a.width;
      const Dual<float> rstd = inverse_rms(sum_of_squares(xi, ti, a.width), share_of_mean, a.eps);
      a.rstd[row] = rstd.primal;
      const Dual<Vec> r{Vec(rstd.primal), Vec(rstd.tangent)};
      for_each_vec(a.width, [&](index_t j, int lanes) {
        const Dual<Vec> normalized = load_dual(xi + j, ti + j, lanes) * r;
        store_dual(yi + j, y_dot_i + j, normalized * load_lanes(a.weight + j, lanes), lanes);
      });
    }
  });
}

// With g = dy w and n = x rstd: dx = rstd (g - n mean(g n)), dw = sum over rows of dy n.
template <typename X, typename Y>
void backward(const RmsNormBackward& a) {
  const X* x = static_cast<const X*>(a.x);
  const Y* dy = static_cast<const Y*>(a.dy);
  X* dx = static_cast<X*>(a.dx);
  const float scale = 1.0f / static_cast<float>(a.width);
  const int team = team_size(a.threads, 2 * a.rows * a.width, a.rows);

  sum_over_groups(1, a.rows, a.width, team, a.dweight, [&](index_t row, float* dweight) {
    const X* xi = x + row * a.x_stride;
    const Y* dyi = dy + row * a.dy_stride;
    X* dxi = dx + row * a.width;
    const Vec rstd(a.rstd[row]);
    const Vec dot = sum_over_row<Vec>(a.width, [&](index_t j, int lanes, Vec& sum) {
      const Vec dyn = load_lanes(dyi + j, lanes) * (load_lanes(xi + j, lanes) * rstd);
      store_lanes(dweight + j, load_lanes(dweight + j, lanes) + dyn, lanes);
      sum = fma(dyn, load_lanes(a.weight + j, lanes), sum);
    });
    const Vec mean(reduce_add(dot) * scale);
    for_each_vec(a.width, [&](index_t j, int lanes) {
      const Vec g = load_lanes(dyi + j, lanes) * load_lanes(a.weight + j, lanes);
      const Vec n = load_lanes(xi + j, lanes) * rstd;
      store_lanes(dxi + j, rstd * (g - n * mean), lanes);
    });
  });
}

}  // namespace

void rms_norm_forward(const RmsNormForward& a) {
  with_types(a.x_type, a.y_type, [&](auto x, auto y) { forward<decltype(x), decltype(y)>(a); });
}

void rms_norm_backward(const RmsNormBackward& a) {
  with_types(a.x_type, a.y_type, [&](auto x, auto y) { backward<decltype(x), decltype(y)>(a); });
}

}  // namespace IMF_ISA
}  // namespace imf

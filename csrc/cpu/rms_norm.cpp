// RMSNorm with its tangent, and its primal backward. Formulas: imf_kernels/ops/rms_norm.py.
#include "ops/rms_norm.h"

#include "cpu/dtypes.h"
#include "cpu/parallel.h"
#include "cpu/rows.h"

namespace imf::IMF_ISA {
namespace {

template <typename X, typename Y>
void forward(const RmsNormForward& a) {
  const X* x = static_cast<const X*>(a.x.data);
  const X* x_dot = static_cast<const X*>(a.x_dot.data);
  Y* y = static_cast<Y*>(a.y.data);
  Y* y_dot = static_cast<Y*>(a.y_dot.data);
  const index_t rows = a.x.rows, tangent_rows = a.y_dot.rows, width = a.x.width;
  const index_t first_tangent = rows - tangent_rows;
  const double share_of_mean = 1.0 / static_cast<double>(width);
  const int team = team_size(a.place.threads, (rows + tangent_rows) * width, rows);

  on_each_thread(team, [&](int thread) {
    const Range share = share_of_rows(rows, tangent_rows, thread, team);
    for (index_t row = share.begin; row < share.end; ++row) {
      const X* xi = x + row * a.x.stride;
      Y* yi = y + row * a.y.stride;
      if (row < first_tangent) {
        const float rstd = inverse_rms(sum_of_squares(xi, width), share_of_mean, a.eps);
        a.rstd.data[row] = rstd;
        for_each_vec(width, [&](index_t j, int lanes) {
          store_lanes(yi + j, load_lanes(xi + j, lanes) * Vec(rstd) * load_lanes(a.weight.data + j, lanes),
                      lanes);
        });
        continue;
      }
      const X* ti = x_dot + (row - first_tangent) * a.x_dot.stride;
      Y* y_dot_i = y_dot + (row - first_tangent) * a.y_dot.stride;
      const Dual<float> rstd = inverse_rms(sum_of_squares(xi, ti, width), share_of_mean, a.eps);
      a.rstd.data[row] = rstd.primal;
      const Dual<Vec> r{Vec(rstd.primal), Vec(rstd.tangent)};
      for_each_vec(width, [&](index_t j, int lanes) {
        const Dual<Vec> normalized = load_dual(xi + j, ti + j, lanes) * r;
        store_dual(yi + j, y_dot_i + j, normalized * load_lanes(a.weight.data + j, lanes), lanes);
      });
    }
  });
}

// With g = dy w and n = x rstd: dx = rstd (g - n mean(g n)), dw = sum over rows of dy n.
template <typename X, typename Y>
void backward(const RmsNormBackward& a) {
  const X* x = static_cast<const X*>(a.x.data);
  const Y* dy = static_cast<const Y*>(a.dy.data);
  X* dx = static_cast<X*>(a.dx.data);
  const index_t rows = a.x.rows, width = a.x.width;
  const float scale = 1.0f / static_cast<float>(width);
  const int team = team_size(a.place.threads, 2 * rows * width, rows);

  sum_over_groups(1, rows, width, team, a.partial, a.dweight, [&](index_t row, float* dweight) {
    const X* xi = x + row * a.x.stride;
    const Y* dyi = dy + row * a.dy.stride;
    X* dxi = dx + row * a.dx.stride;
    const Vec rstd(a.rstd.data[row]);
    const Vec dot = sum_over_row<Vec>(width, [&](index_t j, int lanes, Vec& sum) {
      const Vec dyn = load_lanes(dyi + j, lanes) * (load_lanes(xi + j, lanes) * rstd);
      store_lanes(dweight + j, load_lanes(dweight + j, lanes) + dyn, lanes);
      sum = fma(dyn, load_lanes(a.weight.data + j, lanes), sum);
    });
    const Vec mean(reduce_add(dot) * scale);
    for_each_vec(width, [&](index_t j, int lanes) {
      const Vec g = load_lanes(dyi + j, lanes) * load_lanes(a.weight.data + j, lanes);
      const Vec n = load_lanes(xi + j, lanes) * rstd;
      store_lanes(dxi + j, rstd * (g - n * mean), lanes);
    });
  });
}

}  // namespace

void rms_norm_forward(const RmsNormForward& a) {
  with_types(a.x.dtype, a.y.dtype, [&](auto x, auto y) { forward<decltype(x), decltype(y)>(a); });
}

void rms_norm_backward(const RmsNormBackward& a) {
  with_types(a.x.dtype, a.dy.dtype, [&](auto x, auto y) { backward<decltype(x), decltype(y)>(a); });
}

}  // namespace imf::IMF_ISA

// RMSNorm with its tangent, its primal backward and that of the pair. Formulas: imf_kernels/ops/rms_norm.py.
#include "ops/rms_norm.h"

#include "cpu/dtypes.h"
#include "cpu/rms.h"

namespace imf::IMF_ISA {
namespace {

template <typename X, typename Y>
void forward(const RmsNormForward& a) {
  const index_t width = a.x.width;
  const double share = 1.0 / static_cast<double>(width);
  for_each_row(a.y, a.y_dot, a.place.threads, [&](auto number, index_t row, index_t t) {
    const auto x = dual_row<decltype(number), const X>(a.x, row, a.x_dot, t);
    const auto y = dual_row<decltype(number), Y>(a.y, row, a.y_dot, t);
    const float* weight = a.weight.data;
    const auto rstd = inverse_rms(x, width, share, a.eps, a.rstd.data + row);
    for_each_vec(width, [&](index_t j, int lanes) {
      y.store(j, x(j, lanes) * rstd * load_lanes(weight + j, lanes), lanes);
    });
  });
}

// Of a row, from the duals (x, x_dot) and (dy_dot, dy) or from x and dy.
template <typename X, typename Number, typename Y, typename Arguments>
IMF_ALWAYS_INLINE void backward_of_row(const Arguments& a, index_t row, DualRow<Number, const X> x,
                                       DualRow<Number, const Y> dy, float* dweight, DualRow<Number, X> dx) {
  const float* weight = a.weight.data;
  const auto g = [&](index_t j, int lanes) { return dy(j, lanes) * load_lanes(weight + j, lanes); };
  const Number rstd = stored_rstd<Number>(x, a.x.width, a.rstd.data[row]);
  rms_norm_backward(a.x.width, x, weight, rstd, dy, g, dweight, dx);
}

template <typename X, typename Y>
void backward(const RmsNormBackward& a) {
  const index_t rows = a.x.rows, width = a.x.width;
  const int team = team_size(a.place.threads, 2 * rows * width, rows);
  sum_over_groups(1, rows, width, team, a.partial, a.dweight, [&](index_t row, float* dweight) {
    const DualRow<Vec, const X> x{row_of<const X>(a.x, row), nullptr};
    const DualRow<Vec, const Y> dy{row_of<const Y>(a.dy, row), nullptr};
    backward_of_row<X>(a, row, x, dy, dweight, DualRow<Vec, X>{row_of<X>(a.dx, row), nullptr});
  });
}

template <typename X, typename Y>
void backward(const RmsNormPairBackward& a) {
  const index_t rows = a.x.rows, first = rows - a.x_dot.rows, width = a.x.width;
  const int team = team_size(a.place.threads, 4 * rows * width, rows);
  sum_over_groups(1, rows, width, team, a.partial, a.dweight, [&](index_t row, float* dweight) {
    with_number(row >= first, [&](auto number) {
      using Number = decltype(number);
      const auto x = dual_row<Number, const X>(a.x, row, a.x_dot, row - first);
      const auto dy = cotangent_row<Number, const Y>(a.dy, row, a.dy_dot, row - first);
      backward_of_row<X>(a, row, x, dy, dweight, cotangent_row<Number, X>(a.dx, row, a.dx_dot, row - first));
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

void rms_norm_pair_backward(const RmsNormPairBackward& a) {
  with_types(a.x.dtype, a.dy.dtype, [&](auto x, auto y) { backward<decltype(x), decltype(y)>(a); });
}

}  // namespace imf::IMF_ISA

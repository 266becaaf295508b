// RMSNorm with its tangent, and its primal backward. Formulas: imf_kernels/ops/rms_norm.py.
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

template <typename X, typename Y>
void backward(const RmsNormBackward& a) {
  const index_t rows = a.x.rows, width = a.x.width;
  const int team = team_size(a.place.threads, 2 * rows * width, rows);
  sum_over_groups(1, rows, width, team, a.partial, a.dweight, [&](index_t row, float* dweight) {
    const Y* dy = row_of<const Y>(a.dy, row);
    const auto dn = [&](index_t j, int lanes) { return load_lanes(dy + j, lanes); };
    const auto g = [&](index_t j, int lanes) { return dn(j, lanes) * load_lanes(a.weight.data + j, lanes); };
    rms_norm_backward(width, row_of<const X>(a.x, row), a.weight.data, a.rstd.data[row], dn, g, dweight,
                      row_of<X>(a.dx, row));
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

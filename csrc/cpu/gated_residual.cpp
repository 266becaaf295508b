// Gated residual with its tangent, and its primal backward. The formulas are in
// imf_kernels/ops/gated_residual.py.
#include "cpu/gated_residual.h"

#include "cpu/dtypes.h"
#include "cpu/parallel.h"
#include "cpu/rows.h"

namespace imf {
namespace IMF_ISA {
namespace {

template <typename X, typename B>
void forward(const GatedResidualForward& a) {
  const X* x = static_cast<const X*>(a.x);
  const X* x_dot = static_cast<const X*>(a.x_dot);
  const B* branch = static_cast<const B*>(a.branch);
  const B* branch_dot = static_cast<const B*>(a.branch_dot);
  X* y = static_cast<X*>(a.y);
  X* y_dot = static_cast<X*>(a.y_dot);
  const index_t first_tangent = a.rows - a.tangent_rows;
  const int team = team_size(a.threads, (a.rows + a.tangent_rows) * a.width, a.rows);

  on_each_thread(team, [&](int thread) {
    const Range share = share_of_rows(a.rows, a.tangent_rows, thread, team);
    for (index_t row = share.begin; row < share.end; ++row) {
      const X* xi = x + row * a.x_stride;
      const B* bi = branch + row * a.branch_stride;
      const index_t group = row / a.length * a.width;
      const float* gate = a.gate + group;
      X* yi = y + row * a.width;
      const auto primal = [&](index_t j, int lanes, Vec b, Vec g) {
        store_lanes(yi + j, fma(b, g, load_lanes(xi + j, lanes)), lanes);
      };
      if (row < first_tangent) {
        for_each_vec(a.width, [&](index_t j, int lanes) {
          primal(j, lanes, load_lanes(bi + j, lanes), load_lanes(gate + j, lanes));
        });
        continue;
      }
      const index_t t = row - first_tangent;
      const index_t xt = t * a.x_dot_stride, bt = t * a.branch_dot_stride;
      const index_t gt = group - first_tangent / a.length * a.width;
      X* y_dot_i = y_dot + t * a.width;
      for_each_vec(a.width, [&](index_t j, int lanes) {
        const Vec b = load_lanes(bi + j, lanes), g = load_lanes(gate + j, lanes);
        primal(j, lanes, b, g);
        Vec tangent = fma(load_or_zero(branch_dot, bt + j, lanes), g, load_or_zero(x_dot, xt + j, lanes));
        if (a.gate_dot) tangent = fma(b, load_lanes(a.gate_dot + gt + j, lanes), tangent);
        store_lanes(y_dot_i + j, tangent, lanes);
      });
    }
  });
}

template <typename X, typename B>
void backward(const GatedResidualBackward& a) {
  const X* dy = static_cast<const X*>(a.dy);
  const B* branch = static_cast<const B*>(a.branch);
  B* dbranch = static_cast<B*>(a.dbranch);
  const index_t rows = a.groups * a.length;
  const int team = team_size(a.threads, 2 * rows * a.width, rows);

  sum_over_groups(a.groups, a.length, a.width, team, a.dgate, [&](index_t row, float* dgate) {
    const X* dyi = dy + row * a.dy_stride;
    const B* bi = branch + row * a.branch_stride;
    const float* gate = a.gate + row / a.length * a.width;
    B* dbi = dbranch + row * a.width;
    for_each_vec(a.width, [&](index_t j, int lanes) {
      const Vec d = load_lanes(dyi + j, lanes);
      store_lanes(dbi + j, d * load_lanes(gate + j, lanes), lanes);
      store_lanes(dgate + j, fma(d, load_lanes(bi + j, lanes), load_lanes(dgate + j, lanes)), lanes);
    });
  });
}

}  // namespace

void gated_residual_forward(const GatedResidualForward& a) {
  with_types(a.x_type, a.branch_type, [&](auto x, auto b) { forward<decltype(x), decltype(b)>(a); });
}

void gated_residual_backward(const GatedResidualBackward& a) {
  with_types(a.x_type, a.branch_type, [&](auto x, auto b) { backward<decltype(x), decltype(b)>(a); });
}

}  // namespace IMF_ISA
}  // namespace imf

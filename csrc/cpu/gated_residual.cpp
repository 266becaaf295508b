// Gated residual with its tangent, and its primal backward. Formulas: imf_kernels/ops/gated_residual.py.
#include "ops/gated_residual.h"

#include "cpu/dtypes.h"
#include "cpu/parallel.h"
#include "cpu/rows.h"

namespace imf::IMF_ISA {
namespace {

template <typename X, typename B>
void forward(const GatedResidualForward& a) {
  const X* x = static_cast<const X*>(a.x.data);
  const X* x_dot = static_cast<const X*>(a.x_dot.data);
  const B* branch = static_cast<const B*>(a.branch.data);
  const B* branch_dot = static_cast<const B*>(a.branch_dot.data);
  X* y = static_cast<X*>(a.y.data);
  X* y_dot = static_cast<X*>(a.y_dot.data);
  const index_t rows = a.x.rows, tangent_rows = a.y_dot.rows, width = a.x.width;
  const index_t length = a.gate.rows > 1 ? rows / a.gate.rows : rows, first_tangent = rows - tangent_rows;
  const int team = team_size(a.place.threads, (rows + tangent_rows) * width, rows);

  on_each_thread(team, [&](int thread) {
    const Range share = share_of_rows(rows, tangent_rows, thread, team);
    for (index_t row = share.begin; row < share.end; ++row) {
      const X* xi = x + row * a.x.stride;
      const B* bi = branch + row * a.branch.stride;
      const index_t group = row / length * width;
      const float* gate = a.gate.data + group;
      X* yi = y + row * a.y.stride;
      const auto primal = [&](index_t j, int lanes, Vec b, Vec g) {
        store_lanes(yi + j, fma(b, g, load_lanes(xi + j, lanes)), lanes);
      };
      if (row < first_tangent) {
        for_each_vec(width, [&](index_t j, int lanes) {
          primal(j, lanes, load_lanes(bi + j, lanes), load_lanes(gate + j, lanes));
        });
        continue;
      }
      const index_t t = row - first_tangent;
      const index_t xt = t * a.x_dot.stride, bt = t * a.branch_dot.stride;
      const index_t gt = group - first_tangent / length * width;
      X* y_dot_i = y_dot + t * a.y_dot.stride;
      for_each_vec(width, [&](index_t j, int lanes) {
        const Vec b = load_lanes(bi + j, lanes), g = load_lanes(gate + j, lanes);
        primal(j, lanes, b, g);
        Vec tangent = fma(load_or_zero(branch_dot, bt + j, lanes), g, load_or_zero(x_dot, xt + j, lanes));
        if (a.gate_dot.data) tangent = fma(b, load_lanes(a.gate_dot.data + gt + j, lanes), tangent);
        store_lanes(y_dot_i + j, tangent, lanes);
      });
    }
  });
}

template <typename X, typename B>
void backward(const GatedResidualBackward& a) {
  const X* dy = static_cast<const X*>(a.dy.data);
  const B* branch = static_cast<const B*>(a.branch.data);
  B* dbranch = static_cast<B*>(a.dbranch.data);
  const index_t rows = a.branch.rows, width = a.branch.width, groups = a.dgate.rows;
  const index_t length = groups > 1 ? rows / groups : rows;
  const int team = team_size(a.place.threads, 2 * rows * width, rows);

  sum_over_groups(groups, length, width, team, a.partial, a.dgate, [&](index_t row, float* dgate) {
    const X* dyi = dy + row * a.dy.stride;
    const B* bi = branch + row * a.branch.stride;
    const float* gate = a.gate.data + row / length * width;
    B* dbi = dbranch + row * a.dbranch.stride;
    for_each_vec(width, [&](index_t j, int lanes) {
      const Vec d = load_lanes(dyi + j, lanes);
      store_lanes(dbi + j, d * load_lanes(gate + j, lanes), lanes);
      store_lanes(dgate + j, fma(d, load_lanes(bi + j, lanes), load_lanes(dgate + j, lanes)), lanes);
    });
  });
}

}  // namespace

void gated_residual_forward(const GatedResidualForward& a) {
  with_types(a.x.dtype, a.branch.dtype, [&](auto x, auto b) { forward<decltype(x), decltype(b)>(a); });
}

void gated_residual_backward(const GatedResidualBackward& a) {
  with_types(a.dy.dtype, a.branch.dtype, [&](auto x, auto b) { backward<decltype(x), decltype(b)>(a); });
}

}  // namespace imf::IMF_ISA

// Gated residual with its tangent, its primal backward and that of the pair. Formulas:
// imf_kernels/ops/gated_residual.py.
#include "ops/gated_residual.h"

#include "cpu/dtypes.h"
#include "cpu/duals.h"
#include "cpu/rows.h"

namespace imf::IMF_ISA {
namespace {

template <typename X, typename B>
void forward(const GatedResidualForward& a) {
  const index_t width = a.x.width, first_tangent = a.x.rows - a.y_dot.rows;
  const index_t length = length_of(a.x.rows, a.gate.rows, a.y_dot.rows, a.gate_dot.rows);
  for_each_row(a.y, a.y_dot, a.place.threads, [&](auto number, index_t row, index_t t) {
    using Number = decltype(number);
    const index_t group = row / length, t_group = group - first_tangent / length;
    const auto x = dual_row<Number, const X>(a.x, row, a.x_dot, t);
    const auto branch = dual_row<Number, const B>(a.branch, row, a.branch_dot, t);
    const auto gate = dual_row<Number>(a.gate, group, a.gate_dot, t_group);
    const auto y = dual_row<Number, X>(a.y, row, a.y_dot, t);
    for_each_vec(width, [&](index_t j, int lanes) {
      const Number b = branch.or_zero(j, lanes);
      Number yj = fma(b, load_lanes(gate.primal + j, lanes), x.or_zero(j, lanes));
      if constexpr (is_dual<Number>) {
        // Without a tangent of the gate nothing is added: 0 times an infinite branch would be NaN.
        if (gate.tangent) yj.tangent = fma(b.primal, load_lanes(gate.tangent + j, lanes), yj.tangent);
      }
      y.store(j, yj, lanes);
    });
  });
}

template <typename X, typename B>
void backward(const GatedResidualBackward& a) {
  const index_t rows = a.branch.rows, width = a.branch.width, groups = a.dgate.rows;
  const index_t length = length_of(rows, groups);
  const int team = team_size(a.place.threads, 2 * rows * width, rows);

  sum_over_groups(groups, length, width, team, a.partial, a.dgate, [&](index_t row, float* dgate) {
    const X* dy = row_of<const X>(a.dy, row);
    const B* branch = row_of<const B>(a.branch, row);
    const float* gate = row_of(a.gate, row / length);
    B* dbranch = row_of<B>(a.dbranch, row);
    for_each_vec(width, [&](index_t j, int lanes) {
      const Vec d = load_lanes(dy + j, lanes);
      store_lanes(dbranch + j, d * load_lanes(gate + j, lanes), lanes);
      store_lanes(dgate + j, fma(d, load_lanes(branch + j, lanes), load_lanes(dgate + j, lanes)), lanes);
    });
  });
}

template <typename X, typename B>
void backward(const GatedResidualPairBackward& a) {
  const index_t rows = a.branch.rows, width = a.branch.width, groups = a.sums.rows / 2;
  const index_t length = length_of(rows, groups, a.dy_dot.rows, a.gate_dot.rows);
  const index_t first = rows - a.dy_dot.rows;
  const int team = team_size(a.place.threads, 4 * rows * width, rows);

  sum_over_groups(groups, length, 2 * width, team, a.partial, a.sums, [&](index_t row, float* dgate) {
    float* dgate_dot = dgate + width;
    const index_t t = row - first, group = row / length, t_group = group - first / length;
    with_number(t >= 0, [&](auto number) {
      using Number = decltype(number);
      const auto dy = cotangent_row<Number, const X>(a.dy, row, a.dy_dot, t);
      const auto branch = dual_row<Number, const B>(a.branch, row, a.branch_dot, t);
      const auto gate = dual_row<Number>(a.gate, group, a.gate_dot, t_group);
      const auto dbranch = cotangent_row<Number, B>(a.dbranch, row, a.dbranch_dot, t);
      for_each_vec(width, [&](index_t j, int lanes) {
        const Number d = dy(j, lanes);
        const Number db = d * gate.or_zero(j, lanes), dg = d * branch.or_zero(j, lanes);
        dbranch.store_given(j, db, lanes);
        store_lanes(dgate + j, load_lanes(dgate + j, lanes) + of_weight(dg), lanes);
        if constexpr (is_dual<Number>) {
          store_lanes(dgate_dot + j, load_lanes(dgate_dot + j, lanes) + dg.primal, lanes);
        }
      });
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

void gated_residual_pair_backward(const GatedResidualPairBackward& a) {
  with_types(a.dy.dtype, a.branch.dtype, [&](auto x, auto b) { backward<decltype(x), decltype(b)>(a); });
}

}  // namespace imf::IMF_ISA

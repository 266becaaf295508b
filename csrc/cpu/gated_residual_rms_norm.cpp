// Gated residual and the RMSNorm that follows it, with tangents, the primal backward and that of the pair.
// Formulas: imf_kernels/ops/gated_residual_rms_norm.py.
#include "ops/gated_residual_rms_norm.h"

#include "cpu/dtypes.h"
#include "cpu/rms.h"

namespace imf::IMF_ISA {
namespace {

template <typename X, typename B, typename Y>
void forward(const GatedResidualRmsNormForward& a) {
  const index_t width = a.x.width;
  const double share = 1.0 / static_cast<double>(width);
  for_each_row(a.y, a.y_dot, a.place.threads, [&](auto number, index_t row, index_t t) {
    using Number = decltype(number);
    const auto x = dual_row<Number, const X>(a.x, row, a.x_dot, t);
    const auto branch = dual_row<Number, const B>(a.branch, row, a.branch_dot, t);
    const auto stream = dual_row<Number, X>(a.stream, row, a.stream_dot, t);
    const auto y = dual_row<Number, Y>(a.y, row, a.y_dot, t);
    const float *gate = a.gate.data, *weight = a.weight.data;
    for_each_vec(width, [&](index_t j, int lanes) {
      stream.store(j, fma(branch.or_zero(j, lanes), load_lanes(gate + j, lanes), x.or_zero(j, lanes)), lanes);
    });
    // Of the stream as rounded, which is in the cache.
    const Number rstd = inverse_rms(stream, width, share, a.eps, a.rstd.data + row);
    for_each_vec(width, [&](index_t j, int lanes) {
      y.store(j, stream(j, lanes) * rstd * load_lanes(weight + j, lanes), lanes);
    });
  });
}

// A row of the duals (x, x_dot), ..., and of the cotangents (dy_dot, dy), ..., or of primals alone.
template <typename X, typename B, typename Y, typename Number>
struct BackwardRow {
  DualRow<Number, const X> x, dstream;
  DualRow<Number, const Y> dy;
  DualRow<Number, const B> branch;
  DualRow<Number, X> dx;
  DualRow<Number, B> dbranch;
  const X* of_stream;
  const float *gate, *weight;
  float* dgate;

  template <typename Arguments>
  BackwardRow(const Arguments& a, index_t row, float* dgate)
      : of_stream(row_of<const X>(a.stream, row)), gate(a.gate.data), weight(a.weight.data), dgate(dgate) {
    if constexpr (is_dual<Number>) {
      const index_t t = row - (a.stream.rows - a.dy_dot.rows);
      x.tangent = row_of<const X>(a.x_dot, t);
      dstream = cotangent_row<Number, const X>(a.dstream, row, a.dstream_dot, t);
      dy = cotangent_row<Number, const Y>(a.dy, row, a.dy_dot, t);
      branch = dual_row<Number, const B>(a.branch, row, a.branch_dot, t);
      dx = cotangent_row<Number, X>(a.dx, row, a.dx_dot, t);
      dbranch = cotangent_row<Number, B>(a.dbranch, row, a.dbranch_dot, t);
    } else {
      dstream.primal = row_of<const X>(a.dstream, row);
      dy.primal = row_of<const Y>(a.dy, row);
      branch.primal = row_of<const B>(a.branch, row);
      dx.primal = row_of<X>(a.dx, row);
      dbranch.primal = row_of<B>(a.dbranch, row);
    }
  }

  Number stream(index_t j, int lanes) const {
    const Vec s = load_lanes(of_stream + j, lanes);
    if constexpr (is_dual<Number>) {
      return {s, fma(load_or_zero(branch.tangent, j, lanes), load_lanes(gate + j, lanes),
                     load_or_zero(x.tangent, j, lanes))};
    } else {
      return s;
    }
  }
  // Takes the norm's gradient of the stream, and stores or adds to all that follow from it.
  void store(index_t j, Number of_norm, int lanes) const {
    const Number d = of_norm + dstream.or_zero(j, lanes);
    dx.store_given(j, d, lanes);
    dbranch.store_given(j, d * load_lanes(gate + j, lanes), lanes);
    store_lanes(dgate + j, load_lanes(dgate + j, lanes) + of_weight(d * branch.or_zero(j, lanes)), lanes);
  }
};

template <typename X, typename B, typename Y, typename Arguments>
void backward(const Arguments& a) {
  constexpr bool pair = std::is_same_v<Arguments, GatedResidualRmsNormPairBackward>;
  const index_t rows = a.stream.rows, width = a.stream.width;
  const int team = team_size(a.place.threads, (pair ? 8 : 4) * rows * width, rows);
  sum_over_groups(1, rows, 2 * width, team, a.partial, a.sums, [&](index_t row, float* dgate) {
    const auto of_row = [&](auto number) {
      using Number = decltype(number);
      const BackwardRow<X, B, Y, Number> parts(a, row, dgate);
      const auto stream = [&](index_t j, int lanes) { return parts.stream(j, lanes); };
      const auto g = [&](index_t j, int lanes) {
        return parts.dy(j, lanes) * load_lanes(parts.weight + j, lanes);
      };
      const Number rstd = stored_rstd<Number>(stream, width, a.rstd.data[row]);
      rms_norm_backward(width, stream, parts.weight, rstd, parts.dy, g, dgate + width, parts);
    };
    if constexpr (pair) {
      with_number(row >= rows - a.dy_dot.rows, of_row);
    } else {
      of_row(Vec());
    }
  });
}

// Calls body with values of the types of stream, branch and y: the latter is the stream's or bf16.
template <typename Body>
void with_three_types(DType stream, DType branch, DType y, Body body) {
  with_types(stream, branch, [&](auto x, auto b) {
    if (y == stream) {
      body(x, b, x);
    } else if (y == DType::bfloat16) {
      body(x, b, bfloat16{});
    } else {
      refuse("y must be of the stream's dtype or bfloat16");
    }
  });
}

}  // namespace

void gated_residual_rms_norm_forward(const GatedResidualRmsNormForward& a) {
  with_three_types(a.x.dtype, a.branch.dtype, a.y.dtype,
                   [&](auto x, auto b, auto y) { forward<decltype(x), decltype(b), decltype(y)>(a); });
}

void gated_residual_rms_norm_backward(const GatedResidualRmsNormBackward& a) {
  with_three_types(a.stream.dtype, a.branch.dtype, a.dy.dtype,
                   [&](auto x, auto b, auto y) { backward<decltype(x), decltype(b), decltype(y)>(a); });
}

void gated_residual_rms_norm_pair_backward(const GatedResidualRmsNormPairBackward& a) {
  with_three_types(a.stream.dtype, a.branch.dtype, a.dy.dtype,
                   [&](auto x, auto b, auto y) { backward<decltype(x), decltype(b), decltype(y)>(a); });
}

}  // namespace imf::IMF_ISA

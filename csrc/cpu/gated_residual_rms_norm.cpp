// Gated residual and the RMSNorm that follows it, with tangents, and the primal backward. Formulas:
// imf_kernels/ops/gated_residual_rms_norm.py.
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

// Takes the norm's gradient of a row of the stream, and writes or adds to all that follow from it.
template <typename X, typename B>
struct Gradients {
  const X* dstream;
  const B* branch;
  const float* gate;
  X* dx;
  B* dbranch;
  float* dgate;

  void store(index_t j, Vec of_norm, int lanes) const {
    const Vec d = of_norm + load_or_zero(dstream, j, lanes);
    store_lanes(dx + j, d, lanes);
    store_lanes(dbranch + j, d * load_lanes(gate + j, lanes), lanes);
    store_lanes(dgate + j, fma(d, load_lanes(branch + j, lanes), load_lanes(dgate + j, lanes)), lanes);
  }
};

template <typename X, typename B, typename Y>
void backward(const GatedResidualRmsNormBackward& a) {
  const index_t rows = a.stream.rows, width = a.stream.width;
  const int team = team_size(a.place.threads, 4 * rows * width, rows);
  sum_over_groups(1, rows, 2 * width, team, a.partial, a.sums, [&](index_t row, float* dgate) {
    const DualRow<Vec, const X> stream{row_of<const X>(a.stream, row), nullptr};
    const DualRow<Vec, const Y> dy{row_of<const Y>(a.dy, row), nullptr};
    const auto g = [&](index_t j, int lanes) { return dy(j, lanes) * load_lanes(a.weight.data + j, lanes); };
    const Gradients<X, B> dx{row_of<const X>(a.dstream, row),
                             row_of<const B>(a.branch, row),
                             a.gate.data,
                             row_of<X>(a.dx, row),
                             row_of<B>(a.dbranch, row),
                             dgate};
    rms_norm_backward<Vec, X>(width, stream, a.weight.data, Vec(a.rstd.data[row]), dy, g, dgate + width, dx);
  });
}

// Calls body with values of the types of stream, branch and y: the latter is the stream's or bf16.
template <typename Body>
void with_three_types(DType stream, DType branch, DType y, Body body) {
  with_types(stream, branch, [&](auto x, auto b) {
    if (y == stream) {
      body(x, b, x);
    } else {
      body(x, b, bfloat16{});
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

}  // namespace imf::IMF_ISA

// Launcher of attention for compute capability 9.0: kernel, tensor maps, blocks. bfloat16; widths
// up to 128 and, like strides, multiples of 8; addresses multiples of 16 bytes; at least one key.
#include <stdexcept>

#include "cuda/attention_sm90.cuh"
#include "cuda/ptx/launch.h"
#include "ops/attention.h"

namespace imf::cuda {
namespace {

using namespace sm90;

// Returns the tensor map of samples `first` to `first + samples` of x, in boxes of `rows` rows.
ptx::TensorMap map_of(const Heads& x, index_t first, index_t samples, int rows, int box) {
  const auto size = [](index_t n) { return static_cast<std::uint64_t>(n); };
  // A dimension of size one may have any stride, even one that a tensor map cannot hold.
  const auto stride = [](index_t n, index_t step) {
    return static_cast<std::uint64_t>(n == 1 ? 16 : 2 * step);
  };
  return ptx::tensor_map(
      {static_cast<std::uint16_t*>(x.data) + first * x.stride[0],
       {size(x.width), size(x.length), size(x.heads), size(samples)},
       {stride(x.length, x.stride[2]), stride(x.heads, x.stride[1]), stride(samples, x.stride[0])},
       static_cast<std::uint32_t>(rows),
       static_cast<std::uint32_t>(box),
       static_cast<ptx::Swizzle>(2 * box)});
}

// Runs samples `first` to `first + samples`; tangents, if any, begin with `first`.
template <int width, Tangents tangents>
void run(const AttentionForward& a, index_t first, index_t samples) {
  using S = Tiles<width, tangents>;
  const index_t heads = a.q.heads, queries = a.q.length;
  const auto map_of_tangent = [&](const Heads& x, int rows, ptx::TensorMap primal) {
    return x.data ? map_of(x, 0, samples, rows, S::box) : primal;
  };
  const auto first_row = [](const Heads& x_dot, const Heads& x) {
    return x_dot.data ? 0 : static_cast<int>(x.length);
  };
  Parameters p{};
  p.q = map_of(a.q, first, samples, unit_rows, S::box);
  p.k = map_of(a.k, first, samples, S::keys, S::box);
  p.v = map_of(a.v, first, samples, S::keys, S::box);
  p.q_dot = map_of_tangent(a.q_dot, unit_rows, p.q);
  p.k_dot = map_of_tangent(a.k_dot, S::keys, p.k);
  p.v_dot = map_of_tangent(a.v_dot, S::keys, p.v);
  p.q_dot_row = first_row(a.q_dot, a.q);
  p.k_dot_row = first_row(a.k_dot, a.k);
  p.v_dot_row = first_row(a.v_dot, a.v);
  p.heads = static_cast<int>(heads);
  p.group = static_cast<int>(heads / a.k.heads);
  p.queries = static_cast<int>(queries);
  p.keys = static_cast<int>(a.k.length);
  p.value_width = static_cast<int>(a.v.width);
  p.all_heads = static_cast<int>(samples * heads);
  p.units = static_cast<int>((queries + unit_rows - 1) / unit_rows);
  p.items = items_of(p.all_heads, p.units);
  p.scale = a.scale;
  p.out = static_cast<std::uint16_t*>(a.out.data) + first * a.out.stride[0];
  p.out_dot = a.out_dot.data;
  for (int i = 0; i < 3; ++i) {
    p.out_stride[i] = a.out.stride[i];
    p.out_dot_stride[i] = a.out_dot.stride[i];
  }
  p.lse = a.lse.data + first * heads * queries;
  const int processors = ptx::processors(a.place.device);
  ptx::launch(attention_kernel<width, tangents>, p.items < processors ? p.items : processors, threads,
              S::shared, a.place.stream, p, "attention_forward");
}

template <int width>
void forward(const AttentionForward& a) {
  const index_t tangents = a.out_dot.batch, first = a.out.batch - tangents;
  if (first > 0) run<width, Tangents::none>(a, 0, first);
  if (tangents == 0) return;
  if (a.k_dot.data || a.v_dot.data) {
    run<width, Tangents::all>(a, first, tangents);
  } else {
    run<width, Tangents::of_query>(a, first, tangents);
  }
}

void forward(const AttentionForward& a) {
  const index_t width = a.q.width > a.v.width ? a.q.width : a.v.width;
  if (width <= 64) return forward<64>(a);
  if (width <= 80) return forward<80>(a);
  if (width <= 96) return forward<96>(a);
  return forward<128>(a);
}

}  // namespace

void attention_forward(const AttentionForward& a) {
  if (a.q.dtype != DType::bfloat16) throw std::invalid_argument("it takes bfloat16");
  if (a.mask.data || a.is_causal) throw std::invalid_argument("it takes no mask and no is_causal");
  if (a.out.batch * a.out.heads * a.out.length * a.out.width == 0) return;
  const DeviceGuard guard(a.place.device);
  forward(a);
}

}  // namespace imf::cuda

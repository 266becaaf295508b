// Launches attention on compute capability 9.0: which kernel, the descriptions of the tensors, how many
// blocks.
#include <stdexcept>

#include "cuda/attention.h"
#include "cuda/attention_sm90.cuh"
#include "cuda/ptx/launch.h"

namespace imf::cuda {
namespace {

using namespace sm90;

// Samples `first` to `first + samples` of a tensor [batch, heads, length, width], in boxes of `rows` of its
// rows.
ptx::TensorMap map_of(const HeadsTensor& x, index_t first, index_t samples, index_t heads, index_t length,
                      index_t width, int rows, int box) {
  const auto size = [](index_t n) { return static_cast<std::uint64_t>(n); };
  // A dimension of one has any stride, even one that cannot be described.
  const auto stride = [](index_t n, index_t step) {
    return static_cast<std::uint64_t>(n == 1 ? 16 : 2 * step);
  };
  ptx::Boxes boxes{};
  boxes.data = static_cast<std::uint16_t*>(x.data) + first * x.stride[0];
  boxes.sizes[0] = size(width);
  boxes.sizes[1] = size(length);
  boxes.sizes[2] = size(heads);
  boxes.sizes[3] = size(samples);
  boxes.strides[0] = stride(length, x.stride[2]);
  boxes.strides[1] = stride(heads, x.stride[1]);
  boxes.strides[2] = stride(samples, x.stride[0]);
  boxes.rows = static_cast<std::uint32_t>(rows);
  boxes.columns = static_cast<std::uint32_t>(box);
  boxes.swizzle = static_cast<ptx::Swizzle>(2 * box);
  return ptx::tensor_map(boxes);
}

// Samples `first` to `first + samples`; where there are tangents, they begin with `first`.
template <typename T, int width, Tangents tangents>
void run(const AttentionForward& a, index_t first, index_t samples) {
  using S = Tiles<width, tangents>;
  const index_t kv_heads = a.heads / a.group;
  const auto queries = [&](const HeadsTensor& x, index_t from) {
    return map_of(x, from, samples, a.heads, a.queries, a.width, unit_rows, S::box);
  };
  const auto keys = [&](const HeadsTensor& x, index_t from, index_t columns) {
    return map_of(x, from, samples, kv_heads, a.keys, columns, S::keys, S::box);
  };
  Parameters p{};
  p.q = queries(a.q, first);
  p.k = keys(a.k, first, a.width);
  p.v = keys(a.v, first, a.value_width);
  p.q_dot = a.q_dot.data ? queries(a.q_dot, 0) : p.q;
  p.k_dot = a.k_dot.data ? keys(a.k_dot, 0, a.width) : p.k;
  p.v_dot = a.v_dot.data ? keys(a.v_dot, 0, a.value_width) : p.v;
  p.q_dot_row = a.q_dot.data ? 0 : static_cast<int>(a.queries);
  p.k_dot_row = a.k_dot.data ? 0 : static_cast<int>(a.keys);
  p.v_dot_row = a.v_dot.data ? 0 : static_cast<int>(a.keys);
  p.heads = static_cast<int>(a.heads);
  p.group = static_cast<int>(a.group);
  p.queries = static_cast<int>(a.queries);
  p.keys = static_cast<int>(a.keys);
  p.value_width = static_cast<int>(a.value_width);
  p.all_heads = static_cast<int>(samples * a.heads);
  p.units = static_cast<int>((a.queries + unit_rows - 1) / unit_rows);
  p.items = items_of(p.all_heads, p.units);
  p.scale = a.scale;
  p.out = static_cast<std::uint16_t*>(a.out.data) + first * a.out.stride[0];
  p.out_dot = a.out_dot.data;
  for (int i = 0; i < 3; ++i) {
    p.out_stride[i] = a.out.stride[i];
    p.out_dot_stride[i] = a.out_dot.stride[i];
  }
  p.lse = a.lse + first * a.heads * a.queries;
  const int processors = ptx::processors(a.device);
  ptx::launch(attention_kernel<T, width, tangents>, p.items < processors ? p.items : processors, threads,
              S::shared, a.stream, p, "attention_forward");
}

template <typename T, int width>
void forward(const AttentionForward& a) {
  const index_t first = a.batch - a.tangent_batch;
  if (first > 0) run<T, width, Tangents::none>(a, 0, first);
  if (a.tangent_batch == 0) return;
  if (a.k_dot.data || a.v_dot.data) {
    run<T, width, Tangents::all>(a, first, a.tangent_batch);
  } else {
    run<T, width, Tangents::of_query>(a, first, a.tangent_batch);
  }
}

template <typename T>
void forward(const AttentionForward& a) {
  const index_t width = a.width > a.value_width ? a.width : a.value_width;
  if (width <= 64) return forward<T, 64>(a);
  if (width <= 80) return forward<T, 80>(a);
  if (width <= 96) return forward<T, 96>(a);
  return forward<T, 128>(a);
}

}  // namespace

void attention_forward(const AttentionForward& a) {
  if (a.batch * a.heads * a.queries * a.value_width == 0) return;
  const DeviceGuard guard(a.device);
  if (a.type == DType::bfloat16) return forward<bfloat16>(a);
  if (a.type == DType::float16) return forward<float16>(a);
  throw std::invalid_argument("attention_forward: it takes bfloat16 and float16");
}

}  // namespace imf::cuda

// Condition tokens put before the patch tokens, with the tangent. The formula is in
// imf_kernels/ops/prepend_tokens.py.
#include "cpu/prepend_tokens.h"

#include "cpu/dtypes.h"
#include "cpu/parallel.h"
#include "cpu/vec.h"

namespace imf {
namespace IMF_ISA {
namespace {

template <typename T>
void forward(const PrependTokensForward& a) {
  const T* x = static_cast<const T*>(a.x);
  const T* x_dot = static_cast<const T*>(a.x_dot);
  const index_t total = a.prefix + a.length;
  const index_t first_tangent = a.batch - a.tangent_batch;
  const std::size_t row_bytes = static_cast<std::size_t>(a.width) * sizeof(T);
  const int team = team_size(a.threads, (a.batch + a.tangent_batch) * total * a.width, a.batch);

  on_each_thread(team, [&](int thread) {
    const Range share = share_of_rows(a.batch, a.tangent_batch, thread, team);
    for (index_t b = share.begin; b < share.end; ++b) {
      T* y = static_cast<T*>(a.y) + b * total * a.width;
      for (index_t g = 0; g < a.group_count; ++g) {
        const TokenGroup& group = a.groups[g];
        const T* tokens = static_cast<const T*>(group.tokens);
        const T* embedding = static_cast<const T*>(group.embedding) + b * a.width;
        for (index_t i = 0; i < group.count; ++i, y += a.width) {
          for_each_vec(a.width, [&](index_t j, int lanes) {
            const Vec token = load_lanes(tokens + i * a.width + j, lanes);
            store_lanes(y + j, token + load_lanes(embedding + j, lanes), lanes);
          });
        }
      }
      std::memcpy(y, x + b * a.length * a.width, static_cast<std::size_t>(a.length) * row_bytes);
      if (b < first_tangent) continue;
      const index_t t = b - first_tangent;
      T* y_dot = static_cast<T*>(a.y_dot) + t * total * a.width;
      const auto put = [&](const T* rows, index_t row_count) {
        if (rows) {
          std::memcpy(y_dot, rows, static_cast<std::size_t>(row_count) * row_bytes);
        } else {
          std::memset(y_dot, 0, static_cast<std::size_t>(row_count) * row_bytes);
        }
        y_dot += row_count * a.width;
      };
      for (index_t g = 0; g < a.group_count; ++g) {
        const TokenGroup& group = a.groups[g];
        const T* embedding_dot = static_cast<const T*>(group.embedding_dot);
        const T* row = embedding_dot ? embedding_dot + t * a.width : nullptr;
        for (index_t i = 0; i < group.count; ++i) put(row, 1);
      }
      put(x_dot ? x_dot + t * a.length * a.width : nullptr, a.length);
    }
  });
}

}  // namespace

void prepend_tokens_forward(const PrependTokensForward& a) {
  with_type(a.type, [&](auto t) { forward<decltype(t)>(a); });
}

}  // namespace IMF_ISA
}  // namespace imf

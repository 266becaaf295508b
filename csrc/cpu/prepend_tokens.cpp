// Condition tokens put before the patch tokens, with the tangent. The formula is in
// imf_kernels/ops/prepend_tokens.py.
#include "cpu/prepend_tokens.h"

#include "cpu/dtypes.h"
#include "cpu/parallel.h"
#include "cpu/vec.h"

namespace imf {
namespace IMF_ISA {
namespace {

// Copies `count` values, or zeros where there is no source. Memory of no values may have no address, and
// memcpy and memset take none even of 0 bytes.
template <typename T>
inline void put(T* target, const T* source, index_t count) {
  if (count == 0) return;
  const std::size_t bytes = static_cast<std::size_t>(count) * sizeof(T);
  source ? std::memcpy(target, source, bytes) : std::memset(target, 0, bytes);
}

template <typename T>
void forward(const PrependTokensForward& a) {
  const T* x = static_cast<const T*>(a.x);
  const T* x_dot = static_cast<const T*>(a.x_dot);
  const index_t total = a.prefix + a.length;
  const index_t first_tangent = a.batch - a.tangent_batch;
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
      put(y, x + b * a.length * a.width, a.length * a.width);
      if (b < first_tangent) continue;
      const index_t t = b - first_tangent;
      T* y_dot = static_cast<T*>(a.y_dot) + t * total * a.width;
      for (index_t g = 0; g < a.group_count; ++g) {
        const TokenGroup& group = a.groups[g];
        const T* embedding_dot = static_cast<const T*>(group.embedding_dot);
        const T* row = embedding_dot ? embedding_dot + t * a.width : nullptr;
        for (index_t i = 0; i < group.count; ++i, y_dot += a.width) put(y_dot, row, a.width);
      }
      put(y_dot, x_dot ? x_dot + t * a.length * a.width : nullptr, a.length * a.width);
    }
  });
}

}  // namespace

void prepend_tokens_forward(const PrependTokensForward& a) {
  with_type(a.type, [&](auto t) { forward<decltype(t)>(a); });
}

}  // namespace IMF_ISA
}  // namespace imf

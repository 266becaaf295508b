// Condition tokens put before the patch tokens, with the tangent. The formula is in
// imf_kernels/ops/prepend_tokens.py.
#include "cpu/prepend_tokens.h"

#include "cpu/parallel.h"
#include "cpu/vec.h"

namespace imf {
namespace IMF_ISA {

void prepend_tokens_forward(const PrependTokensForward& a) {
  const index_t total = a.prefix + a.length;
  const index_t first_tangent = a.batch - a.tangent_batch;
  const std::size_t row_bytes = static_cast<std::size_t>(a.width) * sizeof(float);
  const int team = team_size(a.threads, (a.batch + a.tangent_batch) * total * a.width, a.batch);

  on_each_thread(team, [&](int thread) {
    const Range share = share_of_rows(a.batch, a.tangent_batch, thread, team);
    for (index_t b = share.begin; b < share.end; ++b) {
      float* y = a.y + b * total * a.width;
      for (index_t g = 0; g < a.group_count; ++g) {
        const TokenGroup& group = a.groups[g];
        for (index_t i = 0; i < group.count; ++i, y += a.width) {
          for_each_vec(a.width, [&](index_t j, int lanes) {
            const Vec token = load_lanes(group.tokens + i * a.width + j, lanes);
            store_lanes(y + j, token + load_lanes(group.embedding + b * a.width + j, lanes), lanes);
          });
        }
      }
      std::memcpy(y, a.x + b * a.length * a.width, static_cast<std::size_t>(a.length) * row_bytes);
      if (b < first_tangent) continue;
      const index_t t = b - first_tangent;
      float* y_dot = a.y_dot + t * total * a.width;
      const auto put = [&](const float* rows, index_t row_count) {
        if (rows) {
          std::memcpy(y_dot, rows, static_cast<std::size_t>(row_count) * row_bytes);
        } else {
          std::memset(y_dot, 0, static_cast<std::size_t>(row_count) * row_bytes);
        }
        y_dot += row_count * a.width;
      };
      for (index_t g = 0; g < a.group_count; ++g) {
        const TokenGroup& group = a.groups[g];
        const float* row = group.embedding_dot ? group.embedding_dot + t * a.width : nullptr;
        for (index_t i = 0; i < group.count; ++i) put(row, 1);
      }
      put(a.x_dot ? a.x_dot + t * a.length * a.width : nullptr, a.length);
    }
  });
}

}  // namespace IMF_ISA
}  // namespace imf

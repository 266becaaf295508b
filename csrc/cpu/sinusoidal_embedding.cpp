// Sinusoidal embedding of scalars with its tangent. The formula is in
// imf_kernels/ops/sinusoidal_embedding.py. Scalar sines: a row a sample is little work.
#include "cpu/sinusoidal_embedding.h"

#include <cmath>

#include "cpu/parallel.h"

namespace imf {
namespace IMF_ISA {

void sinusoidal_embedding_forward(const SinusoidalEmbeddingForward& a) {
  const index_t first_tangent = a.rows - a.tangent_rows;
  const int team = team_size(a.threads, 8 * a.rows * a.half, a.rows);

  on_each_thread(team, [&](int thread) {
    const Range share = share_of(a.rows, thread, team);
    for (index_t row = share.begin; row < share.end; ++row) {
      float* y = a.y + row * 2 * a.half;
      for (index_t i = 0; i < a.half; ++i) {
        const float angle = a.t[row] * a.frequencies[i];
        y[i] = ::cosf(angle);
        y[a.half + i] = ::sinf(angle);
      }
      if (row < first_tangent) continue;
      const index_t k = row - first_tangent;
      float* y_dot = a.y_dot + k * 2 * a.half;
      for (index_t i = 0; i < a.half; ++i) {
        const float angle_dot = a.t_dot[k] * a.frequencies[i];
        y_dot[i] = -y[a.half + i] * angle_dot;
        y_dot[a.half + i] = y[i] * angle_dot;
      }
    }
  });
}

}  // namespace IMF_ISA
}  // namespace imf

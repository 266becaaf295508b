// Sinusoidal embedding of scalars with its tangent. The formula is in
// imf_kernels/ops/sinusoidal_embedding.py. Scalar sines: a row a sample is little work.
#include "cpu/sinusoidal_embedding.h"

#include <cmath>

#include "cpu/dtypes.h"
#include "cpu/parallel.h"
#include "cpu/vec.h"

namespace imf {
namespace IMF_ISA {
namespace {

template <typename T>
void forward(const SinusoidalEmbeddingForward& a) {
  const T* t = static_cast<const T*>(a.t);
  const T* t_dot = static_cast<const T*>(a.t_dot);
  const index_t first_tangent = a.rows - a.tangent_rows;
  const int team = team_size(a.threads, 8 * a.rows * a.half, a.rows);

  on_each_thread(team, [&](int thread) {
    const Range share = share_of(a.rows, thread, team);
    for (index_t row = share.begin; row < share.end; ++row) {
      const index_t k = row - first_tangent;
      T* y = static_cast<T*>(a.y) + row * 2 * a.half;
      T* y_dot = k < 0 ? nullptr : static_cast<T*>(a.y_dot) + k * 2 * a.half;
      const float time = to_float(t[row]), time_dot = k < 0 ? 0.0f : to_float(t_dot[k]);
      for (index_t i = 0; i < a.half; ++i) {
        const float angle = time * a.frequencies[i];
        const float c = ::cosf(angle), s = ::sinf(angle);
        store(y + i, c);
        store(y + a.half + i, s);
        if (k < 0) continue;
        const float angle_dot = time_dot * a.frequencies[i];
        store(y_dot + i, -s * angle_dot);
        store(y_dot + a.half + i, c * angle_dot);
      }
    }
  });
}

}  // namespace

void sinusoidal_embedding_forward(const SinusoidalEmbeddingForward& a) {
  with_type(a.type, [&](auto t) { forward<decltype(t)>(a); });
}

}  // namespace IMF_ISA
}  // namespace imf

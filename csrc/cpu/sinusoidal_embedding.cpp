// Sinusoidal embedding of scalars with its tangent. The formula is in
// imf_kernels/ops/sinusoidal_embedding.py.
#include "cpu/sinusoidal_embedding.h"

#include <cmath>

#include "cpu/dtypes.h"
#include "cpu/parallel.h"
#include "cpu/vec.h"

namespace imf {
namespace IMF_ISA {
namespace {

// Sines and cosines of a vector of angles, whatever their size: `small` where those of the row are within
// 8192.
inline void sin_cos(Vec angle, bool small, Vec& sin, Vec& cos) {
  if (small) return sin_cos(angle, sin, cos);
  float angles[Vec::width], sines[Vec::width], cosines[Vec::width];
  store(angles, angle);
  for (int i = 0; i < Vec::width; ++i) {
    sines[i] = ::sinf(angles[i]);
    cosines[i] = ::cosf(angles[i]);
  }
  sin = load(sines);
  cos = load(cosines);
}

template <typename T>
void forward(const SinusoidalEmbeddingForward& a) {
  const T* t = static_cast<const T*>(a.t);
  const T* t_dot = static_cast<const T*>(a.t_dot);
  const index_t first_tangent = a.rows - a.tangent_rows;
  const int team = team_size(a.threads, 4 * a.rows * a.half, a.rows);

  on_each_thread(team, [&](int thread) {
    const Range share = share_of(a.rows, thread, team);
    for (index_t row = share.begin; row < share.end; ++row) {
      const index_t k = row - first_tangent;
      T* y = static_cast<T*>(a.y) + row * 2 * a.half;
      T* y_dot = k < 0 ? nullptr : static_cast<T*>(a.y_dot) + k * 2 * a.half;
      const float time = to_float(t[row]), time_dot = k < 0 ? 0.0f : to_float(t_dot[k]);
      const bool small = ::fabsf(time) <= 8192.0f;  // no frequency is above 1
      for_each_vec(a.half, [&](index_t i, int lanes) {
        const Vec frequency = load_lanes(a.frequencies + i, lanes);
        Vec s, c;
        sin_cos(Vec(time) * frequency, small, s, c);
        store_lanes(y + i, c, lanes);
        store_lanes(y + a.half + i, s, lanes);
        if (k < 0) return;
        const Vec angle_dot = Vec(time_dot) * frequency;
        store_lanes(y_dot + i, Vec(0.0f) - s * angle_dot, lanes);
        store_lanes(y_dot + a.half + i, c * angle_dot, lanes);
      });
    }
  });
}

}  // namespace

void sinusoidal_embedding_forward(const SinusoidalEmbeddingForward& a) {
  with_type(a.type, [&](auto t) { forward<decltype(t)>(a); });
}

}  // namespace IMF_ISA
}  // namespace imf

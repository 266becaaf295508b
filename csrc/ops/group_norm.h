#pragma once

#include "ops/operation.h"

namespace imf {

// y = f(n weight + bias) with n = (x - mean - correction) rstd, rstd = 1 / sqrt(variance + eps), over the
// channels of a group and all positions; f is SiLU or the identity. The correction is for the mean's
// rounding.
struct GroupNormForward {
  IMF_ARGUMENTS(Planes x IMF_IS(T, samples, channels, ...);
                Optional<Planes> x_dot IMF_IS(T, tangents, channels, ...);
                Optional<Floats> weight IMF_IS(channels);  // 1 if absent
                Optional<Floats> bias IMF_IS(channels);    // 0 if absent
                Out<Planes> y IMF_IS(T, samples, channels, ...);
                Optional<Out<Planes>> y_dot IMF_IS(T, tangents, channels, ...);
                Out<Floats> statistics IMF_IS(samples groups, 3);  // mean, correction, rstd
                float eps; bool silu; bool channels_last;)
};

struct GroupNormBackward {
  IMF_ARGUMENTS(Planes x IMF_IS(T, samples, channels, ...); Planes dy IMF_IS(T, samples, channels, ...);
                Optional<Floats> weight IMF_IS(channels); Optional<Floats> bias IMF_IS(channels);
                Floats statistics IMF_IS(samples groups, 3); Out<Planes> dx IMF_IS(T, samples, channels, ...);
                Out<Floats> sums IMF_IS(2 samples, channels);  // over positions: dbias, dweight
                bool silu; bool channels_last;)
};

// The pair's backward: (dx_dot, dx) is the backward of the duals (x, x_dot) and (dy_dot, dy), its value and
// its tangent (imf_kernels/backends/operators.py).
struct GroupNormPairBackward {
  IMF_ARGUMENTS(Planes x IMF_IS(T, samples, channels, ...); Planes x_dot IMF_IS(T, tangents, channels, ...);
                Planes dy IMF_IS(T, samples, channels, ...); Planes dy_dot IMF_IS(T, tangents, channels, ...);
                Optional<Floats> weight IMF_IS(channels); Optional<Floats> bias IMF_IS(channels);
                Floats statistics IMF_IS(samples groups, 3); Out<Planes> dx IMF_IS(T, samples, channels, ...);
                Out<Planes> dx_dot IMF_IS(T, tangents, channels, ...);
                Out<Floats> sums IMF_IS(2 samples, channels);  // over positions: dbias, dweight
                bool silu; bool channels_last;)
};

IMF_DECLARE(group_norm_forward, GroupNormForward, CPU)
IMF_DECLARE(group_norm_backward, GroupNormBackward, CPU)
IMF_DECLARE(group_norm_pair_backward, GroupNormPairBackward, CPU)

}  // namespace imf

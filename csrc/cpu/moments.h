// Mean and variance of a row, for layer_norm and group_norm.
#pragma once

#include <cmath>
#include <type_traits>

#include "cpu/rows.h"

namespace imf::IMF_ISA {
namespace {

// Moments of a row, whose mean is mean + correction: with an offset the sum of the row is off by about an ulp
// of the values. The mean of x - mean corrects the mean, exactly if all values are equal, and the variance:
// the two-pass algorithm of Chan, Golub and LeVeque, "Algorithms for Computing the Sample Variance" (1983).
template <typename Scalar>
struct Moments {
  Scalar mean, correction, variance;
};

// Computes moments where the sum of a row overflows, or the square of its mean's rounding error (equal values
// from 1e26 on): sums values shrunk by a power of two, and corrects the mean before squaring.
template <typename Number, typename Row>
[[gnu::noinline]] auto moments_of_large(index_t width, Row x) {
  const float count = static_cast<float>(width);
  float shrink = 1.0f;
  while (count * shrink > 1.0f) shrink *= 0.5f;
  const auto mean_of = [&](auto value) {
    const Number total = sum_over_row<Number>(
        width, [&](index_t j, int lanes, Number& sum) { sum = sum + value(j, lanes) * Vec(shrink); });
    return reduce_add(total) / (count * shrink);
  };
  const auto mean = mean_of(x);
  const auto centered = [&](index_t j, int lanes) {
    return keep_lanes(x(j, lanes) - broadcast(mean), lanes, 0.0f);
  };
  const auto correction = mean_of(centered);
  const Number squares = sum_over_row<Number>(width, [&](index_t j, int lanes, Number& sum) {
    const Number c = keep_lanes(centered(j, lanes) - broadcast(correction), lanes, 0.0f);
    sum = add_square(sum, c);
  });
  return Moments<std::decay_t<decltype(mean)>>{mean, correction,
                                               with_whole_tangent(reduce_add(squares)) / count};
}

template <typename Number, typename Row>
inline auto moments(index_t width, Row x) {
  const float count = static_cast<float>(width);
  const Number total =
      sum_over_row<Number, 2>(width, [&](index_t j, int lanes, Number& sum) { sum = sum + x(j, lanes); });
  const auto mean = reduce_add(total) / count;
  const auto sums = sum_over_row<Pair<Number>, 1>(width, [&](index_t j, int lanes, Pair<Number>& sum) {
    const Number c = keep_lanes(x(j, lanes) - broadcast(mean), lanes, 0.0f);
    sum = {sum.first + c, add_square(sum.second, c)};
  });
  const auto correction = reduce_add(sums.first) / count;
  const auto variance = with_whole_tangent(reduce_add(sums.second)) / count - correction * correction;
  if (!std::isfinite(primal(variance))) return moments_of_large<Number>(width, x);
  return Moments<std::decay_t<decltype(mean)>>{mean, correction, variance};
}

}  // namespace
}  // namespace imf::IMF_ISA

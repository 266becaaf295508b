// GroupNorm with its tangent, optionally followed by SiLU, its primal backward and that of the pair.
// Formulas: imf_kernels/ops/group_norm.py. The work is done in units: groups, or samples where channels are
// last. Those are cut into chunks by the shape alone, so that no result depends on the number of threads.
#include "ops/group_norm.h"

#include "cpu/dtypes.h"
#include "cpu/duals.h"
#include "cpu/moments.h"

namespace imf::IMF_ISA {
namespace {

struct Shape {
  index_t samples, channels, positions, groups, width;  // channels per group
  bool channels_last;

  Shape(const Planes& x, const Floats& statistics, bool last)
      : samples(x.samples),
        channels(x.channels),
        positions(x.positions),
        groups(statistics.rows / x.samples),
        width(groups ? channels / groups : 0),
        channels_last(last || positions == 1) {
    if (width * groups != channels) {
      refuse("channels must be those of whole groups, got % of %", {channels, groups});
    }
  }

  double count() const { return static_cast<double>(width) * static_cast<double>(positions); }
  index_t size() const { return channels * positions; }
  index_t elements() const { return samples * size(); }
  // Positions per chunk with channels last, 64 KiB of float32 in moderate widths.
  index_t rows() const {
    const index_t fit = (index_t{1} << 14) / channels;
    return fit < 32 ? 32 : fit > 128 ? 128 : fit;
  }
};

// Throws unless all given tensors lie in memory with channels last, or channels first.
template <typename... Views>
void require_order(bool last, const Views&... views) {
  if (((!views.data || (last ? views.channels_last : views.contiguous)) && ...)) return;
  refuse(last ? "all images must have channels last" : "all images must have channels first");
}

// Units of work and how they are shared among threads: whole, or chunk by chunk if they are few.
struct Units {
  index_t units, chunks;
  int team;
  bool whole;

  Units(int threads, index_t units, index_t chunks, index_t elements)
      : units(units),
        chunks(chunks),
        team(team_size(threads, elements, units * chunks)),
        whole(team == 1 || units >= 4 * team) {}

  // Number of units in work at a time; each has a slot of scratch memory.
  index_t slots() const { return whole ? team : units; }

  // Runs the steps for all units, each after the one before it: step(unit, chunk, slot) for all chunks of a
  // unit, or step(unit, slot). The last `tangent_units` cost twice as much.
  template <typename... Steps>
  void run(index_t tangent_units, Steps... steps) const {
    if (whole) {
      on_each_thread(team, [&](int thread) {
        const Range share = share_of_rows(units, tangent_units, thread, team);
        for (index_t unit = share.begin; unit < share.end; ++unit) {
          const auto run_step = [&](const auto& step) {
            if constexpr (by_chunk<decltype(step)>) {
              for (index_t chunk = 0; chunk < chunks; ++chunk) step(unit, chunk, index_t{thread});
            } else {
              step(unit, index_t{thread});
            }
          };
          (run_step(steps), ...);
        }
      });
      return;
    }
    const auto run_step = [&](const auto& step) {
      if constexpr (by_chunk<decltype(step)>) {
        on_each_thread(team, [&](int thread) {
          const Range share = share_of(units * chunks, thread, team);
          for (index_t i = share.begin; i < share.end; ++i) step(i / chunks, i % chunks, i / chunks);
        });
      } else {
        for (index_t unit = 0; unit < units; ++unit) step(unit, unit);
      }
    };
    (run_step(steps), ...);
  }

 private:
  template <typename Step>
  static constexpr bool by_chunk = std::is_invocable_v<Step, index_t, index_t, index_t>;
};

// Moments of a number of values: the sums of their squares, and of their products with the tangent, are about
// the means.
struct Part {
  double count = 0, mean = 0, squares = 0, mean_dot = 0, products = 0;

  // Chan, Golub and LeVeque, "Algorithms for Computing the Sample Variance" (1983), (2.1).
  void add(const Part& b) {
    const double total = count + b.count, share = b.count / total, weight = count * share;
    const double delta = b.mean - mean, delta_dot = b.mean_dot - mean_dot;
    squares += b.squares + delta * delta * weight;
    products += b.products + delta * delta_dot * weight;
    mean += delta * share;
    mean_dot += delta_dot * share;
    count = total;
  }
};

inline Part part(double count, const Moments<float>& m) {
  return {count, double(m.mean) + m.correction, count * m.variance};
}
inline Part part(double count, const Moments<Dual<float>>& m) {
  return {count, double(m.mean.primal) + m.correction.primal, count * m.variance.primal,
          double(m.mean.tangent) + m.correction.tangent, 0.5 * count * m.variance.tangent};
}

// Of a group: n = (x - mean - correction) rstd.
struct Statistics {
  Dual<float> mean, rstd;
  float correction;

  Statistics() = default;
  Statistics(const Part& p, float eps) {
    const double r = 1.0 / std::sqrt(p.squares / p.count + static_cast<double>(eps));
    mean = {static_cast<float>(p.mean), static_cast<float>(p.mean_dot)};
    rstd = {static_cast<float>(r), static_cast<float>(-r * r * r * (p.products / p.count))};
    correction = static_cast<float>(p.mean - static_cast<double>(mean.primal));
  }
  explicit Statistics(const float* saved)
      : mean{saved[0], 0.0f}, rstd{saved[2], 0.0f}, correction(saved[1]) {}
  Statistics(const float* saved, const Part& p) : Statistics(saved) {
    const double r = rstd.primal;
    mean.tangent = static_cast<float>(p.mean_dot);
    rstd.tangent = static_cast<float>(-r * r * r * (p.products / p.count));
  }
  void save(float* statistics) const {
    statistics[0] = mean.primal;
    statistics[1] = correction;
    statistics[2] = rstd.primal;
  }
};

// y = f((x - mean) gain + bias) of a channel.
template <typename Number>
struct Affine {
  Number mean, gain, bias;

  Number centered(Number x) const { return x - mean; }
  template <bool with_silu>
  Number operator()(Number x) const {
    const Number z = fma(centered(x), gain, bias);
    if constexpr (with_silu) {
      return silu(z);
    } else {
      return z;
    }
  }
};

inline Affine<Dual<float>> affine_of(const Statistics& s, const float* weight, const float* bias, index_t c) {
  const Dual<float> gain = s.rstd * (weight ? weight[c] : 1.0f);
  const Dual<float> shift = gain * -s.correction + (bias ? bias[c] : 0.0f);
  return {s.mean, gain, shift};
}

template <typename Number>
inline Number lift(Dual<float> x) {
  if constexpr (is_dual<Number>) {
    return broadcast(x);
  } else {
    return broadcast(x.primal);
  }
}
inline Dual<float> with_tangent(float x) { return {x, 0.0f}; }
inline Dual<float> with_tangent(Dual<float> x) { return x; }
template <typename Number>
inline Affine<Number> lift(const Affine<Dual<float>>& a) {
  return {lift<Number>(a.mean), lift<Number>(a.gain), lift<Number>(a.bias)};
}

// Calls body(column, vectors, lanes) over columns, a few vectors at a time; `vectors` is a constant.
template <typename Body>
inline void for_each_columns(index_t n, Body body) {
  constexpr int several = Vec::width == 16 ? 4 : 2;
  index_t j = 0;
  for (; j + several * Vec::width <= n; j += several * Vec::width) {
    body(j, std::integral_constant<int, several>(), Vec::width);
  }
  for_each_vec(n - j, [&](index_t i, int lanes) { body(j + i, std::integral_constant<int, 1>(), lanes); });
}

// Sums term(row, i) over rows for each vector i of columns: eight rows at a time.
template <typename Number, int vectors, typename Term>
IMF_ALWAYS_INLINE void sum_over_rows(index_t rows, Number (&total)[vectors], Term add) {
  for (Number& sum : total) sum = Number{};
  for (index_t first = 0; first < rows; first += 8) {
    Number sums[vectors] = {};
    const index_t end = first + 8 < rows ? first + 8 : rows;
    for (index_t row = first; row < end; ++row) {
      for (int i = 0; i < vectors; ++i) add(row, i, sums[i]);
    }
    for (int i = 0; i < vectors; ++i) total[i] = total[i] + sums[i];
  }
}

inline bool is_finite(Vec x) { return std::isfinite(reduce_add(x * Vec(0.0f))); }
inline bool is_finite(Dual<Vec> x) { return is_finite(x.primal) && is_finite(x.tangent); }

// Moments of channels over the rows of a chunk: six rows of `channels` numbers, means, their corrections and
// sums about them, then those of the tangent.
struct ChannelMoments {
  float* data;
  index_t channels;

  float* row(int i) const { return data + i * channels; }
  template <typename Number>
  DualRow<Number, float> rows(int i) const {
    return {row(i), row(3 + i)};
  }

  template <typename Number, typename T>
  void compute(DualRow<Number, const T> x, index_t count) const {
    const float n = static_cast<float>(count);
    for_each_columns(channels, [&](index_t j, auto constant, int lanes) {
      constexpr int vectors = constant;
      const auto at = [&](index_t k, int i) { return x(k * channels + j + i * Vec::width, lanes); };
      Number mean[vectors];
      sum_over_rows(count, mean, [&](index_t k, int i, Number& sum) { sum = sum + at(k, i); });
      for (Number& m : mean) m = m / Vec(n);
      Pair<Number> sums[vectors];
      sum_over_rows(count, sums, [&](index_t k, int i, Pair<Number>& sum) {
        const Number c = at(k, i) - mean[i];
        sum = {sum.first + c, add_square(sum.second, c)};
      });
      for (int i = 0; i < vectors; ++i) {
        const index_t column = j + i * Vec::width;
        const Number correction = sums[i].first / Vec(n);
        // Of products too: the tangent is half of that of the squares.
        Number squares = correction * correction * Vec(-n);
        if constexpr (is_dual<Number>) squares.tangent = squares.tangent * Vec(0.5f);
        squares = squares + sums[i].second;
        rows<Number>(0).store(column, mean[i], lanes);
        rows<Number>(1).store(column, correction, lanes);
        rows<Number>(2).store(column, squares, lanes);
        if (is_finite(mean[i]) && is_finite(squares)) continue;
        for (int lane = 0; lane < lanes; ++lane) compute_large(x, count, column + lane);
      }
    });
  }

  // The same for a channel whose sums overflow.
  template <typename Number, typename T>
  [[gnu::noinline]] void compute_large(DualRow<Number, const T> x, index_t count, index_t j) const {
    Part total;
    for (index_t k = 0; k < count; ++k) {
      Part one{1.0, to_float(x.primal[k * channels + j])};
      if constexpr (is_dual<Number>) one.mean_dot = to_float(x.tangent[k * channels + j]);
      total.add(one);
    }
    const double numbers[] = {total.mean, 0.0, total.squares, total.mean_dot, 0.0, total.products};
    for (int i = 0; i < (is_dual<Number> ? 6 : 3); ++i) row(i)[j] = static_cast<float>(numbers[i]);
  }
};

// Moments of the channels of a sample: those of its chunks added up.
struct SampleMoments {
  double *mean, *squares, *mean_dot, *products;  // [channels]

  SampleMoments(float* room, index_t channels)
      : mean(reinterpret_cast<double*>(room)),
        squares(mean + channels),
        mean_dot(squares + channels),
        products(mean_dot + channels) {}

  void compute(const Shape& shape, const float* moments, index_t chunks, bool dual) const {
    const index_t channels = shape.channels;
    for (index_t j = 0; j < 4 * channels; ++j) mean[j] = 0.0;
    double count = 0.0;
    for (index_t chunk = 0; chunk < chunks; ++chunk, moments += 6 * channels) {
      const ChannelMoments m{const_cast<float*>(moments), channels};
      const index_t rows = shape.rows(), left = shape.positions - chunk * rows;
      const double own = static_cast<double>(left < rows ? left : rows), total = count + own;
      const double share = own / total, weight = count * share;
      if (dual) {
        add(channels, share, weight, m.row(0), m.row(1), m.row(3), m.row(4), m.row(5), mean_dot, products);
      }
      add(channels, share, weight, m.row(0), m.row(1), m.row(0), m.row(1), m.row(2), mean, squares);
      count = total;
    }
  }

  // Of a group: channels of equal numbers of values.
  Part of_group(const Shape& shape, index_t group) const {
    const index_t first = group * shape.width, end = first + shape.width;
    Part all{shape.count()};
    for (index_t j = first; j < end; ++j) {
      all.mean += mean[j];
      all.mean_dot += mean_dot[j];
    }
    all.mean /= static_cast<double>(shape.width);
    all.mean_dot /= static_cast<double>(shape.width);
    const double positions = static_cast<double>(shape.positions);
    for (index_t j = first; j < end; ++j) {
      const double delta = mean[j] - all.mean;
      all.squares += squares[j] + positions * delta * delta;
      all.products += products[j] + positions * delta * (mean_dot[j] - all.mean_dot);
    }
    return all;
  }

 private:
  // As Part::add, by channel: of a number u with the moments sum_u, whose means come in two parts.
  void add(index_t channels, double share, double weight, const float* x, const float* x_correction,
           const float* u, const float* u_correction, const float* products_of, double* u_mean,
           double* sums) const {
    for (index_t j = 0; j < channels; ++j) {
      const double delta = double(x[j]) + x_correction[j] - mean[j];
      const double delta_u = double(u[j]) + u_correction[j] - u_mean[j];
      sums[j] += products_of[j] + delta * delta_u * weight;
      u_mean[j] += delta_u * share;
    }
  }
};

// Affine maps of the channels of a sample: rows mean, gain, bias and those of their tangents.
struct ChannelAffines {
  float* data;
  index_t channels;

  void set(index_t j, const Affine<Dual<float>>& a) const {
    const Dual<float> numbers[] = {a.mean, a.gain, a.bias};
    for (int i = 0; i < 3; ++i) {
      data[i * channels + j] = numbers[i].primal;
      data[(3 + i) * channels + j] = numbers[i].tangent;
    }
  }
  template <typename Number>
  Affine<Number> at(index_t j, int lanes) const {
    const auto load = [&](int i) {
      const float* row = data + i * channels;
      return DualRow<Number, const float>{row, row + 3 * channels}(j, lanes);
    };
    return {load(0), load(1), load(2)};
  }
};

// Values of a sample from `offset` on, and of its tangent.
template <typename Number, typename T>
inline DualRow<Number, T> values_of(const Planes& x, const Planes& x_dot, index_t sample, index_t offset) {
  const index_t size = x.channels * x.positions, t = sample - (x.samples - x_dot.samples);
  T* primal = static_cast<T*>(x.data) + sample * size + offset;
  if constexpr (is_dual<Number>) return {primal, static_cast<T*>(x_dot.data) + t * size + offset};
  return {primal, nullptr};
}

constexpr index_t group_chunk = 2048;  // values

inline index_t chunks_of(index_t n, index_t chunk) { return (n + chunk - 1) / chunk; }
inline Range range_of(index_t n, index_t chunk, index_t size) {
  const index_t begin = chunk * size;
  return {begin, begin + size < n ? begin + size : n};
}

template <typename T, bool with_silu>
void forward(const GroupNormForward& a) {
  require_order(a.channels_last, a.x, a.x_dot, a.y, a.y_dot);
  const Shape shape(a.x, a.statistics, a.channels_last);
  const index_t first_tangent = shape.samples - a.y_dot.samples;
  const index_t elements = shape.elements() + a.y_dot.samples * shape.size();
  const auto of = [&](auto number, const auto& x, const auto& x_dot, index_t sample, index_t offset) {
    return values_of<decltype(number), T>(x, x_dot, sample, offset);
  };

  if (shape.channels_last) {
    const index_t channels = shape.channels, rows = shape.rows(), chunks = chunks_of(shape.positions, rows);
    const Units units(a.place.threads, shape.samples, chunks, elements);
    const index_t size = (6 * chunks + 6 + 8) * channels;
    Scratch scratch(units.slots() * size);
    float* room = scratch.take<float>(units.slots() * size);
    const auto moments_of = [&](index_t slot) { return room + slot * size + 8 * channels; };
    const auto affines_of = [&](index_t slot) {
      return ChannelAffines{moments_of(slot) + 6 * chunks * channels, channels};
    };
    units.run(
        a.y_dot.samples,
        [&](index_t sample, index_t chunk, index_t slot) {
          const Range share = range_of(shape.positions, chunk, rows);
          with_number(sample >= first_tangent, [&](auto number) {
            ChannelMoments{moments_of(slot) + chunk * 6 * channels, channels}.compute(
                values_of<decltype(number), const T>(a.x, a.x_dot, sample, share.begin * channels),
                share.end - share.begin);
          });
        },
        [&](index_t sample, index_t slot) {
          const SampleMoments moments(room + slot * size, channels);
          moments.compute(shape, moments_of(slot), chunks, sample >= first_tangent);
          for (index_t group = 0; group < shape.groups; ++group) {
            const Statistics statistics(moments.of_group(shape, group), a.eps);
            statistics.save(a.statistics.data + 3 * (sample * shape.groups + group));
            for (index_t j = group * shape.width; j < (group + 1) * shape.width; ++j) {
              affines_of(slot).set(j, affine_of(statistics, a.weight.data, a.bias.data, j));
            }
          }
        },
        [&](index_t sample, index_t chunk, index_t slot) {
          const Range share = range_of(shape.positions, chunk, rows);
          const ChannelAffines affines = affines_of(slot);
          with_number(sample >= first_tangent, [&](auto number) {
            using Number = decltype(number);
            for (index_t row = share.begin; row < share.end; ++row) {
              const auto x = of(number, a.x, a.x_dot, sample, row * channels);
              const auto y = of(number, a.y, a.y_dot, sample, row * channels);
              for_each_vec(channels, [&](index_t j, int lanes) {
                y.store(j, affines.at<Number>(j, lanes).template operator()<with_silu>(x(j, lanes)), lanes);
              });
            }
          });
        });
    return;
  }

  const index_t size = shape.width * shape.positions, chunks = chunks_of(size, group_chunk);
  const Units units(a.place.threads, shape.samples * shape.groups, chunks, elements);
  constexpr index_t part_floats = sizeof(Part) / sizeof(float),
                    of_floats = sizeof(Statistics) / sizeof(float);
  Scratch scratch(units.slots() * (chunks * part_floats + of_floats));
  Part* parts = reinterpret_cast<Part*>(scratch.take<float>(units.slots() * chunks * part_floats));
  Statistics* found = reinterpret_cast<Statistics*>(scratch.take<float>(units.slots() * of_floats));
  units.run(
      a.y_dot.samples * shape.groups,
      [&](index_t unit, index_t chunk, index_t slot) {
        const index_t sample = unit / shape.groups, group = unit % shape.groups;
        const Range share = range_of(size, chunk, group_chunk);
        with_number(sample >= first_tangent, [&](auto number) {
          const auto x = of(number, a.x, a.x_dot, sample, group * size + share.begin);
          const index_t count = share.end - share.begin;
          parts[slot * chunks + chunk] =
              part(static_cast<double>(count),
                   moments<decltype(number)>(count, [&](index_t j, int lanes) { return x(j, lanes); }));
        });
      },
      [&](index_t unit, index_t slot) {
        Part all = parts[slot * chunks];
        for (index_t chunk = 1; chunk < chunks; ++chunk) all.add(parts[slot * chunks + chunk]);
        found[slot] = Statistics(all, a.eps);
        found[slot].save(a.statistics.data + 3 * unit);
      },
      [&](index_t unit, index_t chunk, index_t slot) {
        const index_t sample = unit / shape.groups, group = unit % shape.groups;
        Range share = range_of(size, chunk, group_chunk);
        with_number(sample >= first_tangent, [&](auto number) {
          using Number = decltype(number);
          const auto x = of(number, a.x, a.x_dot, sample, group * size);
          const auto y = of(number, a.y, a.y_dot, sample, group * size);
          while (share.begin < share.end) {  // the channels in the chunk
            const index_t channel = share.begin / shape.positions, end = (channel + 1) * shape.positions;
            const auto affine = lift<Number>(
                affine_of(found[slot], a.weight.data, a.bias.data, group * shape.width + channel));
            for_each_vec(Range{share.begin, end < share.end ? end : share.end}, [&](index_t j, int lanes) {
              y.store(j, affine.template operator()<with_silu>(x(j, lanes)), lanes);
            });
            share.begin = end;
          }
        });
      });
}

template <typename Arguments, typename Run>
inline void with_options(const Arguments& a, Run run) {
  with_type(a.x.dtype, [&](auto type) {
    if (a.silu) {
      run(type, std::true_type());
    } else {
      run(type, std::false_type());
    }
  });
}

// With z = n weight + bias, dz = f'(z) dy and g = dz weight: dx = rstd (g - mean(g) - n mean(g n)), dweight =
// sum dz n, dbias = sum dz. As c = x - mean is n / rstd but for the correction, dx = gain dz + slope c +
// shift. The same of the duals (x, x_dot) and (dy_dot, dy), or of x and dy with tangents that are zero.
struct Slopes {
  Dual<float> slope, shift;

  // From sums(j), over positions of a channel of a group: of dz and of dz c. Writes dbias and dweight, which
  // are tangents of `duals`.
  template <typename Sums>
  Slopes(const Shape& shape, const Statistics& s, const float* weight, index_t first, bool duals, Sums sums,
         float* dbias, float* dweight) {
    const Dual<double> rstd = wide(s.rstd);
    const double correction = -s.correction, share = -1.0 / shape.count();
    const auto of_weight = [&](Dual<double> x) { return static_cast<float>(duals ? x.tangent : x.primal); };
    Dual<double> sum_g{}, sum_gn{};
    for (index_t j = first; j < first + shape.width; ++j) {
      const Pair<Dual<float>> of_channel = sums(j);
      const Dual<double> dz = wide(of_channel.first),
                         dzn = rstd * (wide(of_channel.second) + dz * correction);
      dbias[j] = of_weight(dz);
      dweight[j] = of_weight(dzn);
      const Dual<double> gain = wide(s.rstd * (weight ? weight[j] : 1.0f));
      sum_g = sum_g + gain * dz;
      sum_gn = sum_gn + gain * dzn;
    }
    const Dual<double> of_c = rstd * sum_gn * share;
    slope = narrow(of_c);
    shift = narrow(sum_g * share + of_c * correction);
  }

 private:
  static Dual<double> wide(Dual<float> x) { return {x.primal, x.tangent}; }
  static Dual<float> narrow(Dual<double> x) {
    return {static_cast<float>(x.primal), static_cast<float>(x.tangent)};
  }
};

// Not an FMA of dz and gain: in a group of one value their rounded product is the mean, and dx exactly 0.
template <typename Number>
inline Number input_gradient(Number dz, Number gain, Number c, Number slope, Number shift) {
  return fma(c, slope, dz * gain + shift);
}

template <bool with_silu, typename Number>
inline Number cotangent(const Affine<Number>& affine, Number x, Number dy) {
  if constexpr (with_silu) {
    const Number z = affine.template operator()<false>(x);
    return silu_derivative(z, sigmoid(z)) * dy;
  } else {
    return dy;
  }
}

// Sums over values of a channel: of dz, and of dz c.
template <bool with_silu, typename Number>
inline Pair<Number> add_cotangent(Pair<Number> sum, const Affine<Number>& affine, Number x, Number dy) {
  const Number dz = cotangent<with_silu>(affine, x, dy);
  return {sum.first + dz, fma(dz, affine.centered(x), sum.second)};
}

// Values of a sample from `offset` on: the duals (x, x_dot) and (dy_dot, dy), or x and dy.
template <typename Number, typename T>
struct BackwardValues {
  DualRow<Number, const T> x, dy;
  DualRow<Number, T> dx;

  BackwardValues(const GroupNormPairBackward& a, index_t sample, index_t offset)
      : x(values_of<Number, const T>(a.x, a.x_dot, sample, offset)) {
    const auto of_dy = values_of<Number, const T>(a.dy, a.dy_dot, sample, offset);
    const auto of_dx = values_of<Number, T>(a.dx, a.dx_dot, sample, offset);
    dy = cotangents<Number>(of_dy.primal, of_dy.tangent);
    dx = cotangents<Number>(of_dx.primal, of_dx.tangent);
  }
};

inline float* dbias_of(const GroupNormPairBackward& a, const Shape& shape, index_t sample) {
  return a.sums.data + 2 * sample * shape.channels;
}

template <typename T, bool with_silu>
void backward_channels_last(const GroupNormPairBackward& a, const Shape& shape) {
  const index_t channels = shape.channels, groups = shape.groups, tangents = a.x_dot.samples;
  const index_t rows = shape.rows(), chunks = chunks_of(shape.positions, rows);
  const Units units(a.place.threads, shape.samples, chunks, 2 * (shape.samples + tangents) * shape.size());
  const index_t slots = units.slots();
  const auto has_tangent = [&](index_t sample) { return sample >= shape.samples - tangents; };
  const auto positions_of = [&](index_t chunk) { return range_of(shape.positions, chunk, rows); };

  // Rows of `channels` numbers: of moments in all, of sums per chunk.
  const index_t moments_rows = tangents ? 8 + 6 * chunks : 0, sums_rows = tangents ? 4 : 2;
  constexpr index_t of_floats = sizeof(Statistics) / sizeof(float);
  Scratch scratch(slots * ((moments_rows + 6 + sums_rows * chunks + 4) * channels + groups * of_floats));
  float* moments = scratch.take<float>(slots * moments_rows * channels);
  float* affines = scratch.take<float>(slots * 6 * channels);
  float* sums = scratch.take<float>(slots * sums_rows * chunks * channels);
  float* slopes = scratch.take<float>(slots * 4 * channels);
  Statistics* found = reinterpret_cast<Statistics*>(scratch.take<float>(slots * groups * of_floats));

  const auto sample_moments_of = [&](index_t slot) { return moments + slot * moments_rows * channels; };
  const auto moments_of = [&](index_t slot) { return sample_moments_of(slot) + 8 * channels; };
  const auto affines_of = [&](index_t slot) {
    return ChannelAffines{affines + slot * 6 * channels, channels};
  };
  const auto sums_of = [&](index_t slot, index_t chunk) {
    return sums + (slot * chunks + chunk) * sums_rows * channels;
  };
  const auto row = [&](auto number, float* data, index_t i) {
    return DualRow<decltype(number), float>{data + i * channels, data + (2 + i) * channels};
  };

  const auto find_moments = [&](index_t sample, index_t chunk, index_t slot) {
    if (!has_tangent(sample)) return;
    const Range share = positions_of(chunk);
    ChannelMoments{moments_of(slot) + chunk * 6 * channels, channels}.compute(
        values_of<Dual<Vec>, const T>(a.x, a.x_dot, sample, share.begin * channels), share.end - share.begin);
  };
  const auto find_affines = [&](index_t sample, index_t slot) {
    const SampleMoments of_sample(sample_moments_of(slot), channels);
    if (has_tangent(sample)) of_sample.compute(shape, moments_of(slot), chunks, true);
    for (index_t group = 0; group < groups; ++group) {
      const float* saved = a.statistics.data + 3 * (sample * groups + group);
      Statistics& s = found[slot * groups + group];
      s = has_tangent(sample) ? Statistics(saved, of_sample.of_group(shape, group)) : Statistics(saved);
      for (index_t j = group * shape.width; j < (group + 1) * shape.width; ++j) {
        affines_of(slot).set(j, affine_of(s, a.weight.data, a.bias.data, j));
      }
    }
  };
  const auto find_sums = [&](index_t sample, index_t chunk, index_t slot) {
    const Range share = positions_of(chunk);
    with_number(has_tangent(sample), [&](auto number) {
      using Number = decltype(number);
      const BackwardValues<Number, T> values(a, sample, share.begin * channels);
      for_each_columns(channels, [&](index_t column, auto constant, int lanes) {
        constexpr int vectors = constant;
        Affine<Number> of_columns[vectors];
        for (int i = 0; i < vectors; ++i) {
          of_columns[i] = affines_of(slot).template at<Number>(column + i * Vec::width, lanes);
        }
        Pair<Number> total[vectors];
        sum_over_rows(share.end - share.begin, total, [&](index_t k, int i, Pair<Number>& sum) {
          const index_t j = k * channels + column + i * Vec::width;
          sum = add_cotangent<with_silu>(sum, of_columns[i], values.x(j, lanes), values.dy(j, lanes));
        });
        for (int i = 0; i < vectors; ++i) {
          row(number, sums_of(slot, chunk), 0).store(column + i * Vec::width, total[i].first, lanes);
          row(number, sums_of(slot, chunk), 1).store(column + i * Vec::width, total[i].second, lanes);
        }
      });
    });
  };
  const auto find_slopes = [&](index_t sample, index_t slot) {
    const bool duals = has_tangent(sample);
    float *total = sums_of(slot, 0), *to = slopes + slot * 4 * channels;
    add_pairwise(chunks, (duals ? 4 : 2) * channels, [&](index_t i) { return sums_of(slot, i); });
    const auto at = [&](index_t i, index_t j) {
      return Dual<float>{total[i * channels + j], duals ? total[(2 + i) * channels + j] : 0.0f};
    };
    for (index_t group = 0; group < groups; ++group) {
      const index_t first = group * shape.width;
      float* dbias = dbias_of(a, shape, sample);
      const Slopes of_group(
          shape, found[slot * groups + group], a.weight.data, first, duals,
          [&](index_t j) { return Pair<Dual<float>>{at(0, j), at(1, j)}; }, dbias, dbias + channels);
      for (index_t j = first; j < first + shape.width; ++j) {
        to[j] = of_group.slope.primal;
        to[channels + j] = of_group.shift.primal;
        to[2 * channels + j] = of_group.slope.tangent;
        to[3 * channels + j] = of_group.shift.tangent;
      }
    }
  };
  const auto write_gradient = [&](index_t sample, index_t chunk, index_t slot) {
    const Range share = positions_of(chunk);
    with_number(has_tangent(sample), [&](auto number) {
      using Number = decltype(number);
      const auto slope = row(number, slopes + slot * 4 * channels, 0);
      const auto shift = row(number, slopes + slot * 4 * channels, 1);
      for (index_t position = share.begin; position < share.end; ++position) {
        const BackwardValues<Number, T> values(a, sample, position * channels);
        for_each_vec(channels, [&](index_t j, int lanes) {
          const auto of_column = affines_of(slot).template at<Number>(j, lanes);
          const Number xj = values.x(j, lanes);
          const Number dz = cotangent<with_silu>(of_column, xj, values.dy(j, lanes));
          values.dx.store(
              j, input_gradient(dz, of_column.gain, of_column.centered(xj), slope(j, lanes), shift(j, lanes)),
              lanes);
        });
      }
    });
  };
  if (tangents) {
    units.run(tangents, find_moments, find_affines, find_sums, find_slopes, write_gradient);
  } else {
    units.run(0, find_affines, find_sums, find_slopes, write_gradient);
  }
}

// The chunks of a group are its channels.
template <typename T, bool with_silu>
void backward_channels_first(const GroupNormPairBackward& a, const Shape& shape) {
  const index_t positions = shape.positions, groups = shape.groups, width = shape.width;
  const index_t tangents = a.x_dot.samples;
  const Units units(a.place.threads, shape.samples * groups, width,
                    2 * (shape.samples + tangents) * shape.size());
  const index_t slots = units.slots();
  const auto has_tangent = [&](index_t unit) { return unit / groups >= shape.samples - tangents; };

  using Sums = Pair<Dual<float>>;
  constexpr index_t part_floats = sizeof(Part) / sizeof(float), sums_floats = sizeof(Sums) / sizeof(float),
                    of_floats = (sizeof(Statistics) + sizeof(Slopes)) / sizeof(float);
  Scratch scratch(slots * (width * (part_floats + sums_floats) + of_floats));
  Part* parts = reinterpret_cast<Part*>(scratch.take<float>(slots * width * part_floats));
  Sums* sums = reinterpret_cast<Sums*>(scratch.take<float>(slots * width * sums_floats));
  struct Found {
    Statistics statistics;
    Slopes slopes;
  };
  Found* found = reinterpret_cast<Found*>(scratch.take<float>(slots * of_floats));

  // Calls body(values, affine) for a channel of a unit.
  const auto of_channel = [&](index_t unit, index_t i, index_t slot, auto body) {
    const index_t channel = unit % groups * width + i;
    with_number(has_tangent(unit), [&](auto number) {
      using Number = decltype(number);
      body(BackwardValues<Number, T>(a, unit / groups, channel * positions),
           lift<Number>(affine_of(found[slot].statistics, a.weight.data, a.bias.data, channel)));
    });
  };

  const auto find_moments = [&](index_t unit, index_t i, index_t slot) {
    if (!has_tangent(unit)) return;
    const auto x =
        values_of<Dual<Vec>, const T>(a.x, a.x_dot, unit / groups, (unit % groups * width + i) * positions);
    parts[slot * width + i] = part(static_cast<double>(positions), moments<Dual<Vec>>(positions, x));
  };
  const auto find_statistics = [&](index_t unit, index_t slot) {
    const float* saved = a.statistics.data + 3 * unit;
    Part* all = parts + slot * width;
    if (has_tangent(unit)) {
      for (index_t i = 1; i < width; ++i) all->add(all[i]);
    }
    found[slot].statistics = has_tangent(unit) ? Statistics(saved, *all) : Statistics(saved);
  };
  const auto find_sums = [&](index_t unit, index_t i, index_t slot) {
    of_channel(unit, i, slot, [&](const auto& values, const auto& affine) {
      using Number = std::decay_t<decltype(affine.mean)>;
      const auto total =
          sum_over_row<Pair<Number>, 2>(positions, [&](index_t j, int lanes, Pair<Number>& sum) {
            sum = add_cotangent<with_silu>(sum, affine, values.x(j, lanes), values.dy(j, lanes));
          });
      sums[slot * width + i] = {with_tangent(reduce_add(total.first)),
                                with_tangent(reduce_add(total.second))};
    });
  };
  const auto find_slopes = [&](index_t unit, index_t slot) {
    const index_t first = unit % groups * width;
    float* dbias = dbias_of(a, shape, unit / groups);
    found[slot].slopes = Slopes(
        shape, found[slot].statistics, a.weight.data, first, has_tangent(unit),
        [&](index_t j) { return sums[slot * width + j - first]; }, dbias, dbias + shape.channels);
  };
  const auto write_gradient = [&](index_t unit, index_t i, index_t slot) {
    of_channel(unit, i, slot, [&](const auto& values, const auto& affine) {
      using Number = std::decay_t<decltype(affine.mean)>;
      const Number slope = lift<Number>(found[slot].slopes.slope),
                   shift = lift<Number>(found[slot].slopes.shift);
      for_each_vec(positions, [&](index_t j, int lanes) {
        const Number xj = values.x(j, lanes);
        const Number dz = cotangent<with_silu>(affine, xj, values.dy(j, lanes));
        values.dx.store(j, input_gradient(dz, affine.gain, affine.centered(xj), slope, shift), lanes);
      });
    });
  };
  if (tangents) {
    units.run(tangents * groups, find_moments, find_statistics, find_sums, find_slopes, write_gradient);
  } else {
    units.run(0, find_statistics, find_sums, find_slopes, write_gradient);
  }
}

void backward(const GroupNormPairBackward& a) {
  if (!a.x.data) {
    for (index_t i = 0; i < a.sums.rows * a.sums.width; ++i) a.sums.data[i] = 0.0f;
    return;
  }
  require_order(a.channels_last, a.x, a.x_dot, a.dy, a.dy_dot, a.dx, a.dx_dot);
  const Shape shape(a.x, a.statistics, a.channels_last);
  with_options(a, [&](auto type, auto silu) {
    if (shape.channels_last) {
      backward_channels_last<decltype(type), decltype(silu)::value>(a, shape);
    } else {
      backward_channels_first<decltype(type), decltype(silu)::value>(a, shape);
    }
  });
}

}  // namespace

void group_norm_forward(const GroupNormForward& a) {
  if (!a.x.data) return;
  with_options(a, [&](auto type, auto silu) { forward<decltype(type), decltype(silu)::value>(a); });
}

// That of the pair of no tangents.
void group_norm_backward(const GroupNormBackward& a) {
  GroupNormPairBackward pair{};
  pair.x = a.x;
  pair.dy = a.dy;
  pair.weight = a.weight;
  pair.bias = a.bias;
  pair.statistics = a.statistics;
  pair.dx = a.dx;
  pair.sums = a.sums;
  pair.silu = a.silu;
  pair.channels_last = a.channels_last;
  pair.place = a.place;
  backward(pair);
}

void group_norm_pair_backward(const GroupNormPairBackward& a) { backward(a); }

}  // namespace imf::IMF_ISA

// Parts that attention kernels share: sums over many keys or queries, logits and the units of products.
#pragma once

#include <algorithm>
#include <cfloat>

#include "cpu/dtypes.h"
#include "cpu/scratch.h"
#include "cpu/small_gemm.h"
#include "tensor.h"

namespace imf::IMF_ISA {
namespace {

constexpr index_t query_block = 48;
constexpr index_t key_block = 256;
// Keys or queries per partial sum of a compensated total.
constexpr index_t keys_per_sum = 4 * key_block;
constexpr index_t queries_per_sum = 32 * query_block;

template <typename T>
T* head_of(const Heads& x, index_t b, index_t h) {
  return x.data ? static_cast<T*>(x.data) + b * x.stride[0] + h * x.stride[1] : nullptr;
}

// Terms per sum of a logit. PyTorch's products of few rows or columns sum in about as many lanes as a vector
// has, and the exponential turns a logit's absolute error into a relative one.
inline index_t logit_terms(index_t queries, index_t keys) {
  return queries < 16 || keys < 16 ? 8 : usual_terms;
}

inline index_t smaller(index_t a, index_t b) { return a < b ? a : b; }

// Returns the number of query heads that share a head of keys and values.
template <typename Shape>
inline index_t group_of(const Shape& a) {
  return a.k.heads ? a.q.heads / a.k.heads : 1;
}

// Returns total + x and adds the rounding error to `error` (Knuth's two-sum).
template <typename Number>
inline Number add_to(Number total, Number x, Number& error) {
  const Number sum = total + x, added = sum - total;
  error = error + ((total - (sum - added)) + (x - added));
  return sum;
}
// Returns total + error, without the error of an infinite total, which is NaN.
template <typename Number>
inline Number corrected(Number total, Number error) {
  return select_less(abs(error), Number(INFINITY), total + error, total);
}
// The same for n floats, rounded up to vectors, into `sum`.
inline void correct(float* sum, const float* total, const float* error, index_t n) {
  for (index_t i = 0; i < n; i += Vec::width) store(sum + i, corrected(load(total + i), load(error + i)));
}

// Calls body(j, n) for ranges of a row short enough to sum sequentially: the rounding errors of equal terms,
// as in a softmax of small logits, all have one sign.
template <typename Body>
inline void for_few(index_t n, Body body) {
  constexpr index_t few = 4 * Vec::width;
  for (index_t j = 0; j < n; j += few) body(j, smaller(few, n - j));
}

// The sum of a row, lane by lane, of sums of a few vectors.
struct RowSum {
  Vec total{0.0f}, error{0.0f};
  // The error is exact if the total is the larger one, and small otherwise.
  void add(Vec sum) {
    const Vec next = total + sum;
    error += sum - (next - total);
    total = next;
  }
  float value() const {
    const float sum = reduce_add(total + error);
    return sum == sum ? sum : reduce_add(total);
  }
};

// A matrix summed over many keys or queries: products are added to `part`, parts to a compensated total.
class LongSum {
 public:
  float* const part;
  static index_t floats(index_t size, bool several) { return several ? 3 * size : size; }
  LongSum(Scratch& scratch, index_t size, bool several)
      : part(scratch.take<float>(floats(size, several))), size_(size), several_(several) {}
  void begin() {
    if (several_) std::fill_n(part + size_, 2 * size_, 0.0f);
  }
  void add_part() {
    if (several_) add(part);
  }
  void add(const float* x) {
    float *total = part + size_, *error = total + size_;
    for (index_t i = 0; i < size_; i += Vec::width) {
      Vec e = load(error + i);
      store(total + i, add_to(load(total + i), load(x + i), e));
      store(error + i, e);
    }
  }
  // Leaves the sum in `part`.
  void finish() {
    if (several_) correct(part, part + size_, part + 2 * size_, size_);
  }

 private:
  index_t size_;
  bool several_;
};

inline void scale_row(float* x, index_t n, float factor) {
  for (index_t j = 0; j < n; j += Vec::width) store(x + j, load(x + j) * Vec(factor));
}

// Operands for fp32 values: the values themselves, or rounded to halves of bf16 pairs.
inline Vec rounded(Vec x, const float*) { return x; }
inline void store_rounded(float* row, index_t j, Vec x) { store(row + j, x); }
inline Vec load_rounded(const float* row, index_t j) { return load(row + j); }
#if IMF_ISA_LEVEL >= 4
inline Vec rounded(Vec x, const Bf16Pair*) { return round_to_bfloat16(x); }
inline void store_rounded(Bf16Pair* row, index_t j, Vec x) { store(reinterpret_cast<bfloat16*>(row) + j, x); }
inline Vec load_rounded(const Bf16Pair* row, index_t j) {
  return load(reinterpret_cast<const bfloat16*>(row) + j);
}
#endif

// Unscaled logits. Their maximum is subtracted before scaling: near it the difference is exact.
struct Logits {
  float sign, scale;
  explicit Logits(float signed_scale)
      : sign(signed_scale < 0.0f ? -1.0f : 1.0f), scale(signed_scale < 0.0f ? -signed_scale : signed_scale) {}
  // Logits with the sign of the scale, so that their order is that of the scaled ones.
  Vec ordered(Vec s) const { return s * Vec(sign); }
  // e^(scale (ordered(s) - max)), zeros where every logit is -inf.
  Vec exp(Vec s, float max) const {
    return IMF_ISA::exp(fma(s, Vec(sign), Vec(max == -INFINITY ? 0.0f : -max)) * Vec(scale));
  }
  // The factor that rescales sums from one maximum to a larger one.
  float factor(float max, float larger) const {
    return max == larger ? 1.0f : ::expf((max - (larger == -INFINITY ? 0.0f : larger)) * scale);
  }
};

// Elements of a mask of bool, as 0 and other numbers.
inline float to_float(std::uint8_t x) { return x; }
inline Vec load(const std::uint8_t* p) {
  typedef std::uint8_t Bytes __attribute__((vector_size(Vec::width)));
  Bytes x;
  std::memcpy(&x, p, sizeof x);
  return __builtin_convertvector((Vec::Integers)extend(__builtin_convertvector(x, Vec::Halves)), Vec::Lanes);
}

// Keys hidden from queries: by a mask of bool, one that is added to the logits, or the diagonal.
class Masking {
 public:
  const Logits logits;  // of what `apply` leaves: unscaled, or scaled and with the mask added

  template <typename Shape>
  explicit Masking(const Shape& a)
      : logits(adds(a) ? 1.0f : exponent_scale(a)), mask_(a.mask), is_causal_(a.is_causal), scale_(a.scale) {}

  // Returns how many of the keys any of the first `queries` queries may see.
  index_t keys_of(index_t queries, index_t keys) const { return is_causal_ ? smaller(queries, keys) : keys; }

  // Changes q k [rows, stride] of queries from q0 and `keys` keys from k0 on; keys that are hidden get the
  // least logit, whatever it was.
  void apply(float* s, index_t stride, index_t b, index_t h, index_t q0, index_t rows, index_t k0,
             index_t keys) const {
    const float hidden = logits.sign > 0.0f ? -INFINITY : INFINITY;
    for (index_t i = 0; is_causal_ && i < rows; ++i) {
      const index_t after = q0 + i + 1 - k0, seen = after < 0 ? 0 : smaller(after, keys);
      std::fill_n(s + i * stride + seen, keys - seen, hidden);
    }
    if (!mask_.data) return;
    const index_t first = b * mask_.stride[0] + h * mask_.stride[1] + q0 * mask_.stride[2];
    const auto rows_of = [&](auto element, auto masked) {
      const auto* elements = static_cast<const decltype(element)*>(mask_.data) + first + k0 * mask_.stride[3];
      // So many keys at a time that a transposed mask's rows share what the cache holds.
      for (index_t start = 0; start < keys; start += key_block) {
        for (index_t i = 0; i < rows; ++i) {
          float* row = s + i * stride + start;
          const auto* of_row = elements + i * mask_.stride[2] + start * mask_.stride[3];
          for_each_vec(smaller(key_block, keys - start), [&](index_t j, int lanes) {
            store(row + j, masked(load(row + j), load_strided(of_row + j * mask_.stride[3], lanes)));
          });
        }
      }
    };
    if (mask_.dtype == DType::boolean) {
      rows_of(std::uint8_t{}, [=](Vec x, Vec seen) { return select_less(Vec(0.0f), seen, x, Vec(hidden)); });
    } else {
      with_type(mask_.dtype, [&](auto element) {
        rows_of(element, [this](Vec x, Vec bias) {
          return select_less(Vec(-INFINITY), bias, fma(x, Vec(scale_), bias), bias);
        });
      });
    }
  }

 private:
  template <typename Shape>
  static bool adds(const Shape& a) {
    return a.mask.data && a.mask.dtype != DType::boolean;
  }
  // Hidden keys must get no weight even where the scale is 0 and all others get the same.
  template <typename Shape>
  static float exponent_scale(const Shape& a) {
    return a.scale == 0.0f && (a.mask.data || a.is_causal) ? FLT_MIN : a.scale;
  }
  template <typename Element>
  Vec load_strided(const Element* x, int lanes) const {
    if (mask_.stride[3] == 1 && lanes == Vec::width) return load(x);
    float elements[Vec::width] = {};
    for (int lane = 0; lane < lanes; ++lane) elements[lane] = to_float(x[lane * mask_.stride[3]]);
    return load(elements);
  }

  Mask mask_;
  bool is_causal_;
  float scale_;
};

// 1 / x; 0 for queries that see no key, whose weights add up to 0.
inline float inverse_or_zero(float x) { return x == 0.0f ? 0.0f : 1.0f / x; }

// Sums over keys for a block of queries.
struct QuerySums {
  float *out, *out_dot;  // [query_block, value_width rounded up to vectors]: O and A
  // The largest ordered logit, the sums of P and of P (S_dot - shift) as multiplied, and the shift.
  float max[query_block], weight[query_block], dot[query_block], shift[query_block];
};

// Adds partial sums to the totals, whose rounding errors are in `error`: both are rescaled to the larger
// maximum and to the mean of S_dot over all of their keys.
inline void add_sums(QuerySums& total, QuerySums& error, const QuerySums& part, index_t rows,
                     index_t value_stride, Logits logits, bool dual, bool has_out_dot) {
  for (index_t i = 0; i < rows; ++i) {
    const float highest = total.max[i] > part.max[i] ? total.max[i] : part.max[i];
    const float old = logits.factor(total.max[i], highest), recent = logits.factor(part.max[i], highest);
    const float old_weight = old * total.weight[i], recent_weight = recent * part.weight[i];
    const auto add = [&](float* sums, float* errors, float x) {
      errors[i] *= old;
      sums[i] = add_to(sums[i] * old, x, errors[i]);
    };
    total.max[i] = highest;
    add(total.weight, error.weight, recent_weight);
    float old_moved = 0.0f, recent_moved = 0.0f;
    if (dual) {
      const float shift_sum = (old * total.dot[i] + old_weight * total.shift[i]) +
                              (recent * part.dot[i] + recent_weight * part.shift[i]);
      const float shift = total.weight[i] > 0.0f ? shift_sum / total.weight[i] : total.shift[i];
      old_moved = total.shift[i] - shift;
      recent_moved = part.shift[i] - shift;
      add(total.dot, error.dot,
          old_weight * old_moved + (recent * part.dot[i] + recent_weight * recent_moved));
      total.shift[i] = shift;
    }
    const index_t row = i * value_stride;
    for (index_t j = row; j < row + value_stride; j += Vec::width) {
      const Vec o = load(total.out + j) * Vec(old), recent_o = load(part.out + j) * Vec(recent);
      Vec e = load(error.out + j) * Vec(old);
      store(total.out + j, add_to(o, recent_o, e));
      store(error.out + j, e);
      if (!has_out_dot) continue;
      e = load(error.out_dot + j) * Vec(old);
      const Vec a = add_to(load(total.out_dot + j) * Vec(old), o * Vec(old_moved), e);
      const Vec recent_a = fma(load(part.out_dot + j), Vec(recent), recent_o * Vec(recent_moved));
      store(total.out_dot + j, add_to(a, recent_a, e));
      store(error.out_dot + j, e);
    }
  }
}

inline void begin_sums(QuerySums& sums, index_t value_stride) {
  std::fill_n(sums.max, query_block, -INFINITY);
  for (float* x : {sums.weight, sums.dot, sums.shift}) std::fill_n(x, query_block, 0.0f);
  for (float* x : {sums.out, sums.out_dot}) std::fill_n(x, query_block * value_stride, 0.0f);
}

inline void correct_sums(QuerySums& total, const QuerySums& error, index_t value_stride) {
  correct(total.weight, total.weight, error.weight, query_block);
  correct(total.dot, total.dot, error.dot, query_block);
  correct(total.out, total.out, error.out, query_block * value_stride);
  correct(total.out_dot, total.out_dot, error.out_dot, query_block * value_stride);
}

// Computes the mean of rows [n, width] under `weights`, zero-padded to full vectors; zero if all weights are.
template <typename T>
inline void weighted_mean(const T* x, index_t stride, index_t n, index_t width, const float* weights,
                          float* mean) {
  float total = 0.0f;
  for (index_t i = 0; i < n; ++i) total += weights[i];
  const Vec inverse(total > 0.0f ? 1.0f / total : 0.0f);
  for_each_vec(width, [&](index_t j, int lanes) {
    Vec sum(0.0f);
    for (index_t i = 0; i < n; ++i) {
      if (weights[i] != 0.0f) sum = fma(Vec(weights[i]), load_lanes(x + i * stride + j, lanes), sum);
    }
    store(mean + j, sum * inverse);
  });
}

#if IMF_ISA_LEVEL >= 4
inline unsigned lanes_larger(Vec x, float limit) {
  return _mm512_cmp_ps_mask(x.v, _mm512_set1_ps(limit), _CMP_GT_OQ);
}
// Calls body(j, difference) with the rounding error of each element larger than `limit`.
template <typename Body>
inline void for_larger(const float* x, const Bf16Pair* rounded_x, index_t n, float limit, Body body) {
  const bfloat16* halves = reinterpret_cast<const bfloat16*>(rounded_x);
  for (index_t j = 0; j < n; j += Vec::width) {
    for (unsigned found = lanes_larger(abs(load(x + j)), limit); found; found &= found - 1) {
      const index_t i = j + __builtin_ctz(found);
      body(i, x[i] - to_float(halves[i]));
    }
  }
}
#else
inline unsigned lanes_larger(Vec, float) { return 0; }
#endif
template <typename Body>
inline void for_larger(const float*, const float*, index_t, float, Body) {}  // nothing was rounded

// Packs the first columns, full vectors, of rows [n, stride] into units along n; fp32 rows are units already.
inline void pair_rows(const float*, index_t, index_t, index_t, float*) {}
#if IMF_ISA_LEVEL >= 4
inline void pair_rows(const float* x, index_t stride, index_t n, index_t columns, Bf16Pair* pairs) {
  for (index_t i = 0; i < n; i += 2, x += 2 * stride, pairs += stride) {
    for (index_t j = 0; j < columns; j += Vec::width) {
      store_units(pairs + j, pair(load(x + j), i + 1 < n ? load(x + stride + j) : Vec(0.0f)));
    }
  }
}
#endif

// Calls body with the element type and the unit of its products: fp32 if an inner dimension is short, where
// pairs gain nothing and too few rounding errors average out.
template <typename Shape, typename Body>
void with_units(const Shape& a, Body body) {
  if (a.k.heads ? a.q.heads % a.k.heads : a.q.heads) {
    refuse("q must have a multiple of the heads of k, got % and %", {a.q.heads, a.k.heads});
  }
  if (a.mask.data && a.mask.dtype != DType::boolean && a.mask.dtype != DType::float32 &&
      a.mask.dtype != a.q.dtype) {
    refuse("mask must be of bool, float32 or the dtype of q");
  }
  constexpr index_t enough = 16;
  const bool fp32 = a.q.width < enough || a.v.width < enough || a.q.length < enough || a.k.length < enough;
  with_type(a.q.dtype, [&](auto t) {
    if (fp32) {
      body(t, float{});
    } else {
      body(t, typename UnitOf<decltype(t)>::type{});
    }
  });
}

// A block of rows of P, or of a product with it, as the backward multiplies it.
template <typename Unit>
struct BlockMatrix {
  float* values;  // [query_block, key_stride]
  Unit* columns;  // the same in units along the queries

  void take(Scratch& scratch, index_t key_stride) {
    values = scratch.take<float>(query_block * key_stride);
    if constexpr (elements_per_unit<Unit> > 1) {
      columns = scratch.take<Unit>(units<Unit>(query_block) * key_stride);
    } else {
      columns = values;
    }
  }
};

// One whose rows multiply the keys, such as dS.
template <typename Unit>
struct LogitMatrix : BlockMatrix<Unit> {
  Unit* rows;  // [query_block, row_stride]: in units along the keys
  index_t row_stride;
  float* key_weights;  // sums of |x| per key
  // Sums of the rows as rounded, and 3/16 of those of |x|; infinite if no |x| is larger.
  float left_over[query_block], limit[query_block];

  static index_t floats(index_t key_stride) { return (3 * query_block + 1) * key_stride; }
  void take(Scratch& scratch, index_t key_stride) {
    BlockMatrix<Unit>::take(scratch, key_stride);
    row_stride = units<Unit>(key_stride);
    if constexpr (elements_per_unit<Unit> > 1) {
      rows = scratch.take<Unit>(query_block * row_stride);
      key_weights = scratch.take<float>(key_stride);
    } else {
      rows = this->values;
    }
  }
};

// Rounds row i of n values, value(j) the vector from j on, and sums what `correct_products` needs.
template <typename Unit, typename Value>
inline void round_row(LogitMatrix<Unit>& x, index_t i, index_t n, Value value) {
  Vec left_over(0.0f), size(0.0f), largest(0.0f);
  for (index_t j = 0; j < n; j += Vec::width) {
    const Vec multiplied = rounded(value(j), x.rows), weight = abs(multiplied);
    store_rounded(x.rows + i * x.row_stride, j, multiplied);
    left_over += multiplied;
    size += weight;
    largest = max(largest, weight);
    // A query with non-finite values is left out of the mean, which its neighbours share.
    const Vec finite = select_less(weight, Vec(1e30f), weight, Vec(0.0f));
    store(x.key_weights + j, load(x.key_weights + j) + finite);
  }
  x.left_over[i] = reduce_add(left_over);
  const float limit = 0.1875f * reduce_add(size);
  x.limit[i] = lanes_larger(largest, limit) ? limit : INFINITY;
}

// Corrects `sum`, [rows, stride], a product of the rounded rows of x and the keys [n, width]: see `backward`
// in attention.cpp. k_mean is scratch, [stride].
template <typename T, typename Unit>
inline void correct_products(LogitMatrix<Unit>& x, index_t rows, index_t key_stride, const T* k,
                             index_t k_stride, index_t n, index_t width, float* k_mean, float* sum,
                             index_t stride) {
  weighted_mean(k, k_stride, n, width, x.key_weights, k_mean);
  for (index_t i = 0; i < rows; ++i, sum += stride) {
    if (x.limit[i] < INFINITY) {
      for_larger(x.values + i * key_stride, x.rows + i * x.row_stride, n, x.limit[i],
                 [&](index_t key, float difference) {
                   x.left_over[i] += difference;
                   for_each_vec(width, [&](index_t j, int lanes) {
                     const Vec kj = load_lanes(k + key * k_stride + j, lanes);
                     store(sum + j, fma(Vec(difference), kj, load(sum + j)));
                   });
                 });
    }
    for (index_t j = 0; j < stride; j += Vec::width) {
      store(sum + j, fma(Vec(-x.left_over[i]), load(k_mean + j), load(sum + j)));
    }
  }
}

}  // namespace
}  // namespace imf::IMF_ISA

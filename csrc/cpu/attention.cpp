// Attention with its tangent in one pass, and its primal backward. The formulas are in
// imf_kernels/ops/attention.py.
//
// A task is a head and a stretch of its queries. The head's keys and values are packed once (K transposed, V
// as it is), then blocks of queries meet blocks of keys: S and S_dot, the online softmax, and the products
// that are added to O and to A, where
//   A = sum_j P (V_dot + (S_dot - shift) V),  O_dot = A / l - (M / l) (O / l),  M = sum_j P (S_dot - shift).
// O_dot does not change when a constant is taken off a row of S_dot: `shift`, the mean of S_dot under the
// softmax so far, keeps M / l O / l from cancelling against A / l where keys or values have an offset. A key
// without weight has no part in it, however large.
//
// Where the processor has bf16 dot products, bf16 operands meet as they are, and P and P (S_dot - shift) are
// rounded for their products. The sums that normalise O and O_dot are then those of the rounded values, so
// that an offset of the values still cancels; lse is that of the unrounded ones.
#include "cpu/attention.h"

#include <algorithm>

#include "cpu/dtypes.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "cpu/small_gemm.h"

namespace imf {
namespace IMF_ISA {
namespace {

constexpr index_t query_block = 48;
constexpr index_t key_block = 256;

template <typename T>
T* head_of(const HeadsTensor& x, index_t b, index_t h) {
  return x.data ? static_cast<T*>(x.data) + b * x.stride[0] + h * x.stride[1] : nullptr;
}

inline index_t smaller(index_t a, index_t b) { return a < b ? a : b; }

inline void scale_row(float* x, index_t n, float factor) {
  for (index_t j = 0; j < n; j += Vec::width) store(x + j, load(x + j) * Vec(factor));
}

// What is multiplied for a value in fp32: itself, or rounded to half a pair.
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

// One block of queries and their running sums.
template <typename Unit>
struct QueryBlock {
  Unit *q, *q_dot;       // [query_block, units of width]
  float *s, *s_dot;      // [query_block, key_block]: q k and its tangent, without the softmax's scale
  Unit *p, *p_s_dot;     // [query_block, units of key_block]: P and P (S_dot - shift)
  float *out, *out_dot;  // [query_block, value_width rounded up to vectors]: O and A
  // Of P: its maximum, the sum of its values, of the rounded ones; of P (S_dot - shift); and the shift.
  float max[query_block], sum[query_block], weight[query_block], dot[query_block], shift[query_block];
};

// P = e^(S - max) and P (S_dot - shift) of a block of keys; the sums so far are brought to the new maximum
// and the new shift. `dual` false: S_dot is zero.
template <typename Unit>
inline void softmax_block(QueryBlock<Unit>& b, index_t rows, index_t keys, float scale, index_t value_stride,
                          bool first, bool dual, bool has_out_dot) {
  constexpr index_t p_stride = key_block / elements_per_unit<Unit>;
  for (index_t i = 0; i < rows; ++i) {
    const float* s = b.s + i * key_block;
    const float* s_dot = b.s_dot + i * key_block;
    Unit* p = b.p + i * p_stride;
    Unit* p_s_dot = b.p_s_dot + i * p_stride;
    Vec highest(first ? -INFINITY : b.max[i]);
    for_each_vec(keys, [&](index_t j, int lanes) {
      const Vec logit = load(s + j) * Vec(scale);
      highest = max(highest, keep_lanes(logit, lanes, -INFINITY));
    });
    const float row_max = reduce_max(highest);
    // A row of nothing but -inf so far: any finite maximum leaves its sums at zero.
    const float offset = row_max == -INFINITY ? 0.0f : row_max;
    if (!first) {
      const float factor = b.max[i] == row_max ? 1.0f : ::expf(b.max[i] - offset);
      b.sum[i] *= factor;
      b.weight[i] *= factor;
      b.dot[i] *= factor;
      scale_row(b.out + i * value_stride, value_stride, factor);
      if (has_out_dot) scale_row(b.out_dot + i * value_stride, value_stride, factor);
    }
    b.max[i] = row_max;
    Vec sum(0.0f), weight(0.0f), dot(0.0f);
    for_each_vec(keys, [&](index_t j, int lanes) {
      const Vec exact = keep_lanes(exp(load(s + j) * Vec(scale) - Vec(offset)), lanes, 0.0f);
      const Vec pj = rounded(exact, p);
      sum += exact;
      weight += pj;
      if (dual) dot = fma(pj, load(s_dot + j), dot);
      store_rounded(p, j, pj);
    });
    const float before = first ? 0.0f : b.weight[i];
    b.sum[i] = (first ? 0.0f : b.sum[i]) + reduce_add(sum);
    b.weight[i] = before + reduce_add(weight);
    if (!dual) continue;
    // M with no shift is `dot` + `before` times the old one. A row that nothing had weight in has no mean.
    const float old_shift = first ? 0.0f : b.shift[i], old_dot = first ? 0.0f : b.dot[i];
    const float total = old_dot + before * old_shift + scale * reduce_add(dot);
    const float shift = b.weight[i] > 0.0f ? total / b.weight[i] : old_shift;
    Vec rest(0.0f);
    for_each_vec(keys, [&](index_t j, int) {
      const Vec centred = load(s_dot + j) * Vec(scale) - Vec(shift);
      const Vec product = rounded(load_rounded(p, j) * centred, p);
      store_rounded(p_s_dot, j, product);
      rest += product;
    });
    if (!first && has_out_dot) {  // A = sum P S_dot V - shift O
      float* out_dot = b.out_dot + i * value_stride;
      const float* out = b.out + i * value_stride;
      const Vec moved(old_shift - shift);
      for (index_t j = 0; j < value_stride; j += Vec::width) {
        store(out_dot + j, fma(moved, load(out + j), load(out_dot + j)));
      }
    }
    b.dot[i] = old_dot + before * (old_shift - shift) + reduce_add(rest);
    b.shift[i] = shift;
  }
}

template <typename T, typename Unit>
void forward(const AttentionForward& a) {
  const index_t width = units<Unit>(a.width), all_keys = units<Unit>(a.keys);
  constexpr index_t p_stride = key_block / elements_per_unit<Unit>;
  const index_t value_stride = round_up(a.value_width, Vec::width);
  const index_t heads = a.batch * a.heads;
  const index_t query_blocks = (a.queries + query_block - 1) / query_block;
  // Whole heads where there are enough of them; else their queries are divided and the packing repeated.
  const index_t wanted = heads < 2 * a.threads && heads > 0 ? (2 * a.threads + heads - 1) / heads : 1;
  const index_t stretches = query_blocks < 1 ? 1 : smaller(wanted, query_blocks);
  const index_t tasks = heads * stretches;
  const int team = team_size(a.threads, heads * a.queries * a.keys, tasks);
  TaskQueue queue(tasks);

  on_each_thread(team, [&](int) {
    const index_t k_size = packed_size(width, a.keys), v_size = packed_size(all_keys, a.value_width);
    Scratch scratch(2 * k_size + 2 * v_size +
                    2 * query_block * (width + key_block + p_stride + value_stride));
    Unit* k = scratch.take<Unit>(k_size);
    Unit* k_dot = scratch.take<Unit>(k_size);
    Unit* v = scratch.take<Unit>(v_size);
    Unit* v_dot = scratch.take<Unit>(v_size);
    QueryBlock<Unit> block;
    block.q = scratch.take<Unit>(query_block * width);
    block.q_dot = scratch.take<Unit>(query_block * width);
    block.s = scratch.take<float>(query_block * key_block);
    block.s_dot = scratch.take<float>(query_block * key_block);
    if constexpr (elements_per_unit<Unit> > 1) {
      block.p = scratch.take<Unit>(query_block * p_stride);
      block.p_s_dot = scratch.take<Unit>(query_block * p_stride);
    } else {  // in place
      block.p = block.s;
      block.p_s_dot = block.s_dot;
    }
    block.out = scratch.take<float>(query_block * value_stride);
    block.out_dot = scratch.take<float>(query_block * value_stride);

    for (index_t task; queue.next(task);) {
      const index_t head = task / stretches, b = head / a.heads, h = head % a.heads;
      const index_t t = b - (a.batch - a.tangent_batch);
      const Range share =
          share_of(query_blocks, static_cast<int>(task % stretches), static_cast<int>(stretches));
      const T* q_head = head_of<T>(a.q, b, h);
      const T* k_head = head_of<T>(a.k, b, h);
      const T* v_head = head_of<T>(a.v, b, h);
      T* out_head = head_of<T>(a.out, b, h);
      const T* q_dot_head = t >= 0 ? head_of<T>(a.q_dot, t, h) : nullptr;
      const T* k_dot_head = t >= 0 ? head_of<T>(a.k_dot, t, h) : nullptr;
      const T* v_dot_head = t >= 0 ? head_of<T>(a.v_dot, t, h) : nullptr;
      T* out_dot_head = t >= 0 ? head_of<T>(a.out_dot, t, h) : nullptr;
      const bool dual = q_dot_head || k_dot_head;

      pack_transposed(k_head, a.k.stride[2], a.keys, a.width, k);
      pack(v_head, a.v.stride[2], a.keys, a.value_width, v);
      if (k_dot_head) pack_transposed(k_dot_head, a.k_dot.stride[2], a.keys, a.width, k_dot);
      if (v_dot_head) pack(v_dot_head, a.v_dot.stride[2], a.keys, a.value_width, v_dot);

      for (index_t q0 = share.begin * query_block; q0 < smaller(share.end * query_block, a.queries);
           q0 += query_block) {
        const index_t rows = smaller(query_block, a.queries - q0);
        copy_to_units(q_head + q0 * a.q.stride[2], a.q.stride[2], rows, a.width, block.q);
        if (q_dot_head) {
          copy_to_units(q_dot_head + q0 * a.q_dot.stride[2], a.q_dot.stride[2], rows, a.width, block.q_dot);
        }
        const Strided<Unit> q{block.q, width, 1}, q_dot{block.q_dot, width, 1};
        const Strided<Unit> p{block.p, p_stride, 1}, p_s_dot{block.p_s_dot, p_stride, 1};
        for (index_t k0 = 0; k0 < a.keys; k0 += key_block) {
          const index_t keys = smaller(key_block, a.keys - k0);
          const bool first = k0 == 0;
          // key_block is a multiple of panel_width, so a block of keys begins with a panel.
          const index_t first_unit = k0 / elements_per_unit<Unit>, key_units = units<Unit>(keys);
          const Unit* k_panel = k + k0 * width;
          const Unit* k_dot_panel = k_dot + k0 * width;
          product(rows, keys, width, q, k_panel, 0, width, block.s, key_block, false);
          if (q_dot_head) product(rows, keys, width, q_dot, k_panel, 0, width, block.s_dot, key_block, false);
          if (k_dot_head) {
            product(rows, keys, width, q, k_dot_panel, 0, width, block.s_dot, key_block,
                    q_dot_head != nullptr);
          }
          softmax_block(block, rows, keys, a.scale, value_stride, first, dual, out_dot_head != nullptr);
          const auto add_product = [&](Strided<Unit> weights, const Unit* values, float* sum, bool add) {
            product(rows, a.value_width, key_units, weights, values, first_unit, all_keys, sum, value_stride,
                    add);
          };
          add_product(p, v, block.out, !first);
          if (v_dot_head) add_product(p, v_dot, block.out_dot, !first);
          if (dual) add_product(p_s_dot, v, block.out_dot, !first || v_dot_head);
        }
        for (index_t i = 0; i < rows; ++i) {
          const float inverse = 1.0f / block.weight[i];
          const float mean = dual ? block.dot[i] * inverse : 0.0f;
          T* out = out_head + (q0 + i) * a.out.stride[2];
          T* out_dot = out_dot_head ? out_dot_head + (q0 + i) * a.out_dot.stride[2] : nullptr;
          const float* sum = block.out + i * value_stride;
          const float* sum_dot = block.out_dot + i * value_stride;
          for_each_vec(a.value_width, [&](index_t j, int lanes) {
            const Vec o = load(sum + j) * Vec(inverse);
            store_lanes(out + j, o, lanes);
            if (out_dot) {
              store_lanes(out_dot + j, fma(Vec(-mean), o, load(sum_dot + j) * Vec(inverse)), lanes);
            }
          });
          a.lse[head * a.queries + q0 + i] = block.max[i] + ::logf(block.sum[i]);
        }
      }
    }
  });
}

// The mean of rows [n, width] under `weights`, padded with zeros to whole vectors; zero where no row has any.
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

// Rows [n, stride] as units along n, where those are not the rows themselves.
inline void pair_rows(const float*, index_t, index_t, float*) {}
#if IMF_ISA_LEVEL >= 4
inline void pair_rows(const float* x, index_t stride, index_t n, Bf16Pair* pairs) {
  for (index_t i = 0; i < n; i += 2, x += 2 * stride, pairs += stride) {
    for (index_t j = 0; j < stride; j += Vec::width) {
      store_units(pairs + j, pair(load(x + j), i + 1 < n ? load(x + stride + j) : Vec(0.0f)));
    }
  }
}
#endif

// With P = e^(S - lse), dP = dO V^T and delta_i = sum_j P dP: dV = P^T dO, dS = P (dP - delta),
// dQ = scale dS K, dK = scale dS^T Q. A task is a head; dK and dV are summed over its blocks of queries.
// The rounding of lse keeps the rows of P from summing to 1, so they are normalised again. delta is also
// sum_d dO O, but taken from P and dP the rows of dS sum to zero as exactly as they can: an offset of the
// keys must cancel in dQ. It is taken in two steps, the second from dP less the first, so that an offset of
// the values cancels too. Rounded to bf16 those rows do not sum to zero again: what is left over times a mean
// of the keys is taken off dQ, a mean under |dS|, for a key without weight must have no part in it.
template <typename T, typename Unit>
void backward(const AttentionBackward& a) {
  constexpr bool rounds = elements_per_unit<Unit> > 1;
  const index_t width = units<Unit>(a.width), value_units = units<Unit>(a.value_width);
  const index_t all_keys = units<Unit>(a.keys);
  const index_t heads = a.batch * a.heads;
  const index_t stride = round_up(a.width, Vec::width), value_stride = round_up(a.value_width, Vec::width);
  const index_t key_stride = round_up(a.keys, Vec::width);
  const int team = team_size(a.threads, heads * a.queries * a.keys, heads);
  TaskQueue queue(heads);

  on_each_thread(team, [&](int) {
    const index_t query_units = units<Unit>(query_block);
    Scratch scratch(packed_size(width, a.keys) + packed_size(value_units, a.keys) +
                    packed_size(all_keys, a.width) + a.keys * (stride + value_stride) +
                    query_block * (width + value_units + 2 * stride + value_stride + 4 * key_stride) +
                    stride + key_stride);
    Unit* k_transposed = scratch.take<Unit>(packed_size(width, a.keys));
    Unit* v_transposed = scratch.take<Unit>(packed_size(value_units, a.keys));
    Unit* k = scratch.take<Unit>(packed_size(all_keys, a.width));
    float* k_mean = scratch.take<float>(stride);
    float* k_weights = scratch.take<float>(key_stride);
    float* dk = scratch.take<float>(a.keys * stride);
    float* dv = scratch.take<float>(a.keys * value_stride);
    Unit* q = scratch.take<Unit>(query_block * width);
    Unit* q_panels = scratch.take<Unit>(query_units * stride);
    Unit* dout = scratch.take<Unit>(query_block * value_units);
    Unit* dout_panels = scratch.take<Unit>(query_units * value_stride);
    float* dq = scratch.take<float>(query_block * stride);
    float* p = scratch.take<float>(query_block * key_stride);
    float* ds = scratch.take<float>(query_block * key_stride);
    // P and dS as they are multiplied: along the queries, and dS along the keys too.
    Unit *p_columns, *ds_columns, *ds_rows;
    index_t ds_row_stride;
    if constexpr (rounds) {
      ds_row_stride = units<Unit>(key_stride);
      p_columns = scratch.take<Unit>(query_units * key_stride);
      ds_columns = scratch.take<Unit>(query_units * key_stride);
      ds_rows = scratch.take<Unit>(query_block * ds_row_stride);
    } else {
      ds_row_stride = key_stride;
      p_columns = p;
      ds_columns = ds_rows = ds;
    }

    for (index_t head; queue.next(head);) {
      const index_t b = head / a.heads, h = head % a.heads;
      const T* q_head = head_of<T>(a.q, b, h);
      const T* k_head = head_of<T>(a.k, b, h);
      const T* dout_head = head_of<T>(a.dout, b, h);
      T* dq_head = head_of<T>(a.dq, b, h);
      T* dk_head = head_of<T>(a.dk, b, h);
      T* dv_head = head_of<T>(a.dv, b, h);
      pack_transposed(k_head, a.k.stride[2], a.keys, a.width, k_transposed);
      pack_transposed(head_of<T>(a.v, b, h), a.v.stride[2], a.keys, a.value_width, v_transposed);
      pack(k_head, a.k.stride[2], a.keys, a.width, k);
      if (a.queries == 0) {
        std::fill_n(dk, a.keys * stride, 0.0f);
        std::fill_n(dv, a.keys * value_stride, 0.0f);
      }

      for (index_t q0 = 0; q0 < a.queries; q0 += query_block) {
        const index_t rows = smaller(query_block, a.queries - q0), row_units = units<Unit>(rows);
        const T* q_rows = q_head + q0 * a.q.stride[2];
        const T* dout_rows = dout_head + q0 * a.dout.stride[2];
        copy_to_units(q_rows, a.q.stride[2], rows, a.width, q);
        copy_to_units(dout_rows, a.dout.stride[2], rows, a.value_width, dout);
        pack(q_rows, a.q.stride[2], rows, a.width, q_panels);
        pack(dout_rows, a.dout.stride[2], rows, a.value_width, dout_panels);
        product(rows, a.keys, width, Strided<Unit>{q, width, 1}, k_transposed, 0, width, p, key_stride,
                false);
        product(rows, a.keys, value_units, Strided<Unit>{dout, value_units, 1}, v_transposed, 0, value_units,
                ds, key_stride, false);
        float row_sums[query_block];  // of dS as it is multiplied
        if (rounds) std::fill_n(k_weights, key_stride, 0.0f);
        for (index_t i = 0; i < rows; ++i) {
          float* pi = p + i * key_stride;
          float* dsi = ds + i * key_stride;
          const Vec lse(a.lse[head * a.queries + q0 + i]);
          Vec sum(0.0f), dot(0.0f), rest(0.0f);
          for_each_vec(a.keys, [&](index_t j, int lanes) {
            const Vec pj = keep_lanes(exp(load(pi + j) * Vec(a.scale) - lse), lanes, 0.0f);
            store(pi + j, pj);
            sum += pj;
            dot = fma(pj, load(dsi + j), dot);
          });
          const float inverse = 1.0f / reduce_add(sum);
          const Vec delta(reduce_add(dot) * inverse), normalize(inverse);
          for (index_t j = 0; j < key_stride; j += Vec::width) {
            const Vec pj = load(pi + j) * normalize, dsj = pj * (load(dsi + j) - delta);
            store(pi + j, pj);
            store(dsi + j, dsj);
            rest += dsj;
          }
          const Vec correction(reduce_add(rest));
          Vec left_over(0.0f);
          for (index_t j = 0; j < key_stride; j += Vec::width) {
            const Vec dsj = fma(Vec(0.0f) - load(pi + j), correction, load(dsi + j));
            store(dsi + j, dsj);
            if (rounds) {
              const Vec multiplied = rounded(dsj, ds_rows);
              store_rounded(ds_rows + i * ds_row_stride, j, multiplied);
              left_over += multiplied;
              store(k_weights + j, load(k_weights + j) + abs(multiplied));
            }
          }
          if (rounds) row_sums[i] = reduce_add(left_over);
        }
        pair_rows(p, key_stride, rows, p_columns);
        pair_rows(ds, key_stride, rows, ds_columns);
        const bool first = q0 == 0;
        if (dv_head) {
          product(a.keys, a.value_width, row_units, Strided<Unit>{p_columns, 1, key_stride}, dout_panels, 0,
                  row_units, dv, value_stride, !first);
        }
        if (dk_head) {
          product(a.keys, a.width, row_units, Strided<Unit>{ds_columns, 1, key_stride}, q_panels, 0,
                  row_units, dk, stride, !first);
        }
        if (dq_head) {
          product(rows, a.width, all_keys, Strided<Unit>{ds_rows, ds_row_stride, 1}, k, 0, all_keys, dq,
                  stride, false);
          if (rounds) weighted_mean(k_head, a.k.stride[2], a.keys, a.width, k_weights, k_mean);
          for (index_t i = 0; rounds && i < rows; ++i) {
            for (index_t j = 0; j < stride; j += Vec::width) {
              float* x = dq + i * stride + j;
              store(x, fma(Vec(-row_sums[i]), load(k_mean + j), load(x)));
            }
          }
          copy_rows(dq, stride, rows, a.width, a.scale, dq_head + q0 * a.dq.stride[2], a.dq.stride[2]);
        }
      }
      if (dk_head) copy_rows(dk, stride, a.keys, a.width, a.scale, dk_head, a.dk.stride[2]);
      if (dv_head) copy_rows(dv, value_stride, a.keys, a.value_width, 1.0f, dv_head, a.dv.stride[2]);
    }
  });
}

// Calls body with the element type and with what its products are made of. Where one of the inner dimensions
// is short they are in fp32: pairs gain nothing there, and too few rounding errors meet in a sum to cancel.
template <typename Shape, typename Body>
void with_units(const Shape& a, Body body) {
  constexpr index_t enough = 16;
  const bool fp32 = a.width < enough || a.value_width < enough || a.queries < enough || a.keys < enough;
  with_type(a.type, [&](auto t) {
    if (fp32) {
      body(t, float{});
    } else {
      body(t, typename UnitOf<decltype(t)>::type{});
    }
  });
}

}  // namespace

void attention_forward(const AttentionForward& a) {
  with_units(a, [&](auto t, auto unit) { forward<decltype(t), decltype(unit)>(a); });
}

void attention_backward(const AttentionBackward& a) {
  with_units(a, [&](auto t, auto unit) { backward<decltype(t), decltype(unit)>(a); });
}

}  // namespace IMF_ISA
}  // namespace imf

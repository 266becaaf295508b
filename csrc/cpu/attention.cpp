// Attention with its tangent in one pass, and its primal backward. Formulas: imf_kernels/ops/attention.py.
//
// A task is a head and a range of its queries. The head's keys and values are packed once (K transposed),
// then blocks of queries meet blocks of keys: S and S_dot, the online softmax, and the products added to O
// and to A,
//   A = sum_j P (V_dot + (S_dot - shift) V),  O_dot = A / l - (M / l) (O / l),  M = sum_j P (S_dot - shift).
// Subtracting a constant from a row of S_dot leaves O_dot unchanged: `shift`, the running softmax mean of
// S_dot, keeps M / l O / l from cancelling against A / l where keys or values have an offset. A key without
// weight does not affect it, however large.
//
// Processors with bf16 dot products multiply bf16 operands directly, with P and P (S_dot - shift) rounded.
// The sums that normalise O and O_dot are taken from the rounded values, so that an offset of the values
// still cancels.
//
// A mask changes the logits of a block before the softmax. Where it is the diagonal, blocks of queries meet
// the keys that any of them sees, and no others.
//
// A sum over many keys or queries has three levels, so that its rounding error does not grow with their
// number: about 32 terms (small_gemm.h), about 32 such sums, and a total with compensated rounding errors.
#include "ops/attention.h"

#include <algorithm>

#include "cpu/attention_parts.h"
#include "cpu/parallel.h"

namespace imf::IMF_ISA {
namespace {

// Buffers of one block of queries.
template <typename Unit>
struct QueryBlock : QuerySums {
  Unit *q, *q_dot;    // [query_block, units of width]
  float *s, *s_dot;   // [query_block, key_block]: q k and its tangent, without the softmax's scale
  Unit *p, *p_s_dot;  // [query_block, units of key_block]: P and P (S_dot - shift)
};

// Computes P = e^(S - max) and P (S_dot - shift) of a block of keys, and rescales the sums so far to the new
// maximum and shift. `dual` false: S_dot is zero.
template <typename Unit>
inline void softmax_block(QueryBlock<Unit>& b, index_t rows, index_t keys, Logits logits, float scale,
                          index_t value_stride, bool first, bool dual, bool has_out_dot) {
  constexpr index_t p_stride = key_block / elements_per_unit<Unit>;
  for (index_t i = 0; i < rows; ++i) {
    const float* s = b.s + i * key_block;
    const float* s_dot = b.s_dot + i * key_block;
    Unit* p = b.p + i * p_stride;
    Unit* p_s_dot = b.p_s_dot + i * p_stride;
    Vec highest(first ? -INFINITY : b.max[i]);
    for_each_vec(keys, [&](index_t j, int lanes) {
      highest = max(highest, keep_lanes(logits.ordered(load(s + j)), lanes, -INFINITY));
    });
    const float row_max = reduce_max(highest);
    if (!first && b.max[i] != row_max) {
      const float factor = logits.factor(b.max[i], row_max);
      b.weight[i] *= factor;
      b.dot[i] *= factor;
      scale_row(b.out + i * value_stride, value_stride, factor);
      if (has_out_dot) scale_row(b.out_dot + i * value_stride, value_stride, factor);
    }
    b.max[i] = row_max;
    Vec weight(0.0f), dot(0.0f);
    for_few(keys, [&](index_t first_key, index_t n) {
      Vec few(0.0f), few_dot(0.0f);
      for_each_vec(n, [&](index_t offset_key, int lanes) {
        const index_t j = first_key + offset_key;
        const Vec pj = rounded(keep_lanes(logits.exp(load(s + j), row_max), lanes, 0.0f), p);
        few += pj;
        if (dual) few_dot = fma(pj, load(s_dot + j), few_dot);
        store_rounded(p, j, pj);
      });
      weight += few;
      dot += few_dot;
    });
    const float before = first ? 0.0f : b.weight[i];
    b.weight[i] = before + reduce_add(weight);
    if (!dual) continue;
    // M without a shift is `dot` + `before` times the old shift. A row without any weight has no mean.
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
  constexpr index_t p_stride = key_block / elements_per_unit<Unit>;
  const Masking masking(a);
  const index_t seen_keys = masking.keys_of(a.q.length, a.k.length);
  const index_t width = units<Unit>(a.q.width), all_keys = units<Unit>(seen_keys);
  const index_t value_stride = round_up(a.v.width, Vec::width), group = group_of(a);
  const index_t heads = a.q.batch * a.q.heads;
  const index_t query_blocks = (a.q.length + query_block - 1) / query_block;
  // Full heads if there are enough; otherwise their queries are divided and the packing repeated.
  const index_t wanted =
      heads < 2 * a.place.threads && heads > 0 ? (2 * a.place.threads + heads - 1) / heads : 1;
  const index_t stretches = query_blocks < 1 ? 1 : smaller(wanted, query_blocks);
  const index_t tasks = heads * stretches;
  const int team = team_size(a.place.threads, heads * a.q.length * a.k.length, tasks);
  const bool several_sums = a.k.length > keys_per_sum;
  const index_t terms = logit_terms(a.q.length, a.k.length);
  TaskQueue queue(tasks);

  on_each_thread(team, [&](int) {
    const Tiles tiles;
    const index_t k_size = packed_size(width, seen_keys), v_size = packed_size(all_keys, a.v.width);
    Scratch scratch(2 * k_size + 2 * v_size +
                    2 * query_block * (width + key_block + p_stride + (several_sums ? 3 : 1) * value_stride));
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
    QuerySums total, error;
    for (QuerySums* sums : {static_cast<QuerySums*>(&block), &total, &error}) {
      if (sums != &block && !several_sums) break;
      sums->out = scratch.take<float>(query_block * value_stride);
      sums->out_dot = scratch.take<float>(query_block * value_stride);
    }

    index_t packed_head = -1;
    for (index_t task; queue.next(task);) {
      const index_t head = task / stretches, b = head / a.q.heads, h = head % a.q.heads, kv = h / group;
      const index_t t = b - (a.q.batch - a.out_dot.batch);
      // The last queries first: where the diagonal masks, they see the most keys.
      const auto stretch = static_cast<int>(stretches - 1 - task % stretches);
      const Range share = share_of(query_blocks, stretch, static_cast<int>(stretches));
      const T* q_head = head_of<T>(a.q, b, h);
      T* out_head = head_of<T>(a.out, b, h);
      const T* q_dot_head = t >= 0 ? head_of<T>(a.q_dot, t, h) : nullptr;
      const T* k_dot_head = t >= 0 ? head_of<T>(a.k_dot, t, kv) : nullptr;
      const T* v_dot_head = t >= 0 ? head_of<T>(a.v_dot, t, kv) : nullptr;
      T* out_dot_head = t >= 0 ? head_of<T>(a.out_dot, t, h) : nullptr;
      const bool dual = q_dot_head || k_dot_head;

      if (packed_head != b * a.k.heads + kv) {
        packed_head = b * a.k.heads + kv;
        pack_transposed(head_of<T>(a.k, b, kv), a.k.stride[2], seen_keys, a.q.width, k);
        pack(head_of<T>(a.v, b, kv), a.v.stride[2], seen_keys, a.v.width, v);
        if (k_dot_head) pack_transposed(k_dot_head, a.k_dot.stride[2], seen_keys, a.q.width, k_dot);
        if (v_dot_head) pack(v_dot_head, a.v_dot.stride[2], seen_keys, a.v.width, v_dot);
      }

      for (index_t q0 = share.begin * query_block; q0 < smaller(share.end * query_block, a.q.length);
           q0 += query_block) {
        const index_t rows = smaller(query_block, a.q.length - q0);
        copy_to_units(q_head + q0 * a.q.stride[2], a.q.stride[2], rows, a.q.width, block.q);
        if (q_dot_head) {
          copy_to_units(q_dot_head + q0 * a.q_dot.stride[2], a.q_dot.stride[2], rows, a.q.width, block.q_dot);
        }
        // Empty tangents of q and k are null pointers: nothing below would write A.
        if (out_dot_head && !dual && !v_dot_head) std::fill_n(block.out_dot, rows * value_stride, 0.0f);
        const Strided<Unit> q{block.q, width, 1}, q_dot{block.q_dot, width, 1};
        const Strided<Unit> p{block.p, p_stride, 1}, p_s_dot{block.p_s_dot, p_stride, 1};
        const index_t end = masking.keys_of(q0 + rows, a.k.length);
        if (end == 0) begin_sums(block, value_stride);
        for (index_t k0 = 0; k0 < end; k0 += key_block) {
          const index_t keys = smaller(key_block, end - k0);
          const bool first = k0 % keys_per_sum == 0;
          // key_block is a multiple of panel_width, so a block of keys begins with a panel.
          const index_t first_unit = k0 / elements_per_unit<Unit>, key_units = units<Unit>(keys);
          const Unit* k_panel = k + k0 * width;
          const Unit* k_dot_panel = k_dot + k0 * width;
          const auto logits = [&](Strided<Unit> queries, const Unit* panel, float* s, bool add) {
            product(rows, keys, width, queries, panel, 0, width, s, key_block, add, terms, seen_keys - k0);
          };
          logits(q, k_panel, block.s, false);
          if (q_dot_head) logits(q_dot, k_panel, block.s_dot, false);
          if (k_dot_head) logits(q, k_dot_panel, block.s_dot, q_dot_head != nullptr);
          masking.apply(block.s, key_block, b, h, q0, rows, k0, keys);
          softmax_block(block, rows, keys, masking.logits, a.scale, value_stride, first, dual,
                        out_dot_head != nullptr);
          const auto add_product = [&](Strided<Unit> weights, const Unit* values, float* sum, bool add) {
            product(rows, a.v.width, key_units, weights, values, first_unit, all_keys, sum, value_stride,
                    add);
          };
          add_product(p, v, block.out, !first);
          if (v_dot_head) add_product(p, v_dot, block.out_dot, !first);
          if (dual) add_product(p_s_dot, v, block.out_dot, !first || v_dot_head);
          const index_t next = k0 + key_block;
          if (several_sums && (next % keys_per_sum == 0 || next >= end)) {
            if (k0 < keys_per_sum) {
              begin_sums(total, value_stride);
              begin_sums(error, value_stride);
            }
            add_sums(total, error, block, rows, value_stride, masking.logits, dual, out_dot_head != nullptr);
          }
        }
        if (several_sums) correct_sums(total, error, value_stride);
        const QuerySums& sums = several_sums ? total : block;
        for (index_t i = 0; i < rows; ++i) {
          const float inverse = inverse_or_zero(sums.weight[i]);
          const float mean = dual ? sums.dot[i] * inverse : 0.0f;
          T* out = out_head + (q0 + i) * a.out.stride[2];
          T* out_dot = out_dot_head ? out_dot_head + (q0 + i) * a.out_dot.stride[2] : nullptr;
          const float* sum = sums.out + i * value_stride;
          const float* sum_dot = sums.out_dot + i * value_stride;
          for_each_vec(a.v.width, [&](index_t j, int lanes) {
            const Vec o = load(sum + j) * Vec(inverse);
            store_lanes(out + j, o, lanes);
            if (out_dot) {
              store_lanes(out_dot + j, fma(Vec(-mean), o, load(sum_dot + j) * Vec(inverse)), lanes);
            }
          });
          a.lse.data[head * a.q.length + q0 + i] = sums.max[i];
        }
      }
    }
  });
}

struct HeadSums;  // the owner of dK and dV of single heads of queries

// With P = e^(S - max) / sum_j e^(S - max), dP = dO V^T and delta_i = sum_j P dP: dV = P^T dO, dS = P (dP -
// delta), dQ = scale dS K, dK = scale dS^T Q. A task is a head; dK and dV are summed over its blocks of
// queries, and over the heads of queries that share it: each of those is a task, and its sums wait in memory,
// where heads are fewer than threads. Forward saves the maximum, not the log-sum, from which the distances of
// the logits are rounded more coarsely. delta also equals sum_d dO O, but from P and dP the rows of dS sum to
// zero as exactly as possible, so that an offset of the keys cancels in dQ. In fp32 it takes two steps, the
// second from dP minus the first, so that an offset of the values cancels too. Rows rounded to bf16 do not
// sum to zero: the remainder times the mean of the keys under |dS|, to which a key without weight does not
// contribute, is subtracted from dQ. A key with 3/16 of a row's sum of |dS| may be far from that mean, with
// too few similar errors to cancel its own: for such keys, at most five, the rounding error of dS is
// multiplied too.
template <typename T, typename Unit>
void backward(const AttentionBackward& a) {
  constexpr bool rounds = elements_per_unit<Unit> > 1;
  const Masking masking(a);
  const index_t seen_keys = masking.keys_of(a.q.length, a.k.length);
  const index_t width = units<Unit>(a.q.width), value_units = units<Unit>(a.v.width);
  const index_t all_keys = units<Unit>(seen_keys);
  const index_t kv_heads = a.k.batch * a.k.heads, group = group_of(a);
  const index_t stride = round_up(a.q.width, Vec::width), value_stride = round_up(a.v.width, Vec::width);
  const index_t key_stride = round_up(seen_keys, Vec::width);
  const index_t terms = logit_terms(a.q.length, a.k.length);
  const bool several_dq = seen_keys > keys_per_sum, several_dkv = a.q.length > queries_per_sum;
  const index_t dk_size = a.dk.data ? seen_keys * stride : 0,
                dv_size = a.dv.data ? seen_keys * value_stride : 0;
  const auto store_gradients = [&](index_t b, index_t kv, const float* dk, const float* dv) {
    const auto store_rows = [&](const Heads& x, const float* sum, index_t sum_stride, float scale) {
      if (T* rows = head_of<T>(x, b, kv)) {
        copy_rows(sum, sum_stride, seen_keys, x.width, scale, rows, x.stride[2]);
        for (index_t i = seen_keys; i < x.length; ++i) std::fill_n(rows + i * x.stride[2], x.width, T{});
      }
    };
    store_rows(a.dk, dk, stride, a.scale);
    store_rows(a.dv, dv, value_stride, 1.0f);
  };
  const bool divided = group > 1 && kv_heads < a.place.threads;
  const index_t heads_per_task = divided ? 1 : group, tasks = kv_heads * group / heads_per_task;
  ScratchOf<HeadSums> head_sums(divided ? tasks * (dk_size + dv_size) : 0);
  float* dk_of_heads = head_sums.take<float>(divided ? tasks * dk_size : 0);
  float* dv_of_heads = head_sums.take<float>(divided ? tasks * dv_size : 0);
  const int team = team_size(a.place.threads, kv_heads * group * a.q.length * a.k.length, tasks);
  TaskQueue queue(tasks);

  on_each_thread(team, [&](int) {
    const Tiles tiles;
    const index_t query_units = units<Unit>(query_block);
    Scratch scratch(packed_size(width, seen_keys) + packed_size(value_units, seen_keys) +
                    packed_size(all_keys, a.q.width) + LongSum::floats(query_block * stride, several_dq) +
                    LongSum::floats(dk_size + dv_size, several_dkv) +
                    (group > 1 ? LongSum::floats(dk_size + dv_size, true) : 0) +
                    query_block * (width + value_units + stride + value_stride + 4 * key_stride) + stride +
                    key_stride);
    Unit* k_transposed = scratch.take<Unit>(packed_size(width, seen_keys));
    Unit* v_transposed = scratch.take<Unit>(packed_size(value_units, seen_keys));
    Unit* k = scratch.take<Unit>(packed_size(all_keys, a.q.width));
    float* k_mean = scratch.take<float>(stride);
    LongSum dk(scratch, dk_size, several_dkv), dv(scratch, dv_size, several_dkv);
    LongSum group_dk(scratch, group > 1 ? dk_size : 0, true),
        group_dv(scratch, group > 1 ? dv_size : 0, true);
    Unit* q = scratch.take<Unit>(query_block * width);
    Unit* q_panels = scratch.take<Unit>(query_units * stride);
    Unit* dout = scratch.take<Unit>(query_block * value_units);
    Unit* dout_panels = scratch.take<Unit>(query_units * value_stride);
    LongSum dq(scratch, query_block * stride, several_dq);
    BlockMatrix<Unit> p;
    LogitMatrix<Unit> ds;
    p.take(scratch, key_stride);
    ds.take(scratch, key_stride);

    for (index_t task; queue.next(task);) {
      const index_t first_head = task * heads_per_task, b = first_head / a.q.heads;
      const index_t first_h = first_head % a.q.heads, kv = first_h / group;
      const T* k_head = head_of<T>(a.k, b, kv);
      pack_transposed(k_head, a.k.stride[2], seen_keys, a.q.width, k_transposed);
      pack_transposed(head_of<T>(a.v, b, kv), a.v.stride[2], seen_keys, a.v.width, v_transposed);
      pack(k_head, a.k.stride[2], seen_keys, a.q.width, k);
      group_dk.begin();
      group_dv.begin();
      for (index_t h = first_h; h < first_h + heads_per_task; ++h) {
        if (a.q.length == 0) {
          std::fill_n(dk.part, dk_size, 0.0f);
          std::fill_n(dv.part, dv_size, 0.0f);
        }
        dk.begin();
        dv.begin();
        for (index_t q0 = 0; q0 < a.q.length; q0 += query_block) {
          const index_t rows = smaller(query_block, a.q.length - q0), row_units = units<Unit>(rows);
          const index_t keys = masking.keys_of(q0 + rows, a.k.length), columns = round_up(keys, Vec::width);
          const T* q_rows = head_of<T>(a.q, b, h) + q0 * a.q.stride[2];
          const T* dout_rows = head_of<T>(a.dout, b, h) + q0 * a.dout.stride[2];
          copy_to_units(q_rows, a.q.stride[2], rows, a.q.width, q);
          copy_to_units(dout_rows, a.dout.stride[2], rows, a.v.width, dout);
          pack(q_rows, a.q.stride[2], rows, a.q.width, q_panels);
          pack(dout_rows, a.dout.stride[2], rows, a.v.width, dout_panels);
          product(rows, keys, width, Strided<Unit>{q, width, 1}, k_transposed, 0, width, p.values, key_stride,
                  false, terms, seen_keys);
          product(rows, keys, value_units, Strided<Unit>{dout, value_units, 1}, v_transposed, 0, value_units,
                  ds.values, key_stride, false, terms, seen_keys);
          masking.apply(p.values, key_stride, b, h, q0, rows, 0, keys);
          if constexpr (rounds) std::fill_n(ds.key_weights, columns, 0.0f);
          for (index_t i = 0; i < rows; ++i) {
            float* pi = p.values + i * key_stride;
            float* dsi = ds.values + i * key_stride;
            const float row_max = a.lse.data[(b * a.q.heads + h) * a.q.length + q0 + i];
            RowSum sum, dot;
            for_few(keys, [&](index_t first_key, index_t n) {
              Vec few(0.0f), few_dot(0.0f);
              for_each_vec(n, [&](index_t offset, int lanes) {
                const index_t j = first_key + offset;
                const Vec pj = keep_lanes(masking.logits.exp(load(pi + j), row_max), lanes, 0.0f);
                store(pi + j, pj);
                few += pj;
                few_dot = fma(pj, load(dsi + j), few_dot);
              });
              sum.add(few);
              dot.add(few_dot);
            });
            const float inverse = inverse_or_zero(sum.value());
            const Vec delta(dot.value() * inverse), normalize(inverse);
            if constexpr (rounds) {
              round_row(ds, i, columns, [&](index_t j) {
                const Vec pj = load(pi + j) * normalize, dsj = pj * (load(dsi + j) - delta);
                store(pi + j, pj);
                store(dsi + j, dsj);
                return dsj;
              });
            } else {
              RowSum rest;
              for_few(columns, [&](index_t first_key, index_t n) {
                Vec few(0.0f);
                for (index_t j = first_key; j < first_key + n; j += Vec::width) {
                  const Vec pj = load(pi + j) * normalize, dsj = pj * (load(dsi + j) - delta);
                  store(pi + j, pj);
                  store(dsi + j, dsj);
                  few += dsj;
                }
                rest.add(few);
              });
              const Vec correction(0.0f - rest.value());
              for (index_t j = 0; j < columns; j += Vec::width) {
                store(dsi + j, fma(load(pi + j), correction, load(dsi + j)));
              }
            }
          }
          pair_rows(p.values, key_stride, rows, columns, p.columns);
          pair_rows(ds.values, key_stride, rows, columns, ds.columns);
          const bool first = q0 % queries_per_sum == 0;
          // Later blocks may see more keys than the first, which does not add.
          if (first && dk_size) std::fill_n(dk.part + keys * stride, (seen_keys - keys) * stride, 0.0f);
          if (first && dv_size)
            std::fill_n(dv.part + keys * value_stride, (seen_keys - keys) * value_stride, 0.0f);
          if (dv_size) {
            product(keys, a.v.width, row_units, Strided<Unit>{p.columns, 1, key_stride}, dout_panels, 0,
                    row_units, dv.part, value_stride, !first);
          }
          if (dk_size) {
            product(keys, a.q.width, row_units, Strided<Unit>{ds.columns, 1, key_stride}, q_panels, 0,
                    row_units, dk.part, stride, !first);
          }
          if (q0 + rows == a.q.length || (q0 + rows) % queries_per_sum == 0) {
            dv.add_part();
            dk.add_part();
          }
          if (T* dq_head = head_of<T>(a.dq, b, h)) {
            if (keys == 0) std::fill_n(dq.part, rows * stride, 0.0f);
            dq.begin();
            constexpr index_t units_per_sum = keys_per_sum / elements_per_unit<Unit>;
            const index_t key_units = units<Unit>(keys);
            for (index_t k0 = 0; k0 < key_units; k0 += units_per_sum) {
              product(rows, a.q.width, smaller(units_per_sum, key_units - k0),
                      Strided<Unit>{ds.rows + k0, ds.row_stride, 1}, k, k0, all_keys, dq.part, stride, false);
              dq.add_part();
            }
            dq.finish();
            if constexpr (rounds) {
              correct_products(ds, rows, key_stride, k_head, a.k.stride[2], keys, a.q.width, k_mean, dq.part,
                               stride);
            }
            copy_rows(dq.part, stride, rows, a.q.width, a.scale, dq_head + q0 * a.dq.stride[2],
                      a.dq.stride[2]);
          }
        }
        dk.finish();
        dv.finish();
        if (divided) {
          std::copy_n(dk.part, dk_size, dk_of_heads + task * dk_size);
          std::copy_n(dv.part, dv_size, dv_of_heads + task * dv_size);
        } else if (group > 1) {
          group_dk.add(dk.part);
          group_dv.add(dv.part);
        }
      }
      if (group == 1) {
        store_gradients(b, kv, dk.part, dv.part);
      } else if (!divided) {
        group_dk.finish();
        group_dv.finish();
        store_gradients(b, kv, group_dk.part, group_dv.part);
      }
    }
  });
  if (!divided) return;
  Scratch scratch(LongSum::floats(dk_size + dv_size, true));
  LongSum dk(scratch, dk_size, true), dv(scratch, dv_size, true);
  for (index_t group_head = 0; group_head < kv_heads; ++group_head) {
    dk.begin();
    dv.begin();
    for (index_t head = group_head * group; head < (group_head + 1) * group; ++head) {
      dk.add(dk_of_heads + head * dk_size);
      dv.add(dv_of_heads + head * dv_size);
    }
    dk.finish();
    dv.finish();
    store_gradients(group_head / a.k.heads, group_head % a.k.heads, dk.part, dv.part);
  }
}

}  // namespace

void attention_forward(const AttentionForward& a) {
  with_units(a, [&](auto t, auto unit) { forward<decltype(t), decltype(unit)>(a); });
}

void attention_backward(const AttentionBackward& a) {
  AttentionBackward call = a;
  if (a.q.heads == 0) {  // no queries: keys that nothing sees have gradients of zero
    call.q.heads = call.dout.heads = a.k.heads;
    call.q.length = call.dout.length = 0;
    call.q.data = call.dout.data = call.dq.data = call.mask.data = nullptr;
  }
  with_units(call, [&](auto t, auto unit) { backward<decltype(t), decltype(unit)>(call); });
}

}  // namespace imf::IMF_ISA

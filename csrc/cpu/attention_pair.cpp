// Backward of attention's pair. Formulas: imf_kernels/ops/attention_pair.py, whose names these are.
//
// A task is a head of keys. Its keys and values are packed once, then blocks of queries meet all of its keys:
// S, S_dot, A and B of a block of rows, from them P, P Z, dS_dot and dS in place, and the products added to
// the gradients. Rounding errors are treated as by the primal's backward (attention.cpp): rows of dS and
// dS_dot sum to zero as exactly as possible, so that an offset of the keys cancels.
#include "ops/attention_pair.h"

#include <algorithm>
#include <initializer_list>

#include "cpu/attention_parts.h"
#include "cpu/parallel.h"

namespace imf::IMF_ISA {
namespace {

// A block of queries or of their cotangents, as both operands of products.
template <typename Unit>
struct QueryRows {
  Unit* rows;    // [query_block, units of width]
  Unit* panels;  // packed, units along the queries
  bool given = false;

  static index_t floats(index_t width_units, index_t stride) { return query_block * (width_units + stride); }
  void take(Scratch& scratch, index_t width_units, index_t stride) {
    rows = scratch.take<Unit>(query_block * width_units);
    panels = scratch.take<Unit>(units<Unit>(query_block) * stride);
  }
  template <typename T>
  void fill(const T* head, index_t first, index_t stride, index_t count, index_t width) {
    given = head != nullptr;
    if (!given) return;
    copy_to_units(head + first * stride, stride, count, width, rows);
    pack(head + first * stride, stride, count, width, panels);
  }
};

// A product of rows and packed columns, if both are given.
template <typename Unit>
struct Term {
  const QueryRows<Unit>& rows;
  const Unit* panels;
};

// Computes row i of P, P Z, dS_dot and dS from S, S_dot, A and B, in place.
template <typename Unit>
inline void differentiate_row(BlockMatrix<Unit>& p, BlockMatrix<Unit>& p_z, LogitMatrix<Unit>& ds_dot,
                              LogitMatrix<Unit>& ds, index_t i, index_t keys, index_t key_stride,
                              Logits logits, float row_max, float scale) {
  float *const pi = p.values + i * key_stride, *const zi = p_z.values + i * key_stride;
  float *const ai = ds_dot.values + i * key_stride, *const wi = ds.values + i * key_stride;
  const index_t n = round_up(keys, Vec::width);
  RowSum weight, s_dot_sum, a_sum;
  for_few(keys, [&](index_t first, index_t count) {
    Vec few(0.0f), few_s_dot(0.0f), few_a(0.0f);
    for_each_vec(count, [&](index_t offset, int lanes) {
      const index_t j = first + offset;
      const Vec pj = keep_lanes(logits.exp(load(pi + j), row_max), lanes, 0.0f);
      store(pi + j, pj);
      few += pj;
      few_s_dot = fma(pj, load(zi + j), few_s_dot);
      few_a = fma(pj, load(ai + j), few_a);
    });
    weight.add(few);
    s_dot_sum.add(few_s_dot);
    a_sum.add(few_a);
  });
  const float inverse = inverse_or_zero(weight.value());
  const Vec normalize(inverse), mean(s_dot_sum.value() * inverse), alpha(a_sum.value() * inverse);
  RowSum w_sum, ds_dot_rest, ds_rest;
  for_few(n, [&](index_t first, index_t count) {
    Vec few_w(0.0f), few_rest(0.0f);
    for (index_t j = first; j < first + count; j += Vec::width) {
      const Vec pj = load(pi + j) * normalize, z = (load(zi + j) - mean) * Vec(scale);
      const Vec a = load(ai + j) - alpha, w = fma(a, z, load(wi + j)), product = pj * a;
      store(pi + j, pj);
      store(zi + j, pj * z);
      store(ai + j, product);
      store(wi + j, w);
      few_rest += product;
      few_w = fma(pj, w, few_w);
    }
    ds_dot_rest.add(few_rest);
    w_sum.add(few_w);
  });
  const Vec beta(w_sum.value());
  for_few(n, [&](index_t first, index_t count) {
    Vec few(0.0f);
    for (index_t j = first; j < first + count; j += Vec::width) {
      const Vec product = load(pi + j) * (load(wi + j) - beta);
      store(wi + j, product);
      few += product;
    }
    ds_rest.add(few);
  });
  if constexpr (elements_per_unit<Unit> > 1) {
    round_row(ds, i, n, [&](index_t j) { return load(wi + j); });
    round_row(ds_dot, i, n, [&](index_t j) { return load(ai + j); });
  } else {
    const Vec correction(0.0f - ds_rest.value()), correction_dot(0.0f - ds_dot_rest.value());
    for (index_t j = 0; j < n; j += Vec::width) {
      const Vec pj = load(pi + j);
      store(wi + j, fma(pj, correction, load(wi + j)));
      store(ai + j, fma(pj, correction_dot, load(ai + j)));
    }
  }
}

template <typename T, typename Unit>
void pair_backward(const AttentionPairBackward& a) {
  constexpr bool rounds = elements_per_unit<Unit> > 1;
  const index_t width = units<Unit>(a.q.width), value_units = units<Unit>(a.v.width);
  const Masking masking(a);
  const index_t queries = a.q.length, all_keys = masking.keys_of(queries, a.k.length);
  const index_t key_units = units<Unit>(all_keys), key_stride = round_up(all_keys, Vec::width);
  const index_t stride = round_up(a.q.width, Vec::width), value_stride = round_up(a.v.width, Vec::width);
  const index_t heads = a.k.batch * a.k.heads, group = group_of(a);
  const index_t terms = logit_terms(queries, a.k.length);
  const bool several_dq = all_keys > keys_per_sum, several_dkv = group * queries > queries_per_sum;
  const bool moves = a.q_dot.data || a.k_dot.data;
  const index_t k_size = packed_size(width, all_keys), k_rows_size = packed_size(key_units, a.q.width);
  const index_t v_size = packed_size(value_units, all_keys);
  const int team = team_size(a.place.threads, a.q.batch * a.q.heads * queries * all_keys, heads);
  TaskQueue queue(heads);

  on_each_thread(team, [&](int) {
    const Tiles tiles;
    Scratch scratch(2 * (k_size + k_rows_size + v_size) +
                    2 * LongSum::floats(all_keys * (stride + value_stride), several_dkv) +
                    2 * LongSum::floats(query_block * stride, several_dq) +
                    2 * QueryRows<Unit>::floats(width, stride) +
                    2 * QueryRows<Unit>::floats(value_units, value_stride) +
                    4 * LogitMatrix<Unit>::floats(key_stride) + stride);
    Unit* k_transposed = scratch.take<Unit>(k_size);
    Unit* k_dot_transposed = scratch.take<Unit>(k_size);
    Unit* k = scratch.take<Unit>(k_rows_size);
    Unit* k_dot = scratch.take<Unit>(k_rows_size);
    Unit* v_transposed = scratch.take<Unit>(v_size);
    Unit* v_dot_transposed = scratch.take<Unit>(v_size);
    LongSum dk(scratch, all_keys * stride, several_dkv), dk_dot(scratch, all_keys * stride, several_dkv);
    LongSum dv(scratch, all_keys * value_stride, several_dkv);
    LongSum dv_dot(scratch, all_keys * value_stride, several_dkv);
    LongSum dq(scratch, query_block * stride, several_dq), dq_dot(scratch, query_block * stride, several_dq);
    QueryRows<Unit> q, q_dot, dout, dout_dot;
    for (QueryRows<Unit>* x : {&q, &q_dot}) x->take(scratch, width, stride);
    for (QueryRows<Unit>* x : {&dout, &dout_dot}) x->take(scratch, value_units, value_stride);
    BlockMatrix<Unit> p, p_z;
    LogitMatrix<Unit> ds, ds_dot;
    for (BlockMatrix<Unit>* x : {&p, &p_z}) x->take(scratch, key_stride);
    for (LogitMatrix<Unit>* x : {&ds, &ds_dot}) x->take(scratch, key_stride);
    float* k_mean = scratch.take<float>(stride);

    for (index_t head; queue.next(head);) {
      const index_t b = head / a.k.heads, kv_h = head % a.k.heads;
      const T* k_head = head_of<T>(a.k, b, kv_h);
      const T* k_dot_head = head_of<T>(a.k_dot, b, kv_h);
      const T* v_dot_head = head_of<T>(a.v_dot, b, kv_h);
      pack_transposed(k_head, a.k.stride[2], all_keys, a.q.width, k_transposed);
      pack_transposed(head_of<T>(a.v, b, kv_h), a.v.stride[2], all_keys, a.v.width, v_transposed);
      pack(k_head, a.k.stride[2], all_keys, a.q.width, k);
      if (k_dot_head) {
        pack_transposed(k_dot_head, a.k_dot.stride[2], all_keys, a.q.width, k_dot_transposed);
        pack(k_dot_head, a.k_dot.stride[2], all_keys, a.q.width, k_dot);
      }
      if (v_dot_head) pack_transposed(v_dot_head, a.v_dot.stride[2], all_keys, a.v.width, v_dot_transposed);

      // The sums over queries of the gradients that are wanted.
      struct Total {
        LongSum& sum;
        index_t stride;
        const Heads& out;
        float scale;
      };
      const Total of_k{dk, stride, a.dk, a.scale}, of_k_dot{dk_dot, stride, a.dk_dot, a.scale};
      const Total of_v{dv, value_stride, a.dv, 1.0f}, of_v_dot{dv_dot, value_stride, a.dv_dot, 1.0f};
      const auto for_totals = [&](auto body) {
        for (const Total* total : {&of_k, &of_k_dot, &of_v, &of_v_dot}) {
          if (total->out.data) body(*total);
        }
      };
      const auto begin_part = [&] {
        for_totals([&](const Total& t) { std::fill_n(t.sum.part, all_keys * t.stride, 0.0f); });
      };
      begin_part();
      for_totals([](const Total& t) { t.sum.begin(); });

      index_t summed = 0;  // queries in the present part of a sum
      for (index_t h = kv_h * group; h < (kv_h + 1) * group; ++h) {
        const float* row_max = a.lse.data + (b * a.q.heads + h) * queries;
        for (index_t q0 = 0; q0 < queries; q0 += query_block) {
          const index_t rows = smaller(query_block, queries - q0), row_units = units<Unit>(rows);
          const index_t keys = masking.keys_of(q0 + rows, all_keys), columns = round_up(keys, Vec::width);
          q.fill(head_of<T>(a.q, b, h), q0, a.q.stride[2], rows, a.q.width);
          q_dot.fill(head_of<T>(a.q_dot, b, h), q0, a.q_dot.stride[2], rows, a.q.width);
          dout.fill(head_of<T>(a.dout, b, h), q0, a.dout.stride[2], rows, a.v.width);
          dout_dot.fill(head_of<T>(a.dout_dot, b, h), q0, a.dout_dot.stride[2], rows, a.v.width);

          // x = the sum of products of the terms given, zeros for none.
          const auto multiply = [&](float* x, index_t inner, std::initializer_list<Term<Unit>> sum) {
            bool add = false;
            for (const Term<Unit>& term : sum) {
              if (!term.rows.given || !term.panels) continue;
              product(rows, keys, inner, Strided<Unit>{term.rows.rows, inner, 1}, term.panels, 0, inner, x,
                      key_stride, add, terms, all_keys);
              add = true;
            }
            if (!add) std::fill_n(x, rows * key_stride, 0.0f);
          };
          multiply(p.values, width, {{q, k_transposed}});
          multiply(p_z.values, width, {{q_dot, k_transposed}, {q, k_dot_head ? k_dot_transposed : nullptr}});
          multiply(ds_dot.values, value_units, {{dout_dot, moves ? v_transposed : nullptr}});
          multiply(ds.values, value_units,
                   {{dout, v_transposed}, {dout_dot, v_dot_head ? v_dot_transposed : nullptr}});
          masking.apply(p.values, key_stride, b, h, q0, rows, 0, keys);
          if (rounds) {
            for (LogitMatrix<Unit>* x : {&ds, &ds_dot}) std::fill_n(x->key_weights, key_stride, 0.0f);
          }
          for (index_t i = 0; i < rows; ++i) {
            differentiate_row(p, p_z, ds_dot, ds, i, keys, key_stride, masking.logits, row_max[q0 + i],
                              a.scale);
          }
          for (BlockMatrix<Unit>* x :
               {&p, &p_z, static_cast<BlockMatrix<Unit>*>(&ds), static_cast<BlockMatrix<Unit>*>(&ds_dot)}) {
            pair_rows(x->values, key_stride, rows, columns, x->columns);
          }

          const auto add_columns = [&](const Total& total, const BlockMatrix<Unit>& x,
                                       const QueryRows<Unit>& y) {
            if (!total.out.data || !y.given) return;
            product(keys, total.out.width, row_units, Strided<Unit>{x.columns, 1, key_stride}, y.panels, 0,
                    row_units, total.sum.part, total.stride, true);
          };
          add_columns(of_k, ds, q);
          add_columns(of_k, ds_dot, q_dot);
          add_columns(of_k_dot, ds_dot, q);
          add_columns(of_v, p, dout);
          if (moves) add_columns(of_v, p_z, dout_dot);
          add_columns(of_v_dot, p, dout_dot);
          summed += rows;
          if (summed >= queries_per_sum && several_dkv) {
            for_totals([](const Total& t) { t.sum.add_part(); });
            begin_part();
            summed = 0;
          }

          // x times the keys and, if given, ds_dot times their tangents.
          const auto multiply_keys = [&](LongSum& sum, LogitMatrix<Unit>& x, const Unit* tangents,
                                         const Heads& out) {
            if (!out.data) return;
            if (keys == 0) std::fill_n(sum.part, rows * stride, 0.0f);
            sum.begin();
            constexpr index_t units_per_sum = keys_per_sum / elements_per_unit<Unit>;
            const index_t inner = units<Unit>(keys);
            for (index_t k0 = 0; k0 < inner; k0 += units_per_sum) {
              const index_t n = smaller(units_per_sum, inner - k0);
              const auto add = [&](const LogitMatrix<Unit>& y, const Unit* panels) {
                product(rows, a.q.width, n, Strided<Unit>{y.rows + k0, y.row_stride, 1}, panels, k0,
                        key_units, sum.part, stride, panels != k);
              };
              add(x, k);
              if (tangents) add(ds_dot, tangents);
              sum.add_part();
            }
            sum.finish();
            if constexpr (rounds) {
              correct_products(x, rows, key_stride, k_head, a.k.stride[2], keys, a.q.width, k_mean, sum.part,
                               stride);
            }
            copy_rows(sum.part, stride, rows, a.q.width, a.scale, head_of<T>(out, b, h) + q0 * out.stride[2],
                      out.stride[2]);
          };
          multiply_keys(dq, ds, k_dot_head ? k_dot : nullptr, a.dq);
          multiply_keys(dq_dot, ds_dot, nullptr, a.dq_dot);
        }
      }
      for_totals([&](const Total& t) {
        if (summed) t.sum.add_part();
        t.sum.finish();
        T* out = head_of<T>(t.out, b, kv_h);
        copy_rows(t.sum.part, t.stride, all_keys, t.out.width, t.scale, out, t.out.stride[2]);
        for (index_t i = all_keys; i < a.k.length; ++i) {  // keys that no query sees
          std::fill_n(out + i * t.out.stride[2], t.out.width, T{});
        }
      });
    }
  });
}

}  // namespace

void attention_pair_backward(const AttentionPairBackward& a) {
  with_units(a, [&](auto t, auto unit) { pair_backward<decltype(t), decltype(unit)>(a); });
}

}  // namespace imf::IMF_ISA

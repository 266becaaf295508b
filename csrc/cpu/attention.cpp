// Attention with its tangent in one pass, and its primal backward. The formulas are in
// imf_kernels/ops/attention.py.
//
// A task is a head and a stretch of its queries. The head's keys and values are packed once (K
// transposed, V as it is, in fp32), then blocks of queries meet blocks of keys: S and S_dot, the
// online softmax, and the products that are added to O and to A, where
//   A = sum_j P (V_dot + (S_dot - shift) V),  O_dot = A / l - (M / l) (O / l),  M = sum_j P (S_dot - shift).
// O_dot does not change when a constant is taken off a row of S_dot: `shift`, the mean of S_dot under the
// softmax so far, keeps M / l O / l from cancelling against A / l where keys or values have an offset. A key
// without weight has no part in it, however large.
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

// Columns beyond the last key: no part in the maximum, nothing in the sums.
inline void hide_padding(float* s, index_t row_stride, index_t rows, index_t columns) {
  for (index_t i = 0; i < rows; ++i) {
    for (index_t j = columns; j < round_up(columns, Vec::width); ++j) s[i * row_stride + j] = -INFINITY;
  }
}

inline void scale_row(float* x, index_t n, float factor) {
  for (index_t j = 0; j < n; j += Vec::width) store(x + j, load(x + j) * Vec(factor));
}

// One block of queries and their running sums.
struct QueryBlock {
  float *q, *q_dot;      // [query_block, width], q times the softmax scale
  float *s, *s_dot;      // [query_block, key_block]
  float *out, *out_dot;  // [query_block, value_width rounded up to vectors]: O and A
  float max[query_block], sum[query_block], dot[query_block], shift[query_block];
};

// P = e^(S - max) in the place of S and P (S_dot - shift) in the place of S_dot; the sums so far are
// brought to the new maximum and the new shift. `dual` false: S_dot is zero.
inline void softmax_block(QueryBlock& b, index_t rows, index_t keys, index_t value_stride, bool first,
                          bool dual, bool has_out_dot) {
  const index_t columns = round_up(keys, Vec::width);
  for (index_t i = 0; i < rows; ++i) {
    float* s = b.s + i * key_block;
    float* s_dot = b.s_dot + i * key_block;
    Vec highest(first ? -INFINITY : b.max[i]);
    for (index_t j = 0; j < columns; j += Vec::width) highest = max(highest, load(s + j));
    const float row_max = reduce_max(highest);
    // A row of nothing but -inf so far: any finite maximum leaves its sums at zero.
    const float offset = row_max == -INFINITY ? 0.0f : row_max;
    if (!first) {
      const float factor = b.max[i] == row_max ? 1.0f : ::expf(b.max[i] - offset);
      b.sum[i] *= factor;
      b.dot[i] *= factor;
      scale_row(b.out + i * value_stride, value_stride, factor);
      if (has_out_dot) scale_row(b.out_dot + i * value_stride, value_stride, factor);
    }
    b.max[i] = row_max;
    Vec sum(0.0f), dot(0.0f);
    for (index_t j = 0; j < columns; j += Vec::width) {
      const Vec p = exp(load(s + j) - Vec(offset));
      store(s + j, p);
      sum += p;
      if (dual) dot = fma(p, load(s_dot + j), dot);
    }
    const float before = first ? 0.0f : b.sum[i];
    b.sum[i] = before + reduce_add(sum);
    if (!dual) continue;
    // M with the old shift is `dot` + `before` times it. A row that nothing had weight in yet has no mean.
    const float old_shift = first ? 0.0f : b.shift[i], old_dot = first ? 0.0f : b.dot[i];
    const float total = old_dot + before * old_shift + reduce_add(dot);
    const float shift = b.sum[i] > 0.0f ? total / b.sum[i] : old_shift;
    Vec rest(0.0f);
    for (index_t j = 0; j < columns; j += Vec::width) {
      const Vec p_s_dot = load(s + j) * (load(s_dot + j) - Vec(shift));
      store(s_dot + j, p_s_dot);
      rest += p_s_dot;
    }
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

template <typename T>
void forward(const AttentionForward& a) {
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
    const index_t k_size = packed_size(a.width, a.keys), v_size = packed_size(a.keys, a.value_width);
    Scratch scratch(2 * k_size + 2 * v_size + 2 * query_block * (a.width + key_block + value_stride));
    float* k = scratch.take(k_size);
    float* k_dot = scratch.take(k_size);
    float* v = scratch.take(v_size);
    float* v_dot = scratch.take(v_size);
    QueryBlock block;
    block.q = scratch.take(query_block * a.width);
    block.q_dot = scratch.take(query_block * a.width);
    block.s = scratch.take(query_block * key_block);
    block.s_dot = scratch.take(query_block * key_block);
    block.out = scratch.take(query_block * value_stride);
    block.out_dot = scratch.take(query_block * value_stride);

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
        copy_rows(q_head + q0 * a.q.stride[2], a.q.stride[2], rows, a.width, a.scale, block.q, a.width);
        if (q_dot_head) {
          copy_rows(q_dot_head + q0 * a.q_dot.stride[2], a.q_dot.stride[2], rows, a.width, a.scale,
                    block.q_dot, a.width);
        }
        const Strided q{block.q, a.width, 1}, q_dot{block.q_dot, a.width, 1};
        const Strided p{block.s, key_block, 1}, p_s_dot{block.s_dot, key_block, 1};
        for (index_t k0 = 0; k0 < a.keys; k0 += key_block) {
          const index_t keys = smaller(key_block, a.keys - k0);
          const bool first = k0 == 0;
          // key_block is a multiple of panel_width, so a block of keys begins with a panel.
          const float* k_panel = k + k0 * a.width;
          const float* k_dot_panel = k_dot + k0 * a.width;
          product(rows, keys, a.width, q, k_panel, 0, a.width, block.s, key_block, false);
          hide_padding(block.s, key_block, rows, keys);
          if (q_dot_head)
            product(rows, keys, a.width, q_dot, k_panel, 0, a.width, block.s_dot, key_block, false);
          if (k_dot_head) {
            product(rows, keys, a.width, q, k_dot_panel, 0, a.width, block.s_dot, key_block,
                    q_dot_head != nullptr);
          }
          softmax_block(block, rows, keys, value_stride, first, dual, out_dot_head != nullptr);
          product(rows, a.value_width, keys, p, v, k0, a.keys, block.out, value_stride, !first);
          if (v_dot_head) {
            product(rows, a.value_width, keys, p, v_dot, k0, a.keys, block.out_dot, value_stride, !first);
          }
          if (dual) {
            product(rows, a.value_width, keys, p_s_dot, v, k0, a.keys, block.out_dot, value_stride,
                    !first || v_dot_head);
          }
        }
        for (index_t i = 0; i < rows; ++i) {
          const float inverse = 1.0f / block.sum[i];
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

// With P = e^(S - lse), dP = dO V^T and delta_i = sum_j P dP: dV = P^T dO, dS = P (dP - delta),
// dQ = scale dS K, dK = dS^T (scale Q). A task is a head; dK and dV are summed over its blocks of queries.
// The rounding of lse keeps the rows of P from summing to 1, so they are normalised again. delta is also
// sum_d dO O, but taken from P and dP the rows of dS sum to zero as exactly as they can: an offset of the
// keys must cancel in dQ. It is taken in two steps, the second from dP less the first, so that an offset of
// the values cancels too.
template <typename T>
void backward(const AttentionBackward& a) {
  const index_t heads = a.batch * a.heads;
  const index_t stride = round_up(a.width, Vec::width), value_stride = round_up(a.value_width, Vec::width);
  const index_t key_stride = round_up(a.keys, Vec::width);
  const int team = team_size(a.threads, heads * a.queries * a.keys, heads);
  TaskQueue queue(heads);

  on_each_thread(team, [&](int) {
    Scratch scratch(packed_size(a.width, a.keys) + packed_size(a.value_width, a.keys) +
                    packed_size(a.keys, a.width) + a.keys * (stride + value_stride) +
                    query_block * (a.width + a.value_width + 2 * stride + value_stride + 2 * key_stride));
    float* k_transposed = scratch.take(packed_size(a.width, a.keys));
    float* v_transposed = scratch.take(packed_size(a.value_width, a.keys));
    float* k = scratch.take(packed_size(a.keys, a.width));
    float* dk = scratch.take(a.keys * stride);
    float* dv = scratch.take(a.keys * value_stride);
    float* q = scratch.take(query_block * a.width);
    float* q_panels = scratch.take(query_block * stride);
    float* dout = scratch.take(query_block * a.value_width);
    float* dout_panels = scratch.take(query_block * value_stride);
    float* dq = scratch.take(query_block * stride);
    float* p = scratch.take(query_block * key_stride);
    float* ds = scratch.take(query_block * key_stride);

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
        const index_t rows = smaller(query_block, a.queries - q0);
        copy_rows(q_head + q0 * a.q.stride[2], a.q.stride[2], rows, a.width, a.scale, q, a.width);
        copy_rows(dout_head + q0 * a.dout.stride[2], a.dout.stride[2], rows, a.value_width, 1.0f, dout,
                  a.value_width);
        pack(q, a.width, rows, a.width, q_panels);
        pack(dout, a.value_width, rows, a.value_width, dout_panels);
        product(rows, a.keys, a.width, {q, a.width, 1}, k_transposed, 0, a.width, p, key_stride, false);
        product(rows, a.keys, a.value_width, {dout, a.value_width, 1}, v_transposed, 0, a.value_width, ds,
                key_stride, false);
        hide_padding(p, key_stride, rows, a.keys);
        for (index_t i = 0; i < rows; ++i) {
          float* pi = p + i * key_stride;
          float* dsi = ds + i * key_stride;
          const Vec lse(a.lse[head * a.queries + q0 + i]);
          Vec sum(0.0f), dot(0.0f), rest(0.0f);
          for (index_t j = 0; j < key_stride; j += Vec::width) {
            const Vec pj = exp(load(pi + j) - lse);
            store(pi + j, pj);
            sum += pj;
            dot = fma(pj, load(dsi + j), dot);
          }
          const float inverse = 1.0f / reduce_add(sum);
          const Vec delta(reduce_add(dot) * inverse), normalize(inverse);
          for (index_t j = 0; j < key_stride; j += Vec::width) {
            const Vec pj = load(pi + j) * normalize, dsj = pj * (load(dsi + j) - delta);
            store(pi + j, pj);
            store(dsi + j, dsj);
            rest += dsj;
          }
          const Vec correction(reduce_add(rest));
          for (index_t j = 0; j < key_stride; j += Vec::width) {
            store(dsi + j, fma(Vec(0.0f) - load(pi + j), correction, load(dsi + j)));
          }
        }
        const bool first = q0 == 0;
        if (dv_head) {
          product(a.keys, a.value_width, rows, {p, 1, key_stride}, dout_panels, 0, rows, dv, value_stride,
                  !first);
        }
        if (dk_head) {
          product(a.keys, a.width, rows, {ds, 1, key_stride}, q_panels, 0, rows, dk, stride, !first);
        }
        if (dq_head) {
          product(rows, a.width, a.keys, {ds, key_stride, 1}, k, 0, a.keys, dq, stride, false);
          copy_rows(dq, stride, rows, a.width, a.scale, dq_head + q0 * a.dq.stride[2], a.dq.stride[2]);
        }
      }
      if (dk_head) copy_rows(dk, stride, a.keys, a.width, 1.0f, dk_head, a.dk.stride[2]);
      if (dv_head) copy_rows(dv, value_stride, a.keys, a.value_width, 1.0f, dv_head, a.dv.stride[2]);
    }
  });
}

}  // namespace

void attention_forward(const AttentionForward& a) {
  with_type(a.type, [&](auto t) { forward<decltype(t)>(a); });
}

void attention_backward(const AttentionBackward& a) {
  with_type(a.type, [&](auto t) { backward<decltype(t)>(a); });
}

}  // namespace IMF_ISA
}  // namespace imf

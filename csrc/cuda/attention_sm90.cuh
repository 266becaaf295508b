// Attention with its tangent in one pass, for compute capability 9.0: TMA and wgmma, warp-specialised,
// persistent. Formulas: imf_kernels/ops/attention.py; tiles and budgets: docs/attention-ladder.md.
//
// A block has a producer warp and two consumer warpgroups. Each consumer works on a unit, 64 queries of a
// head, and they alternate on the tensor cores: while one computes the softmax of its tile, the other
// multiplies. Both use the same tiles of keys if their units belong to one head. An odd unit left at the end
// of a head shares a block with that of the next head; tiles of keys then come for the two in turn.
//
// For a tile of keys, a thread holds two rows of S = Q K^T and of S_dot = Q_dot K^T + Q K_dot^T, and sums,
// all rescaled whenever the maximum of a row grows,
//     O = sum_j P V,  A = sum_j P V_dot + P (S_dot - shift) V,  M = sum_j P (S_dot - shift),  W = sum_j P
// with P = e^(S - max): O_dot = A / W - (M / W) (O / W). Subtracting a constant from a row of S_dot leaves
// O_dot unchanged: `shift`, the running softmax mean of S_dot, keeps an offset of keys or values from
// cancelling between the two terms. A key without weight does not affect it, however large. P and P (S_dot -
// shift) are rounded for their products, so M and W are sums of the rounded values; lse is taken from the
// unrounded ones.
//
// tests/cuda_host runs this file on an emulated machine.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "cuda/attention_items.h"
#include "cuda/ptx/descriptor.h"
#include "cuda/ptx/mbarrier.h"
#include "cuda/ptx/numbers.h"
#include "cuda/ptx/sync.h"
#include "cuda/ptx/tma.h"
#include "cuda/ptx/wgmma.h"
#include "types.h"

namespace imf::cuda::sm90 {

// Tangents present. A missing one in `all` is copied from beyond the tensor's end, as zeros.
enum class Tangents { none, of_query, all };

constexpr int warpgroup = 128, threads = 3 * warpgroup;
constexpr int unit_rows = 64;  // queries: the rows of wgmma
constexpr int shared_limit = 227 << 10;
constexpr int producer_registers = 24, consumer_registers = 240;
static_assert(warpgroup * (producer_registers + 2 * consumer_registers) <= 65536);

// Layout of shared memory. Head dims are zero-padded to `width`; a tile consists of columns of boxes, each as
// wide as the widest swizzle that divides `width`.
template <int width, Tangents tangents>
struct Tiles {
  static constexpr int keys = width <= 80 ? 96 : width == 96 ? 80 : 48;
  static constexpr int box = width % 64 == 0 ? 64 : width % 32 == 0 ? 32 : 16, boxes = width / box;
  static constexpr auto swizzle = static_cast<ptx::Swizzle>(2 * box);
  static constexpr int eight_rows = 8 * 2 * box;  // bytes
  static constexpr int query_box = unit_rows * 2 * box, key_box = keys * 2 * box;
  static constexpr int query_tile = boxes * query_box, key_tile = boxes * key_box;

  static constexpr int of_queries = tangents == Tangents::none ? 1 : 2;  // tensors: with a tangent or without
  static constexpr int of_keys = tangents == Tangents::all ? 2 : 1;
  static constexpr int query_slot = of_queries * query_tile, key_slot = of_keys * key_tile;
  // A stage holds a tile of keys and one of values. Tiles are numbered in the order of their copies: tile n
  // is in stage n % stages, and its barriers are in phase n / stages there.
  static constexpr int fitting = (shared_limit - 2048 - 2 * query_slot) / (2 * key_slot);
  static constexpr int stages = fitting < 4 ? fitting : 4;
  static constexpr IMF_PTX int barrier_of(int n) { return n % stages * 8; }
  static constexpr IMF_PTX std::uint32_t parity_of(int n) { return n / stages & 1; }
  static_assert(stages >= 2 && key_tile % 1024 == 0 && query_tile % 1024 == 0);

  // Offsets into shared memory, from a multiple of 1024 on.
  static constexpr int k = 2 * query_slot, v = k + stages * key_slot, barriers = v + stages * key_slot;
  static constexpr int query_full = barriers, query_empty = query_full + 2 * 8;
  static constexpr int k_full = query_empty + 2 * 8, k_empty = k_full + stages * 8;
  static constexpr int v_full = k_empty + stages * 8, v_empty = v_full + stages * 8;
  static constexpr int shared = v_empty + stages * 8 + 1023;  // with room for alignment
  static_assert(shared <= shared_limit);
};

struct Parameters {
  ptx::TensorMap q, k, v, q_dot, k_dot, v_dot;
  // First row of a tangent: 0, or the end of the tensor if there is none.
  int q_dot_row, k_dot_row, v_dot_row;
  int heads, group, queries, keys, value_width;
  int all_heads, units, items;  // samples times heads, units of a head, pairs of units
  float scale;
  void *out, *out_dot;
  index_t out_stride[3], out_dot_stride[3];
  float* lse;
};

// Copies all boxes, of `box_bytes` each, of a tile.
template <typename S, int box_bytes>
__device__ __forceinline__ void copy_tile(std::uint32_t target, const ptx::TensorMap& map,
                                          std::uint32_t barrier, int row, int head, int sample) {
#pragma unroll
  for (int i = 0; i < S::boxes; ++i) {
    ptx::copy_box(target + i * box_bytes, map, barrier, i * S::box, row, head, sample);
  }
}

// Copies all tiles, by one thread, in the order in which they are consumed.
template <int width, Tangents tangents>
__device__ __forceinline__ void produce(const Parameters& p, std::uint32_t base) {
  using S = Tiles<width, tangents>;
  const int tiles = (p.keys + S::keys - 1) / S::keys;
  int n = 0;
  std::uint32_t parity = 0;
  for (int i = blockIdx.x; i < p.items; i += gridDim.x, parity ^= 1) {
    const Item item = item_of(i, p.all_heads, p.units);
    const auto copy_queries = [&] {
#pragma unroll
      for (int side = 0; side < 2; ++side) {
        const std::uint32_t full = base + S::query_full + side * 8, target = base + side * S::query_slot;
        const int sample = item.head[side] / p.heads, head = item.head[side] % p.heads;
        const int row = item.unit[side] * unit_rows;
        ptx::mbarrier_wait(base + S::query_empty + side * 8, parity ^ 1);
        ptx::mbarrier_arrive_expect(full, S::query_slot);
        copy_tile<S, S::query_box>(target, p.q, full, row, head, sample);
        if (tangents != Tangents::none) {
          copy_tile<S, S::query_box>(target + S::query_tile, p.q_dot, full, row + p.q_dot_row, head, sample);
        }
      }
    };
    // Copies a tile of keys or values: rows from `row` on.
    const auto copy_keys = [&](int tile, int full, int empty, const ptx::TensorMap& map,
                               const ptx::TensorMap& map_dot, int dot_row, int row, int side, int first) {
      const std::uint32_t barrier = base + full + S::barrier_of(tile);
      const std::uint32_t target = base + first + tile % S::stages * S::key_slot;
      const int all_head = side == 0 ? item.head[0] : item.head[1];
      const int sample = all_head / p.heads, head = all_head % p.heads / p.group;
      ptx::mbarrier_wait(base + empty + S::barrier_of(tile), S::parity_of(tile) ^ 1);
      ptx::mbarrier_arrive_expect(barrier, S::key_slot);
      copy_tile<S, S::key_box>(target, map, barrier, row, head, sample);
      if (tangents == Tangents::all) {
        copy_tile<S, S::key_box>(target + S::key_tile, map_dot, barrier, row + dot_row, head, sample);
      }
    };
    const int sides = item.together ? 1 : 2;
    // Tiles in the place of earlier items' do not wait for the queries' place, which is free after those.
    const int ahead = n == 0 ? 0 : min(tiles, S::stages / sides);
    for (int j = 0; j < tiles; ++j, n += sides) {
      if (j == ahead) copy_queries();
      const int row = j * S::keys;
#pragma unroll 1
      for (int side = 0; side < sides; ++side) {
        copy_keys(n + side, S::k_full, S::k_empty, p.k, p.k_dot, p.k_dot_row, row, side, S::k);
      }
#pragma unroll 1
      for (int side = 0; side < sides; ++side) {
        copy_keys(n + side, S::v_full, S::v_empty, p.v, p.v_dot, p.v_dot_row, row, side, S::v);
      }
    }
    if (ahead == tiles) copy_queries();
  }
}

// Sums a row over the four neighbouring lanes that hold it.
__device__ __forceinline__ float row_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}
__device__ __forceinline__ float row_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

// Stores a row of a tile of results, of which the four neighbouring lanes hold pairs of columns, 16 bytes a
// lane. `pair_of(c)`: this lane's pair of columns 8 c to 8 c + 7.
template <int width, typename PairOf>
__device__ __forceinline__ void store_row(std::uint16_t* to, int columns, bool inside, PairOf pair_of) {
  const int lane = threadIdx.x % 4;
#pragma unroll
  for (int first = 0; first < width / 8; first += 4) {
    std::uint32_t pairs[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) pairs[i] = first + i < width / 8 ? pair_of(first + i) : 0;
    // Transposed: pairs[i] becomes lane i's pair of columns 8 (first + lane).
#pragma unroll
    for (int bit = 1; bit < 4; bit *= 2) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (i & bit) continue;
        const bool upper = lane & bit;
        const std::uint32_t other = __shfl_xor_sync(0xffffffffu, upper ? pairs[i] : pairs[i + bit], bit);
        (upper ? pairs[i] : pairs[i + bit]) = other;
      }
    }
    const int column = 8 * (first + lane);
    if (inside && column < columns) {
      *reinterpret_cast<uint4*>(to + column) = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
    }
  }
}

// State of a thread's rows r and r + 8. `total` and `dot` are its parts of the sum of unrounded P and of M;
// the others belong to full rows: the maximum of S in units of ln 2, W, and the shift.
struct Rows {
  float highest[2], total[2], weight[2], shift[2], dot[2];
};

// sum (+)= a b^T, over `width` columns.
template <typename S, int n>
__device__ __forceinline__ void add_rows(float (&sum)[n / 2], std::uint32_t a, std::uint32_t b, bool add) {
  const std::uint64_t a_first = ptx::descriptor(a, 16, S::eight_rows, S::swizzle);
  const std::uint64_t b_first = ptx::descriptor(b, 16, S::eight_rows, S::swizzle);
#pragma unroll
  for (int column = 0; column < S::box * S::boxes; column += 16) {
    const int in_box = column % S::box * 2, box = column / S::box;
    ptx::multiply_rows<n>(sum, ptx::advance(a_first, box * S::query_box + in_box),
                          ptx::advance(b_first, box * S::key_box + in_box), add || column > 0);
  }
}

// sum += a b, over the rows of a tile of values; `a` as the pairs of its columns.
template <typename S, int n>
__device__ __forceinline__ void add_columns(float (&sum)[n / 2], const std::uint32_t (&a)[S::keys / 16][4],
                                            std::uint32_t b) {
  const std::uint64_t first = ptx::descriptor(b, S::key_box, S::eight_rows, S::swizzle);
#pragma unroll
  for (int i = 0; i < S::keys / 16; ++i) {
    ptx::multiply_columns<n>(sum, a[i], ptx::advance(first, i * 2 * S::eight_rows));
  }
}

// Computes P of a tile from S, rounded to bfloat16 for its products. The tile is empty from key `there` on.
// `decay`: the factor of the sums so far; `before`: W so far times it.
template <int count>
__device__ __forceinline__ void softmax(const float (&s)[count], std::uint32_t (&pairs)[count / 8][4],
                                        float scale, int there, Rows& rows, float (&decay)[2],
                                        float (&before)[2]) {
  float p[count];
  float offset[2], weight[2] = {0.0f, 0.0f};
  float maximum[2] = {rows.highest[0], rows.highest[1]};
#pragma unroll
  for (int i = 0; i < count; ++i) p[i] = s[i] * scale;
  if (there < 2 * count) {
    const int first = threadIdx.x % 4 * 2;
#pragma unroll
    for (int i = 0; i < count; ++i) {
      if (i / 4 * 8 + first + i % 2 >= there) p[i] = -INFINITY;
    }
  }
#pragma unroll
  for (int i = 0; i < count; ++i) maximum[i / 2 % 2] = fmaxf(maximum[i / 2 % 2], p[i]);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    maximum[r] = row_max(maximum[r]);
    offset[r] = maximum[r] == -INFINITY ? 0.0f : maximum[r];  // any finite one leaves a row of -inf at zero
    decay[r] = ptx::exp2(rows.highest[r] - offset[r]);
    rows.highest[r] = maximum[r];
    rows.total[r] *= decay[r];
  }
#pragma unroll
  for (int i = 0; i < count; i += 2) {
    const int r = i / 2 % 2;
    const float low = ptx::exp2(p[i] - offset[r]), high = ptx::exp2(p[i + 1] - offset[r]);
    rows.total[r] += low + high;
    pairs[i / 8][i / 2 % 4] = ptx::pack(low, high);
    float rounded_low, rounded_high;
    ptx::unpack(pairs[i / 8][i / 2 % 4], rounded_low, rounded_high);
    weight[r] += rounded_low + rounded_high;
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    before[r] = rows.weight[r] * decay[r];
    rows.weight[r] = before[r] + row_sum(weight[r]);
  }
}

// Computes the new shift, the running softmax mean of scale S_dot. `moved`: its decrease.
template <int count>
__device__ __forceinline__ void find_shift(const std::uint32_t (&pairs)[count / 8][4],
                                           const float (&s_dot)[count], float scale, Rows& rows,
                                           const float (&before)[2], float (&moved)[2]) {
  float sum[2] = {0.0f, 0.0f};
#pragma unroll
  for (int i = 0; i < count; i += 2) {
    const int r = i / 2 % 2;
    float low, high;
    ptx::unpack(pairs[i / 8][i / 2 % 4], low, high);
    sum[r] = fmaf(high, s_dot[i + 1], fmaf(low, s_dot[i], sum[r]));
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float weighted = fmaf(before[r], rows.shift[r], scale * row_sum(sum[r]));
    // Without any weight there is no mean; otherwise the weight is at least 1, that of the maximum.
    const float mean = rows.weight[r] > 0.0f ? weighted * ptx::reciprocal(rows.weight[r]) : rows.shift[r];
    moved[r] = rows.shift[r] - mean;
    rows.shift[r] = mean;
  }
}

// Computes P (scale S_dot - shift), rounded for its products, and adds the tile to M.
template <int count>
__device__ __forceinline__ void centre(const std::uint32_t (&pairs)[count / 8][4],
                                       const float (&s_dot)[count], std::uint32_t (&pairs_dot)[count / 8][4],
                                       float scale, Rows& rows, const float (&decay)[2],
                                       const float (&before)[2], const float (&moved)[2]) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    // `before` belongs to the full row, of which this thread has a quarter.
    rows.dot[r] = fmaf(rows.dot[r], decay[r], 0.25f * before[r] * moved[r]);
  }
#pragma unroll
  for (int i = 0; i < count; i += 2) {
    const int r = i / 2 % 2;
    float low, high;
    ptx::unpack(pairs[i / 8][i / 2 % 4], low, high);
    const std::uint32_t pair = ptx::pack(low * fmaf(s_dot[i], scale, -rows.shift[r]),
                                         high * fmaf(s_dot[i + 1], scale, -rows.shift[r]));
    pairs_dot[i / 8][i / 2 % 4] = pair;
    ptx::unpack(pair, low, high);
    rows.dot[r] += low + high;
  }
}

// Runs consumer warpgroup `side`.
template <int width, Tangents tangents>
__device__ __forceinline__ void consume(const Parameters& p, std::uint32_t base, int side) {
  using S = Tiles<width, tangents>;
  constexpr bool dual = tangents != Tangents::none;
  constexpr int turns = 2 * warpgroup;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
  const int tiles = (p.keys + S::keys - 1) / S::keys;
  const float log2_e = 1.4426950408889634f;
  const std::uint32_t query = base + side * S::query_slot, query_dot = query + S::query_tile;
  int n = 0;  // the first tile of the item
  std::uint32_t parity = 0;

  // Barrier 1 + side gives this warpgroup its turn to multiply; side 0 begins.
  if (side == 1) ptx::barrier_arrive(1, turns);
  for (int i = blockIdx.x; i < p.items; i += gridDim.x, parity ^= 1) {
    const Item item = item_of(i, p.all_heads, p.units);
    const int sides = item.together ? 1 : 2, own = item.together ? 0 : side, others = 1 - side;
    const int head = side == 0 ? item.head[0] : item.head[1], unit = side == 0 ? item.unit[0] : item.unit[1];
    const bool last_item = i + static_cast<int>(gridDim.x) >= p.items;

    float out[width / 2], out_dot[dual ? width / 2 : 1];
    float s[S::keys / 2], s_dot[dual ? S::keys / 2 : 1];
    Rows rows;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      rows.highest[r] = -INFINITY;
      rows.total[r] = rows.weight[r] = rows.shift[r] = rows.dot[r] = 0.0f;
    }
#pragma unroll
    for (int c = 0; c < width / 2; ++c) {
      out[c] = 0.0f;
      if (dual) out_dot[c] = 0.0f;
    }

    const auto release = [&](int empty) {  // by each of the four warps when done
      if (lane == 0) ptx::mbarrier_arrive(base + empty);
    };
    // Waits for tile j of keys or values, and releases the tile of the other warpgroup.
    const auto take = [&](int j, int full, int empty) {
      const int tile = n + j * sides;
      ptx::mbarrier_wait(base + full + S::barrier_of(tile + own), S::parity_of(tile + own));
      if (item.together) return;
      ptx::mbarrier_wait(base + full + S::barrier_of(tile + others), S::parity_of(tile + others));
      release(empty + S::barrier_of(tile + others));
    };
    const auto slot_of = [&](int j) { return (n + j * sides + own) % S::stages * S::key_slot; };
    const auto barrier_of = [&](int j) { return S::barrier_of(n + j * sides + own); };

    const auto issue_s = [&](int j) {
      ptx::forget(s);
      ptx::wgmma_fence();
      add_rows<S, S::keys>(s, query, base + S::k + slot_of(j), false);
      ptx::wgmma_commit();
    };
    const auto issue_s_dot = [&](int j) {
      if constexpr (dual) {
        const std::uint32_t keys = base + S::k + slot_of(j);
        ptx::forget(s_dot);
        ptx::wgmma_fence();
        add_rows<S, S::keys>(s_dot, query_dot, keys, false);
        if constexpr (tangents == Tangents::all) {
          add_rows<S, S::keys>(s_dot, query, keys + S::key_tile, true);
        }
        ptx::wgmma_commit();
      }
    };

    const auto wait_for_sums = [&](auto pending) {
      if constexpr (dual) {
        ptx::wgmma_wait<decltype(pending)::value>(out, out_dot);
      } else {
        ptx::wgmma_wait<decltype(pending)::value>(out);
      }
    };

    ptx::mbarrier_wait(base + S::query_full + side * 8, parity);
    take(0, S::k_full, S::k_empty);
    float decay[2], before[2];
    std::uint32_t pairs[S::keys / 16][4], pairs_dot[dual ? S::keys / 16 : 1][4];
    // Computes the factors of the values from S and S_dot of tile `j`, which are in flight.
    const auto find_weights = [&](int j, auto is_first) {
      constexpr bool first = decltype(is_first)::value;  // O and A are zero
      ptx::wgmma_wait<dual ? 1 : 0>(s);
      softmax(s, pairs, p.scale * log2_e, p.keys - j * S::keys, rows, decay, before);
      if constexpr (!first) {
#pragma unroll
        for (int c = 0; c < width / 2; ++c) {
          out[c] *= decay[c / 2 % 2];
          if (dual) out_dot[c] *= decay[c / 2 % 2];
        }
      }
      if constexpr (dual) {
        float moved[2];
        ptx::wgmma_wait<0>(s_dot);
        // Where registers suffice (width <= 80), P stays in fp32 next to its pairs.
        if constexpr (width > 80) ptx::renew(pairs);
        find_shift(pairs, s_dot, p.scale, rows, before, moved);
        if constexpr (!first) {
#pragma unroll
          for (int c = 0; c < width / 2; ++c) out_dot[c] = fmaf(moved[c / 2 % 2], out[c], out_dot[c]);
        }
        if constexpr (width > 80) ptx::renew(pairs);
        centre(pairs, s_dot, pairs_dot, p.scale, rows, decay, before, moved);
      }
      release(S::k_empty + barrier_of(j));
    };
    const auto issue_sums = [&](int j) {
      const std::uint32_t values = base + S::v + slot_of(j);
      ptx::wgmma_fence();
      add_columns<S, width>(out, pairs, values);
      if constexpr (tangents == Tangents::all) add_columns<S, width>(out_dot, pairs, values + S::key_tile);
      if constexpr (dual) add_columns<S, width>(out_dot, pairs_dot, values);
      ptx::wgmma_commit();
    };

    ptx::barrier_sync(1 + side, turns);
    issue_s(0);
    issue_s_dot(0);
    ptx::barrier_arrive(2 - side, turns);
    find_weights(0, std::true_type());
    for (int j = 1; j < tiles; ++j) {
      take(j - 1, S::v_full, S::v_empty);
      take(j, S::k_full, S::k_empty);
      ptx::barrier_sync(1 + side, turns);
      issue_sums(j - 1);
      // S keeps the tensor cores busy until the end of the sums is noticed, which frees the registers of P
      // and P (S_dot - shift) for S_dot.
      issue_s(j);
      wait_for_sums(std::integral_constant<int, 1>());
      issue_s_dot(j);
      ptx::barrier_arrive(2 - side, turns);
      release(S::v_empty + barrier_of(j - 1));
      find_weights(j, std::false_type());
    }
    release(S::query_empty + side * 8);
    take(tiles - 1, S::v_full, S::v_empty);
    ptx::barrier_sync(1 + side, turns);
    issue_sums(tiles - 1);
    if (side == 0 || !last_item) ptx::barrier_arrive(2 - side, turns);
    wait_for_sums(std::integral_constant<int, 0>());
    release(S::v_empty + barrier_of(tiles - 1));
    n += tiles * sides;

    // W, O and A are zero if no key has weight.
    const index_t sample = head / p.heads, h = head % p.heads;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = unit * unit_rows + warp * 16 + lane / 4 + 8 * r;
      const float total = row_sum(rows.total[r]), dot = dual ? row_sum(rows.dot[r]) : 0.0f;
      const float inverse = rows.weight[r] == 0.0f ? 0.0f : ptx::reciprocal(rows.weight[r]);
      const bool inside = row < p.queries;
      const auto row_of = [&](void* data, const index_t(&stride)[3]) {
        return static_cast<std::uint16_t*>(data) + sample * stride[0] + h * stride[1] + row * stride[2];
      };
      const auto pair = [&](int c) {
        return ptx::pack(out[4 * c + 2 * r] * inverse, out[4 * c + 2 * r + 1] * inverse);
      };
      store_row<width>(row_of(p.out, p.out_stride), p.value_width, inside, pair);
      if constexpr (dual) {
        const float mean = dot * inverse;
        const auto pair_dot = [&](int c) {
          const int low = 4 * c + 2 * r, high = low + 1;
          return ptx::pack(fmaf(-mean, out[low] * inverse, out_dot[low] * inverse),
                           fmaf(-mean, out[high] * inverse, out_dot[high] * inverse));
        };
        store_row<width>(row_of(p.out_dot, p.out_dot_stride), p.value_width, inside, pair_dot);
      }
      if (inside && lane % 4 == 0) {
        p.lse[static_cast<index_t>(head) * p.queries + row] = rows.highest[r] + log2f(total);
      }
    }
  }
}

template <int width, Tangents tangents>
__global__ void __launch_bounds__(threads, 1) attention_kernel(const __grid_constant__ Parameters p) {
  using S = Tiles<width, tangents>;
  const std::uint32_t base = (ptx::shared_memory() + 1023) / 1024 * 1024;
  const int group = ptx::uniform(threadIdx.x / warpgroup);
  if (threadIdx.x == 0) {
    for (const auto* map : {&p.q, &p.k, &p.v, &p.q_dot, &p.k_dot, &p.v_dot}) ptx::prefetch(*map);
    for (int side = 0; side < 2; ++side) {
      ptx::mbarrier_init(base + S::query_full + side * 8, 1);
      ptx::mbarrier_init(base + S::query_empty + side * 8, 4);
    }
    for (int stage = 0; stage < S::stages; ++stage) {
      ptx::mbarrier_init(base + S::k_full + stage * 8, 1);
      ptx::mbarrier_init(base + S::v_full + stage * 8, 1);
      ptx::mbarrier_init(base + S::k_empty + stage * 8, 8);  // the warps of both warpgroups
      ptx::mbarrier_init(base + S::v_empty + stage * 8, 8);
    }
    ptx::mbarrier_init_fence();
  }
  __syncthreads();
  if (group == 0) {
    ptx::fewer_registers<producer_registers>();
    if (threadIdx.x == 0) produce<width, tangents>(p, base);
  } else {
    ptx::more_registers<consumer_registers>();
    consume<width, tangents>(p, base, group - 1);
  }
}

}  // namespace imf::cuda::sm90

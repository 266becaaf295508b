// Small matrix products on packed operands, for attention: C[m, n] = A[m, k] B[k, n], or added to C, in fp32.
//
// The inner dimension counts units of 32 bits: a float, or a pair of bf16 on processors with bf16 dot
// products. A's units are broadcast one by one, so A may have any strides (a transpose costs nothing); for
// AMX, which multiplies tiles of pairs, one of its strides is 1. B is packed in zero-padded panels of
// `panel_width` columns, each a contiguous [k, panel_width] block of units (the last one only as many full
// vectors as it needs). C's rows have room for n rounded up to full vectors.
//
// About `terms` units, at most half as many again, are added sequentially; such sums are added to C, or
// pairwise if the terms are few. Rounding errors thus grow with the square roots of two short lengths.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/vec.h"

namespace imf::IMF_ISA {
namespace {

// Rows and vectors of C held in registers: 24 accumulators of 32 with AVX-512 and NEON, 12 of 16 with AVX2.
constexpr bool has_32_registers = IMF_ISA_LEVEL >= 3 || (IMF_ISA_LEVEL == 2 && Vec::width == 4);
constexpr int block_rows = IMF_ISA_LEVEL == 1 ? 4 : 6;
constexpr int block_vecs = has_32_registers ? 4 : 2;
constexpr int panel_width = block_vecs * Vec::width;
constexpr index_t usual_terms = 32;

inline index_t round_up(index_t n, index_t multiple) { return (n + multiple - 1) / multiple * multiple; }
// Returns the units of [k, n] packed in panels, k in units.
inline index_t packed_size(index_t k, index_t n) { return k * round_up(n, Vec::width); }

#if IMF_ISA_LEVEL >= 4
struct Bf16Pair {
  bfloat16 even, odd;
};
#endif

// The unit in which elements of type T are multiplied.
template <typename T>
struct UnitOf {
  using type = float;
};
#if IMF_ISA_LEVEL >= 4
template <>
struct UnitOf<bfloat16> {
  using type = Bf16Pair;
};
#endif
template <typename Unit>
constexpr index_t elements_per_unit = 1;
#if IMF_ISA_LEVEL >= 4
template <>
constexpr index_t elements_per_unit<Bf16Pair> = 2;
#endif
// Returns the units of an inner dimension of n elements; a missing half of a pair is zero.
template <typename Unit>
inline index_t units(index_t n) {
  return (n + elements_per_unit<Unit> - 1) / elements_per_unit<Unit>;
}

template <typename Unit>
inline Vec load_units(const Unit* p) {
  Vec a;
  std::memcpy(&a.v, p, sizeof a.v);
  return a;
}
template <typename Unit>
inline void store_units(Unit* p, Vec a) {
  std::memcpy(p, &a.v, sizeof a.v);
}
inline Vec broadcast(const float* p) { return Vec(*p); }
template <typename Unit>
inline Vec multiply_add(Vec a, Vec b, Vec c) {
  return fma(a, b, c);
}
#if IMF_ISA_LEVEL >= 4
inline Vec broadcast(const Bf16Pair* p) {
  std::int32_t bits;
  std::memcpy(&bits, p, sizeof bits);
  return _mm512_castsi512_ps(_mm512_set1_epi32(bits));
}
template <>
inline Vec multiply_add<Bf16Pair>(Vec a, Vec b, Vec c) {
  return _mm512_dpbf16_ps(c.v, (__m512bh)a.v, (__m512bh)b.v);
}
// Rounds both and interleaves them lane by lane.
inline Vec pair(Vec even, Vec odd) {
  const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh(odd.v, even.v);  // those of `even`, then of `odd`
  alignas(64) static constexpr std::uint16_t order[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                          21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                          11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return _mm512_castsi512_ps(_mm512_permutexvar_epi16(_mm512_load_si512(order), halves));
}
// Rounds as the products do, denormals to zero. For operands only; `store` rounds results.
inline Vec round_to_bfloat16(Vec a) { return widen(narrow(a)); }
#endif

template <typename Unit>
struct Strided {
  const Unit* data;
  index_t row_stride, column_stride;
};

template <int rows, int vecs, typename Unit>
inline void product_block(const Unit* a, index_t a_row, index_t a_column, const Unit* b, index_t b_row,
                          float* c, index_t c_row, index_t k, bool add, index_t terms) {
  const index_t sums = 2 * k > 3 * terms ? (k + terms - 1) / terms : 1;
  for (index_t s = 0; s < sums; ++s) {
    const index_t length = (k + s) / sums;  // the same for all, or one more
    Vec sum[rows][vecs];
    for (int i = 0; i < rows; ++i) {
      for (int j = 0; j < vecs; ++j) sum[i][j] = Vec(0.0f);
    }
    for (index_t p = 0; p < length; ++p) {
      Vec bp[vecs];
      for (int j = 0; j < vecs; ++j) bp[j] = load_units(b + p * b_row + j * Vec::width);
      for (int i = 0; i < rows; ++i) {
        const Vec aip = broadcast(a + i * a_row + p * a_column);
        for (int j = 0; j < vecs; ++j) sum[i][j] = multiply_add<Unit>(aip, bp[j], sum[i][j]);
      }
    }
    a += length * a_column;
    b += length * b_row;
    for (int i = 0; i < rows; ++i) {
      for (int j = 0; j < vecs; ++j) {
        float* cij = c + i * c_row + j * Vec::width;
        store(cij, add || s > 0 ? load(cij) + sum[i][j] : sum[i][j]);
      }
    }
  }
}

// The same with sums of at most `terms` units added pairwise.
template <int rows, int vecs, typename Unit>
void product_block_in_pairs(const Unit* a, index_t a_row, index_t a_column, const Unit* b, index_t b_row,
                            float* c, index_t c_row, index_t k, bool add, index_t terms) {
  if (k <= terms) {
    product_block<rows, vecs>(a, a_row, a_column, b, b_row, c, c_row, k, add, k);
    return;
  }
  constexpr index_t width = vecs * Vec::width;
  float halves[2][rows * width];
  const index_t half = k / 2;
  product_block_in_pairs<rows, vecs>(a, a_row, a_column, b, b_row, halves[0], width, half, false, terms);
  product_block_in_pairs<rows, vecs>(a + half * a_column, a_row, a_column, b + half * b_row, b_row, halves[1],
                                     width, k - half, false, terms);
  for (int i = 0; i < rows; ++i) {
    for (index_t j = 0; j < width; j += Vec::width) {
      const Vec sum = load(halves[0] + i * width + j) + load(halves[1] + i * width + j);
      store(c + i * c_row + j, add ? load(c + i * c_row + j) + sum : sum);
    }
  }
}

// Processors with AMX multiply tiles: 16 rows of 16 units by 16 units of 16 columns, added to 16 rows of C.
// In a tile the first halves of pairs and the second ones are summed apart, from zero, and then added to C.
#if IMF_ISA_LEVEL >= 5
constexpr index_t tile = 16;

// Shapes this thread's tile registers, all alike, while it lives.
class Tiles {
 public:
  Tiles() {
    struct {
      std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
      std::uint16_t bytes[16] = {};
      std::uint8_t rows[16] = {};
    } shapes;
    std::fill_n(shapes.bytes, 8, std::uint16_t{4 * tile});
    std::fill_n(shapes.rows, 8, std::uint8_t{tile});
    asm volatile("ldtilecfg %0" ::"m"(shapes));
  }
  ~Tiles() { asm volatile("tilerelease"); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};

// Of tile register n and rows at `data` that lie `stride` elements of four bytes apart.
#define IMF_LOAD_TILE(n, data, stride) \
  asm volatile("tileloadd (%0,%1,1), %%tmm" #n::"r"(data), "r"(4 * (stride)) : "memory")
#define IMF_STORE_TILE(n, data, stride) \
  asm volatile("tilestored %%tmm" #n ", (%0,%1,1)" ::"r"(data), "r"(4 * (stride)) : "memory")
#define IMF_ZERO_TILE(n) asm volatile("tilezero %%tmm" #n::)
#define IMF_ADD_TILE_PRODUCT(c, a, b) asm volatile("tdpbf16ps %%tmm" #b ", %%tmm" #a ", %%tmm" #c::)

// Copies `rows` rows and `columns` units of A into a tile, with zeros beyond the units.
inline void copy_tile(Strided<Bf16Pair> a, index_t rows, index_t columns, Bf16Pair* out) {
  Vec block[tile];
  if (a.column_stride == 1) {
    for (index_t i = 0; i < tile; ++i) {
      const auto* row = reinterpret_cast<const float*>(a.data + i * a.row_stride);
      block[i] = i < rows ? load_lanes(row, static_cast<int>(columns)) : Vec(0.0f);
    }
  } else {
    for (index_t p = 0; p < tile; ++p) {
      block[p] = p < columns ? load_units(a.data + p * a.column_stride) : Vec(0.0f);
    }
    transpose(block);
  }
  for (index_t i = 0; i < tile; ++i) store_units(out + i * tile, block[i]);
}

// C [m, vecs tiles] = A B, or added to C, of a panel of B. A's columns have room for full vectors.
template <int vecs>
void product_tiles(index_t m, Strided<Bf16Pair> a, const Bf16Pair* b, index_t b_row, float* c, index_t c_row,
                   index_t k, bool add) {
  constexpr index_t width = vecs * tile;
  alignas(64) Bf16Pair a_tile[tile * tile], b_rest[tile * width];  // padded with zeros
  alignas(64) float c_rows[tile * width];
  const index_t rest = k - k % tile;
  for (index_t p = 0; rest < k && p < tile; ++p) {
    for (index_t j = 0; j < width; j += tile) {
      store_units(b_rest + p * width + j, rest + p < k ? load_units(b + (rest + p) * b_row + j) : Vec(0.0f));
    }
  }
  for (; m > 0; m -= tile, a.data += tile * a.row_stride, c += tile * c_row) {
    const index_t rows = std::min(m, tile), sum_row = rows < tile ? width : c_row;
    float* sum = rows < tile ? c_rows : c;
    if (add) {
      for (index_t i = 0; rows < tile && i < rows; ++i) std::copy_n(c + i * c_row, width, c_rows + i * width);
      IMF_LOAD_TILE(0, sum, sum_row);
      if constexpr (vecs > 1) IMF_LOAD_TILE(1, sum + tile, sum_row);
      if constexpr (vecs > 2) IMF_LOAD_TILE(2, sum + 2 * tile, sum_row);
      if constexpr (vecs > 3) IMF_LOAD_TILE(3, sum + 3 * tile, sum_row);
    } else {
      IMF_ZERO_TILE(0);
      IMF_ZERO_TILE(1);
      IMF_ZERO_TILE(2);
      IMF_ZERO_TILE(3);
    }
    for (index_t p = 0; p < k; p += tile) {
      const Strided<Bf16Pair> at{a.data + p * a.column_stride, a.row_stride, a.column_stride};
      if (p < rest && rows == tile && a.column_stride == 1) {
        IMF_LOAD_TILE(4, at.data, at.row_stride);
      } else {
        copy_tile(at, rows, std::min(k - p, tile), a_tile);
        IMF_LOAD_TILE(4, a_tile, tile);
      }
      const Bf16Pair* bp = p < rest ? b + p * b_row : b_rest;
      const index_t bp_row = p < rest ? b_row : width;
      IMF_LOAD_TILE(5, bp, bp_row);
      IMF_ADD_TILE_PRODUCT(0, 4, 5);
      if constexpr (vecs > 1) {
        IMF_LOAD_TILE(6, bp + tile, bp_row);
        IMF_ADD_TILE_PRODUCT(1, 4, 6);
      }
      if constexpr (vecs > 2) {
        IMF_LOAD_TILE(5, bp + 2 * tile, bp_row);
        IMF_ADD_TILE_PRODUCT(2, 4, 5);
      }
      if constexpr (vecs > 3) {
        IMF_LOAD_TILE(6, bp + 3 * tile, bp_row);
        IMF_ADD_TILE_PRODUCT(3, 4, 6);
      }
    }
    IMF_STORE_TILE(0, sum, sum_row);
    if constexpr (vecs > 1) IMF_STORE_TILE(1, sum + tile, sum_row);
    if constexpr (vecs > 2) IMF_STORE_TILE(2, sum + 2 * tile, sum_row);
    if constexpr (vecs > 3) IMF_STORE_TILE(3, sum + 3 * tile, sum_row);
    for (index_t i = 0; rows < tile && i < rows; ++i) std::copy_n(c_rows + i * width, width, c + i * c_row);
  }
}
#else
struct Tiles {
  Tiles() {}
};
#endif

template <int vecs, typename Unit, int rows = block_rows>
inline void product_rows(index_t m, Strided<Unit> a, const Unit* b, index_t b_row, float* c, index_t c_row,
                         index_t k, bool add, index_t terms) {
#if IMF_ISA_LEVEL >= 5
  if constexpr (elements_per_unit<Unit> > 1) return product_tiles<vecs>(m, a, b, b_row, c, c_row, k, add);
#endif
  const auto block =
      terms < usual_terms ? product_block_in_pairs<rows, vecs, Unit> : product_block<rows, vecs, Unit>;
  for (; m >= rows; m -= rows) {
    block(a.data, a.row_stride, a.column_stride, b, b_row, c, c_row, k, add, terms);
    a.data += rows * a.row_stride;
    c += rows * c_row;
  }
  if constexpr (rows > 1) {
    if (m > 0) product_rows<vecs, Unit, rows - 1>(m, a, b, b_row, c, c_row, k, add, terms);
  }
}

// Skips `b_first` of `b_total` packed rows of B: a product over a part of the inner dimension. Counts units.
// `packed`: columns of B, if more than n.
template <typename Unit>
inline void product(index_t m, index_t n, index_t k, Strided<Unit> a, const Unit* b, index_t b_first,
                    index_t b_total, float* c, index_t c_row, bool add, index_t terms = usual_terms,
                    index_t packed = 0) {
  const auto panel_of = [](index_t columns) {
    return columns < panel_width ? round_up(columns, Vec::width) : panel_width;
  };
  for (index_t j = 0; j < n; j += panel_width) {
    const index_t width = panel_of(n - j), b_width = packed > n ? panel_of(packed - j) : width;
    const Unit* panel = b + j * b_total + b_first * b_width;
    constexpr decltype(&product_rows<1, Unit>) of_vecs[] = {product_rows<1, Unit>, product_rows<2, Unit>,
                                                            product_rows<3, Unit>, product_rows<4, Unit>};
    of_vecs[width / Vec::width - 1](m, a, panel, b_width, c + j, c_row, k, add, terms);
  }
}

// Loads a unit of each column from the first of `rows` rows: an element.
template <typename T>
inline Vec load_column_units(const T* row, index_t, index_t, int lanes, const float*) {
  return load_lanes(row, lanes);
}

// Loads elements p ... p + Vec::width - 1 of a row of k, zero beyond its end.
template <typename T>
inline Vec load_row_units(const T* row, index_t p, index_t k, const float*) {
  return k - p >= Vec::width ? load(row + p) : load(row + p, static_cast<int>(k - p));
}

#if IMF_ISA_LEVEL >= 4
// The same of a pair, from two rows, zero for a missing second one.
inline Vec load_column_units(const bfloat16* row, index_t stride, index_t rows, int lanes, const Bf16Pair*) {
  return pair(load_lanes(row, lanes), rows > 1 ? load_lanes(row + stride, lanes) : Vec(0.0f));
}
// Loads units p ... p + 15 of a row of k elements, zero beyond its end.
inline Vec load_row_units(const bfloat16* row, index_t p, index_t k, const Bf16Pair*) {
  const index_t left = k - 2 * p;
  const __mmask32 mask = left >= 32 ? ~__mmask32{0} : (__mmask32{1} << left) - 1;
  return _mm512_castsi512_ps(_mm512_maskz_loadu_epi16(mask, row + 2 * p));
}
#endif

// Packs rows [k, n], row i at x + i stride, into panels.
template <typename T, typename Unit>
inline void pack(const T* x, index_t stride, index_t k, index_t n, Unit* packed) {
  for (index_t j = 0; j < n; j += panel_width) {
    const index_t columns = n - j < panel_width ? n - j : panel_width;
    const index_t width = round_up(columns, Vec::width);
    for (index_t p = 0; p < k; p += elements_per_unit<Unit>, packed += width) {
      for_each_vec(columns, [&](index_t i, int lanes) {
        const T* row = x + p * stride + j + i;
        store_units(packed + i, load_column_units(row, stride, k - p, lanes, packed));
      });
    }
  }
}

// Packs the transpose of rows [n, k], row i at x + i stride, into panels of [k, n].
template <typename T, typename Unit>
inline void pack_transposed(const T* x, index_t stride, index_t n, index_t k, Unit* packed) {
  const index_t inner = units<Unit>(k);
  for (index_t j = 0; j < n; j += panel_width) {
    const index_t columns = n - j < panel_width ? n - j : panel_width;
    const index_t width = round_up(columns, Vec::width);
    for (index_t i = 0; i < width; i += Vec::width) {
      const T* rows = x + (j + i) * stride;
      for_each_vec(inner, [&](index_t p, int lanes) {
        Vec block[Vec::width];
        for (int r = 0; r < Vec::width; ++r) {
          block[r] = i + r < columns ? load_row_units(rows + r * stride, p, k, packed) : Vec(0.0f);
        }
        transpose(block);
        for (int r = 0; r < lanes; ++r) store_units(packed + (p + r) * width + i, block[r]);
      });
    }
    packed += inner * width;
  }
}

// Copies rows [m, n] into contiguous rows of units.
template <typename T, typename Unit>
inline void copy_to_units(const T* x, index_t stride, index_t m, index_t n, Unit* out) {
  const index_t width = units<Unit>(n);
  for (index_t i = 0; i < m; ++i) {
    for_each_vec(width, [&](index_t p, int lanes) {
      const Vec x_p = load_row_units(x + i * stride, p, n, out);
      store_lanes(reinterpret_cast<float*>(out) + i * width + p, x_p, lanes);
    });
  }
}

// Copies rows [m, n] times `scale` to another type and row stride.
template <typename From, typename To>
inline void copy_rows(const From* x, index_t stride, index_t m, index_t n, float scale, To* out,
                      index_t out_stride) {
  for (index_t i = 0; i < m; ++i) {
    for_each_vec(n, [&](index_t j, int lanes) {
      store_lanes(out + i * out_stride + j, load_lanes(x + i * stride + j, lanes) * Vec(scale), lanes);
    });
  }
}

}  // namespace
}  // namespace imf::IMF_ISA

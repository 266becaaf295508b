// Small fp32 matrix products on packed operands: what attention is made of.
//
// C[m, n] = A[m, k] B[k, n], or added to C. A's elements are broadcast one by one, so A may have any
// strides (a transpose costs nothing). B lies in panels of `panel_width` columns, each panel a
// contiguous [k, panel_width] block (the last one as many whole vectors as it needs), zero-padded.
// C's rows have room for n rounded up to whole vectors.
#pragma once

#include "cpu/vec.h"

namespace imf {
namespace IMF_ISA {
namespace {

// Rows and vectors of C held in registers: 24 accumulators of 32 with AVX-512, 12 of 16 with AVX2.
constexpr int block_rows = Vec::width == 4 ? 4 : 6;
constexpr int block_vecs = Vec::width == 16 ? 4 : 2;
constexpr int panel_width = block_vecs * Vec::width;

inline index_t round_up(index_t n, index_t multiple) { return (n + multiple - 1) / multiple * multiple; }
// Floats that [k, n] takes in panels.
inline index_t packed_size(index_t k, index_t n) { return k * round_up(n, Vec::width); }

struct Strided {
  const float* data;
  index_t row_stride, column_stride;
};

template <int rows, int vecs>
inline void product_block(const float* a, index_t a_row, index_t a_column, const float* b, index_t b_row,
                          float* c, index_t c_row, index_t k, bool add) {
  Vec sum[rows][vecs];
  for (int i = 0; i < rows; ++i) {
    for (int j = 0; j < vecs; ++j) {
      sum[i][j] = add ? load(c + i * c_row + j * Vec::width) : Vec(0.0f);
    }
  }
  for (index_t p = 0; p < k; ++p) {
    Vec bp[vecs];
    for (int j = 0; j < vecs; ++j) bp[j] = load(b + p * b_row + j * Vec::width);
    for (int i = 0; i < rows; ++i) {
      const Vec aip(a[i * a_row + p * a_column]);
      for (int j = 0; j < vecs; ++j) sum[i][j] = fma(aip, bp[j], sum[i][j]);
    }
  }
  for (int i = 0; i < rows; ++i) {
    for (int j = 0; j < vecs; ++j) store(c + i * c_row + j * Vec::width, sum[i][j]);
  }
}

template <int vecs, int rows = block_rows>
inline void product_rows(index_t m, Strided a, const float* b, index_t b_row, float* c, index_t c_row,
                         index_t k, bool add) {
  for (; m >= rows; m -= rows) {
    product_block<rows, vecs>(a.data, a.row_stride, a.column_stride, b, b_row, c, c_row, k, add);
    a.data += rows * a.row_stride;
    c += rows * c_row;
  }
  if constexpr (rows > 1) {
    if (m > 0) product_rows<vecs, rows - 1>(m, a, b, b_row, c, c_row, k, add);
  }
}

// `b_first` of `b_total` packed rows of B are skipped: a product over a part of the inner dimension.
inline void product(index_t m, index_t n, index_t k, Strided a, const float* b, index_t b_first,
                    index_t b_total, float* c, index_t c_row, bool add) {
  for (index_t j = 0; j < n; j += panel_width) {
    const index_t width = n - j < panel_width ? round_up(n - j, Vec::width) : panel_width;
    const float* panel = b + j * b_total + b_first * width;
    switch (width / Vec::width) {
      case 1:
        product_rows<1>(m, a, panel, width, c + j, c_row, k, add);
        break;
      case 2:
        product_rows<2>(m, a, panel, width, c + j, c_row, k, add);
        break;
      case 3:
        product_rows<3>(m, a, panel, width, c + j, c_row, k, add);
        break;
      default:
        product_rows<4>(m, a, panel, width, c + j, c_row, k, add);
        break;
    }
  }
}

// Packs rows [k, n], row i at x + i stride, into panels.
template <typename T>
inline void pack(const T* x, index_t stride, index_t k, index_t n, float* packed) {
  for (index_t j = 0; j < n; j += panel_width) {
    const index_t columns = n - j < panel_width ? n - j : panel_width;
    const index_t width = round_up(columns, Vec::width);
    for (index_t p = 0; p < k; ++p, packed += width) {
      for_each_vec(columns, [&](index_t i, int lanes) {
        store(packed + i, load_lanes(x + p * stride + j + i, lanes));
      });
    }
  }
}

// Packs the transpose of rows [n, k], row i at x + i stride, into panels of [k, n].
template <typename T>
inline void pack_transposed(const T* x, index_t stride, index_t n, index_t k, float* packed) {
  for (index_t j = 0; j < n; j += panel_width) {
    const index_t columns = n - j < panel_width ? n - j : panel_width;
    const index_t width = round_up(columns, Vec::width);
    for (index_t i = 0; i < width; i += Vec::width) {
      const T* rows = x + (j + i) * stride;
      for_each_vec(k, [&](index_t p, int lanes) {
        Vec block[Vec::width];
        for (int r = 0; r < Vec::width; ++r) {
          block[r] = i + r < columns ? load_lanes(rows + r * stride + p, lanes) : Vec(0.0f);
        }
        transpose(block);
        for (int r = 0; r < lanes; ++r) store(packed + (p + r) * width + i, block[r]);
      });
    }
    packed += k * width;
  }
}

// Copies rows [m, n] times `scale`, from one type and distance between rows to others.
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
}  // namespace IMF_ISA
}  // namespace imf

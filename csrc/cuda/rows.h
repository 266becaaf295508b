// Reductions along and over rows: a team of threads (x) holds a row in registers, each thread the same
// columns of every row; a block has several teams (y) where rows are short.
#pragma once

#include <cstring>

#include "cuda/vector.h"

namespace imf::cuda {

constexpr int per_thread = 16;     // elements of a row in a thread's registers
constexpr int most_threads = 512;  // of a team
constexpr int widest = per_thread * most_threads;
constexpr int block_threads = 256;  // of a block, unless one team has more
constexpr int warp = 32;

// Returns the block size for rows of `width` elements, at most `widest`: a short row takes a part of a warp,
// a power of two of threads, so that shuffles stay within the team.
inline dim3 threads_for(index_t width, int n) {
  const index_t most = width < widest ? width : widest;
  const index_t packs = divide_up(most, n);
  unsigned team = 1;
  if (packs <= warp) {
    while (team < packs) team *= 2;
  } else {
    team = static_cast<unsigned>(divide_up(divide_up(packs, per_thread / n), warp) * warp);
  }
  return dim3(team, team < block_threads ? block_threads / team : 1);
}

// One thread's elements of a row: packs of n, a team's width apart.
template <int n, int packs = per_thread / n>
struct Row {
  static constexpr int count = n * packs;
  float values[count];
  __device__ __forceinline__ float& operator[](int k) { return values[k]; }
  __device__ __forceinline__ float operator[](int k) const { return values[k]; }
};

// Returns the column of a thread's element k.
template <int n>
IMF_DEVICE unsigned column(int k) {
  return (static_cast<unsigned>(k / n) * blockDim.x + threadIdx.x) * n + k % n;
}

// Loads this thread's elements of a row of `width` at p; zeros beyond it, or if p is null.
template <int n, int packs = per_thread / n, typename T>
IMF_DEVICE Row<n, packs> load_row(const T* p, index_t width, bool aligned) {
  Row<n, packs> row;
#pragma unroll
  for (int v = 0; v < packs; ++v) {
    const unsigned j = column<n>(v * n);
    load<n>(row.values + v * n, p ? p + j : p, width - j, aligned);
  }
  return row;
}

template <int n, int packs, typename T>
IMF_DEVICE void store_row(T* p, const Row<n, packs>& row, index_t width, bool aligned) {
#pragma unroll
  for (int v = 0; v < packs; ++v) {
    const unsigned j = column<n>(v * n);
    store<n>(p + j, row.values + v * n, width - j, aligned);
  }
}

// Sums x, a float or a struct of floats, over a team, for each of its threads. All threads of the block must
// call it equally often.
template <typename T>
__device__ T team_sum(T x) {
  constexpr int count = sizeof(T) / sizeof(float);
  __shared__ float parts[most_threads / warp * count];
  float sums[count];
  std::memcpy(sums, &x, sizeof(T));
#pragma unroll
  for (int c = 0; c < count; ++c) {
    for (unsigned offset = (blockDim.x < warp ? blockDim.x : warp) / 2; offset > 0; offset /= 2) {
      sums[c] += __shfl_xor_sync(0xffffffffu, sums[c], offset);
    }
  }
  if (blockDim.x > warp) {
    const unsigned warps = blockDim.x / warp, first = threadIdx.y * warps;
    __syncthreads();  // earlier sums have been read
#pragma unroll
    for (int c = 0; c < count; ++c) {
      if (threadIdx.x % warp == 0) parts[(first + threadIdx.x / warp) * count + c] = sums[c];
    }
    __syncthreads();
#pragma unroll
    for (int c = 0; c < count; ++c) {
      sums[c] = 0.0f;
      for (unsigned w = 0; w < warps; ++w) sums[c] += parts[(first + w) * count + c];
    }
  }
  std::memcpy(&x, sums, sizeof(T));
  return x;
}

inline __host__ __device__ index_t row_count(const Rows& x) { return x.rows; }
inline __host__ __device__ index_t row_count(const Heads& x) { return x.batch * x.heads * x.length; }

// The row of a team in a kernel that takes each row once; beyond the last row its width is zero.
struct TeamRow {
  index_t row, tangent;  // `tangent`: index among the rows with a tangent; negative for others
  index_t width, tangent_width;

  template <typename View, typename Tangent>
  __device__ __forceinline__ TeamRow(const View& y, const Tangent& y_dot)
      : row(blockIdx.x * static_cast<index_t>(blockDim.y) + threadIdx.y),
        tangent(row - (row_count(y) - row_count(y_dot))),
        width(row < row_count(y) ? y.width : 0),
        tangent_width(tangent >= 0 ? width : 0) {}
  // Returns whether this thread writes the row's scalars.
  __device__ __forceinline__ bool writes() const { return width > 0 && threadIdx.x == 0; }
};

// Launches kernel(arguments...), which takes each row of `width` elements once.
template <typename X, typename... Parameters, typename... Arguments>
void launch_rows(const char* what, void (*kernel)(Parameters...), index_t rows, index_t width, Place place,
                 Arguments... arguments) {
  const dim3 threads = threads_for(width, lanes<X>);
  launch(what, kernel, divide_up(rows, threads.y), 1, threads, place, arguments...);
}

// Sums over rows: the `length` rows of a group are split into `shares` shares, one block each, which write
// their sums to partial[groups, shares, sums, width]; these are added up to total[groups, sums, width]. The
// order of summation is fixed, unlike that of atomic additions.
struct Shares {
  index_t groups, length, shares;

  // `rows`: of all groups; `sums`: rows of sums per group.
  Shares(index_t rows, const Floats& partial, const Floats& total, index_t sums = 1)
      : groups(total.rows / sums),
        length(length_of(rows, groups)),
        shares(total.rows > 0 ? partial.rows / total.rows : 0) {
    if (partial.rows != shares * total.rows || partial.width != total.width || (rows > 0 && shares == 0)) {
      throw std::invalid_argument("partial must be [groups, shares, sums, width]");
    }
  }
  index_t blocks() const { return groups * shares; }
  __device__ index_t rows() const { return (length + shares - 1) / shares; }
};

// Calls body(row, inside) for the rows of a block's share, teams taking turns, equally often on every thread.
template <typename Body>
IMF_DEVICE void for_each_row(const Shares& s, index_t group, Body body) {
  const index_t first = (blockIdx.x - group * s.shares) * s.rows();
  const index_t end = first + s.rows() < s.length ? first + s.rows() : s.length;
  for (index_t start = first; start < end; start += blockDim.y) {
    const index_t position = start + threadIdx.y;
    body(group * s.length + position, position < end);
  }
}

// Sums each column over a block's teams and writes it to out[width].
template <int n>
__device__ void write_sums(float* out, const Row<n>& row, index_t width) {
  __shared__ float total[block_threads / 2 * per_thread];  // only blocks of several teams need it
  if (blockDim.y == 1) {
    store_row<n>(out, row, width, false);
    return;
  }
  for (unsigned team = 0; team < blockDim.y; ++team) {
    if (threadIdx.y == team) {
#pragma unroll
      for (int k = 0; k < row.count; ++k) {
        const unsigned j = column<n>(k);
        if (j < width) total[j] = team == 0 ? row[k] : total[j] + row[k];
      }
    }
    __syncthreads();
  }
  for (unsigned j = threadIdx.y * blockDim.x + threadIdx.x; j < width; j += blockDim.x * blockDim.y) {
    out[j] = total[j];
  }
  __syncthreads();  // before the next sums
}

// Adds up each group's shares; zeros if there are none.
void add_up(const Shares& shares, const Floats& partial, const Floats& total, Place place);

}  // namespace imf::cuda

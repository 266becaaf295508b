#include "cuda/rows.h"

namespace imf::cuda {
namespace {

constexpr unsigned lines = 16;  // of a block; each adds up every sixteenth share

__global__ void __launch_bounds__(warp* lines)
    add_up_shares(const float* partial, float* total, index_t shares, index_t columns) {
  __shared__ float parts[lines][warp];
  const index_t group = blockIdx.x;
  const index_t j = static_cast<index_t>(blockIdx.y) * warp + threadIdx.x;
  float sum = 0.0f;
  if (j < columns) {
    for (index_t share = threadIdx.y; share < shares; share += lines) {
      sum += partial[(group * shares + share) * columns + j];
    }
  }
  parts[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y > 0 || j >= columns) return;
  for (unsigned line = 1; line < lines; ++line) sum += parts[line][threadIdx.x];
  total[group * columns + j] = sum;
}

}  // namespace

void add_up(const Shares& shares, const Floats& partial, const Floats& total, Place place) {
  if (shares.groups == 0) return;
  const index_t columns = total.rows / shares.groups * total.width;
  launch("add_up", add_up_shares, shares.groups, static_cast<unsigned>(divide_up(columns, warp)),
         dim3(warp, lines), place, partial.data, total.data, shares.shares, columns);
}

}  // namespace imf::cuda

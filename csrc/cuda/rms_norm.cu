// RMSNorm with its tangent, and its primal backward. The formulas are in imf_kernels/ops/rms_norm.py.
// A warp takes a row: 32 lanes walk it twice, the second time from cache. Compiled for sm_80, sm_90 and
// sm_100; has not run on hardware yet, so dispatch takes it on request only.
#include <cuda_bf16.h>

#include "common/dual.h"
#include "cuda/rms_norm.h"
#include "cuda/runtime.h"

namespace imf::cuda {
namespace {

constexpr int warp = 32;
constexpr int rows_per_block = 4;

__device__ __forceinline__ float load(const float* p) { return *p; }
__device__ __forceinline__ float load(const __nv_bfloat16* p) { return __bfloat162float(*p); }
__device__ __forceinline__ void store(float* p, float x) { *p = x; }
__device__ __forceinline__ void store(__nv_bfloat16* p, float x) { *p = __float2bfloat16_rn(x); }

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int offset = warp / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
  return x;
}

template <typename X, typename Y>
__global__ void forward(const RmsNormForward a) {
  const index_t row = blockIdx.x * static_cast<index_t>(rows_per_block) + threadIdx.y;
  if (row >= a.rows) return;
  const index_t tangent_row = row - (a.rows - a.tangent_rows);
  const bool dual = tangent_row >= 0;
  const X* x = static_cast<const X*>(a.x) + row * a.x_stride;
  const X* x_dot = static_cast<const X*>(a.x_dot) + (dual ? tangent_row * a.x_dot_stride : 0);
  Y* y = static_cast<Y*>(a.y) + row * a.width;
  Y* y_dot = static_cast<Y*>(a.y_dot) + (dual ? tangent_row * a.width : 0);

  Dual<float> squares{0.0f, 0.0f};
  for (index_t j = threadIdx.x; j < a.width; j += warp) {
    const Dual<float> xj{load(x + j), dual ? load(x_dot + j) : 0.0f};
    squares = squares + xj * xj;
  }
  squares = {warp_sum(squares.primal), warp_sum(squares.tangent)};
  const Dual<float> rstd = rsqrt(squares * (1.0f / static_cast<float>(a.width)) + a.eps);
  if (threadIdx.x == 0) a.rstd[row] = rstd.primal;

  for (index_t j = threadIdx.x; j < a.width; j += warp) {
    const Dual<float> xj{load(x + j), dual ? load(x_dot + j) : 0.0f};
    const Dual<float> yj = xj * rstd * a.weight[j];
    store(y + j, yj.primal);
    if (dual) store(y_dot + j, yj.tangent);
  }
}

// With g = dy w and n = x rstd: dx = rstd (g - n mean(g n)), dw = sum over rows of dy n. A block walks
// over the rows with a stride of the grid, its lanes keeping to the same columns, and adds its share of
// dw to memory once.
template <typename X, typename Y>
__global__ void backward(const RmsNormBackward a) {
  extern __shared__ float dweight[];  // [width]
  for (index_t j = threadIdx.y * warp + threadIdx.x; j < a.width; j += warp * rows_per_block)
    dweight[j] = 0.0f;
  __syncthreads();
  for (index_t row = blockIdx.x * static_cast<index_t>(rows_per_block) + threadIdx.y; row < a.rows;
       row += gridDim.x * static_cast<index_t>(rows_per_block)) {
    const X* x = static_cast<const X*>(a.x) + row * a.x_stride;
    const Y* dy = static_cast<const Y*>(a.dy) + row * a.dy_stride;
    X* dx = static_cast<X*>(a.dx) + row * a.width;
    const float rstd = a.rstd[row];
    float dot = 0.0f;
    for (index_t j = threadIdx.x; j < a.width; j += warp) {
      const float dyn = load(dy + j) * (load(x + j) * rstd);
      atomicAdd(dweight + j, dyn);
      dot += dyn * a.weight[j];
    }
    const float mean = warp_sum(dot) / static_cast<float>(a.width);
    for (index_t j = threadIdx.x; j < a.width; j += warp) {
      const float g = load(dy + j) * a.weight[j];
      store(dx + j, rstd * (g - load(x + j) * rstd * mean));
    }
  }
  __syncthreads();
  for (index_t j = threadIdx.y * warp + threadIdx.x; j < a.width; j += warp * rows_per_block) {
    atomicAdd(a.dweight + j, dweight[j]);
  }
}

template <typename Body>
void with_types(DType stream, DType operand, Body body) {
  if (stream == DType::bfloat16) {
    body(__nv_bfloat16{}, __nv_bfloat16{});
  } else if (operand == DType::bfloat16) {
    body(float{}, __nv_bfloat16{});
  } else {
    body(float{}, float{});
  }
}

}  // namespace

std::string unavailable() {
  int driver = 0, devices = 0;
  cudaError_t status = cudaDriverGetVersion(&driver);
  if (status == cudaSuccess && driver == 0) return "no CUDA driver is installed";
  if (status == cudaSuccess && driver < CUDART_VERSION) {
    return "the driver supports CUDA " + std::to_string(driver / 1000) + "." +
           std::to_string(driver % 1000 / 10) + ", the kernels were built with " +
           std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10);
  }
  if (status == cudaSuccess) status = cudaGetDeviceCount(&devices);
  if (status != cudaSuccess) return cudaGetErrorString(status);
  return devices > 0 ? "" : "there is no CUDA device";
}

void rms_norm_forward(const RmsNormForward& a) {
  if (a.rows == 0) return;
  const DeviceGuard guard(a.device);
  const dim3 threads(warp, rows_per_block);
  const auto blocks = static_cast<unsigned>((a.rows + rows_per_block - 1) / rows_per_block);
  with_types(a.x_type, a.y_type, [&](auto x, auto y) {
    forward<decltype(x), decltype(y)><<<blocks, threads, 0, static_cast<cudaStream_t>(a.stream)>>>(a);
  });
  check(cudaGetLastError(), "rms_norm_forward");
}

void rms_norm_backward(const RmsNormBackward& a) {
  if (a.rows == 0) return;
  const DeviceGuard guard(a.device);
  int processors = 0;
  check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, a.device),
        "cudaDeviceGetAttribute");
  const dim3 threads(warp, rows_per_block);
  const index_t full = (a.rows + rows_per_block - 1) / rows_per_block,
                most = 8 * static_cast<index_t>(processors);
  const auto blocks = static_cast<unsigned>(full < most ? full : most);
  const auto shared = static_cast<std::size_t>(a.width) * sizeof(float);
  with_types(a.x_type, a.y_type, [&](auto x, auto y) {
    backward<decltype(x), decltype(y)><<<blocks, threads, shared, static_cast<cudaStream_t>(a.stream)>>>(a);
  });
  check(cudaGetLastError(), "rms_norm_backward");
}

}  // namespace imf::cuda

// Host side of kernels that use TMA: tensor maps and the launch.
#pragma once

#include <cuda.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "cuda/ptx/descriptor.h"
#include "cuda/ptx/tma.h"
#include "cuda/runtime.h"

namespace imf::cuda::ptx {

// A tensor of two-byte elements, [sizes[3], ..., sizes[0]], and the box of it that a copy takes. `strides`:
// bytes between neighbours in dimensions 1 to 3, which are multiples of 16 like the address.
struct Boxes {
  void* data;
  std::uint64_t sizes[4], strides[3];
  std::uint32_t rows, columns;  // of a box, in dimensions 1 and 0; 1 in the others
  Swizzle swizzle;
};

// The driver's function is looked up at run time, so that the module loads where there is no driver.
inline TensorMap tensor_map(const Boxes& boxes) {
  static const auto encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found{};
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault,
                                           &found),
          "cudaGetDriverEntryPointByVersion");
    if (found != cudaDriverEntryPointSuccess) {
      throw std::runtime_error("cuTensorMapEncodeTiled: the driver has no such function; it needs CUDA 12");
    }
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
  }();
  const std::uint32_t box[4] = {boxes.columns, boxes.rows, 1, 1}, steps[4] = {1, 1, 1, 1};
  const auto swizzle = boxes.swizzle == Swizzle::bytes_128  ? CU_TENSOR_MAP_SWIZZLE_128B
                       : boxes.swizzle == Swizzle::bytes_64 ? CU_TENSOR_MAP_SWIZZLE_64B
                                                            : CU_TENSOR_MAP_SWIZZLE_32B;
  TensorMap map;
  // Elements are only copied, so one type of two bytes stands for all.
  const CUresult status = encode(&map, CU_TENSOR_MAP_DATA_TYPE_UINT16, 4, boxes.data, boxes.sizes,
                                 boxes.strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle,
                                 CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS) {
    throw std::runtime_error("cuTensorMapEncodeTiled: error " + std::to_string(static_cast<int>(status)));
  }
  return map;
}

inline int processors(int device) {
  int count = 0;
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
  return count;
}

// Launches `kernel` on `blocks` blocks of `threads` threads, with dynamic shared memory of `shared` bytes.
template <typename Parameters>
void launch(void (*kernel)(Parameters), int blocks, int threads, int shared, void* stream,
            const Parameters& parameters, const char* name) {
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared), name);
  kernel<<<blocks, threads, shared, static_cast<cudaStream_t>(stream)>>>(parameters);
  check(cudaGetLastError(), name);
}

}  // namespace imf::cuda::ptx

// Launches on PyTorch's streams, and CUDA errors as exceptions.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>
#include <type_traits>

#include "tensor.h"

namespace imf::cuda {

// Returns why nothing can be launched here (no driver, one older than the toolkit); empty if it can.
std::string unavailable();

inline void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) {
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
  }
}

// Makes `device` current for a launch and restores the one before: PyTorch's streams belong to devices.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&before_), "cudaGetDevice");
    if (device != before_) check(cudaSetDevice(device), "cudaSetDevice");
    changed_ = device != before_;
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

// Launches kernel(arguments...) unless the grid is empty. Neither allocates nor synchronises, so that it can
// be captured into a CUDA graph.
template <typename... Parameters, typename... Arguments>
void launch(const char* what, void (*kernel)(Parameters...), index_t blocks, unsigned columns, dim3 threads,
            Place place, Arguments... arguments) {
  static_assert((std::is_trivially_copyable_v<Parameters> && ...), "they are copied to the device");
  if (blocks == 0 || columns == 0) return;
  if (blocks > 0x7fffffff) throw std::runtime_error(std::string(what) + ": more than 2^31 - 1 blocks");
  const DeviceGuard guard(place.device);
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks), columns);
  config.blockDim = threads;
  config.stream = static_cast<cudaStream_t>(place.stream);
  check(cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...), what);
}

inline index_t divide_up(index_t a, index_t b) { return (a + b - 1) / b; }

}  // namespace imf::cuda

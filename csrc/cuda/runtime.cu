#include "cuda/runtime.h"

namespace imf::cuda {

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

}  // namespace imf::cuda

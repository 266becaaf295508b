// The CUDA kernels of csrc/cuda, compiled for the CPU, under the names that they have in imf_kernels._C; and
// kernels that are wrong, to show that the emulator sees it.
#include <pybind11/pybind11.h>

#include <vector>

#include "cuda/bindings.h"
#include "cuda/runtime.h"

namespace {

void half_a_block_waits() {
  if (threadIdx.x < 32) __syncthreads();
}

void two_barriers() {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

void half_a_warp_shuffles() {
  if (threadIdx.x < 16) __shfl_xor_sync(0xffffffffu, 1.0f, 1);
}

// Thread 0's result depends on the order of the threads: a barrier is missing.
void race(float* result) {
  __shared__ float x;
  x = static_cast<float>(threadIdx.x);
  if (threadIdx.x == 0) *result = x;
  __syncthreads();
  if (threadIdx.x == 0) *result = x;
}

void stray(float* x) { x[threadIdx.x] = 0.0f; }

template <typename... P, typename... A>
void run(void (*kernel)(P...), A... arguments) {
  imf::cuda::launch("test", kernel, 1, 1, dim3(64), imf::cuda::Place{0, nullptr}, arguments...);
}

}  // namespace

PYBIND11_MODULE(_cuda_host, m) {
  imf::cuda::register_functions(m);
  m.def("set_backwards", &cuda_host::set_backwards);
  m.def("half_a_block_waits", [] { run(half_a_block_waits); });
  m.def("two_barriers", [] { run(two_barriers); });
  m.def("half_a_warp_shuffles", [] { run(half_a_warp_shuffles); });
  m.def("stray", [] {
    std::vector<float> memory(63);  // for 64 threads
    run(stray, memory.data());
  });
  m.def("race", [] {
    float result = -1.0f;
    run(race, &result);
    return result;
  });
}

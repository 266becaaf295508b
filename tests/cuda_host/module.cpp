// The CUDA kernels of csrc/cuda, compiled for the CPU, under the names that they have in imf_kernels._C; and
// kernels that are wrong, to show that the emulator sees it.
#include <vector>

#include "bindings.h"
#include "cuda/runtime.h"

// Tensors are on the CPU, where this module's functions are the kernels for CUDA.
#define IMF_DEFINE_CPU(function, Arguments)
#define IMF_DEFINE_HOPPER(function, Arguments)
#define IMF_DEFINE_CUDA(function, Arguments) \
  const Entered function##_entered(          \
      [](pybind11::module_& m) { define<Arguments>(m, #function, cuda::function, cuda::function); });
#define IMF_REGISTER(function, Arguments, on) IMF_DEFINE_##on(function, Arguments)

#include "operations.h"  // csrc/ops/*.h

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
  imf::cuda::launch("test", kernel, 1, 1, dim3(64), imf::Place{0, nullptr, 1}, arguments...);
}

}  // namespace

PYBIND11_MODULE(_cuda_host, m) {
  m.attr("schemas") = pybind11::dict();
  for (const imf::Definition definition : imf::definitions()) definition(m);
  m.def("cuda_unavailable", &imf::cuda::unavailable);
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

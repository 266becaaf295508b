// In the place of csrc/cuda/ptx/wgmma.h.
#pragma once

#include "cuda/ptx/descriptor.h"
#include "device.h"

namespace imf::cuda::ptx {

inline void wgmma_fence() { machine::thread().fenced = true; }
inline void wgmma_commit() { machine::commit(); }

template <int count>
void settle(float (&registers)[count]) {
  if (machine::thread().flights.count(registers)) machine::fail("registers settled while in flight");
}
template <int count>
void forget(float (&registers)[count]) {
  settle(registers);
  std::fill(registers, registers + count, NAN);
}
template <int count>
void renew(std::uint32_t (&)[count][4]) {}

template <int pending, typename... Sums>
void wgmma_wait(Sums&... sums) {
  machine::wait_for_products(pending);
  (settle(sums), ...);
}

template <int n>
void multiply_rows(float (&sum)[n / 2], std::uint64_t a, std::uint64_t b, bool add) {
  machine::issue(machine::Product{n, false, add, a, b}, sum, nullptr);
}
template <int n>
void multiply_columns(float (&sum)[n / 2], const std::uint32_t (&a)[4], std::uint64_t b) {
  machine::issue(machine::Product{n, true, true, 0, b}, sum, a);
}

}  // namespace imf::cuda::ptx

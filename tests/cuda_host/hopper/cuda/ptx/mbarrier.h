// In the place of csrc/cuda/ptx/mbarrier.h.
#pragma once

#include "device.h"

namespace imf::cuda::ptx {

inline void mbarrier_init(std::uint32_t barrier, std::uint32_t arrivals) {
  const int count = static_cast<int>(arrivals);
  if (!machine::block()->barriers.insert({barrier, {count, count}}).second)
    machine::fail("an mbarrier twice");
}
inline void mbarrier_init_fence() {
  for (auto& [address, barrier] : machine::block()->barriers) barrier.fenced = true;
}
inline void mbarrier_arrive(std::uint32_t barrier) { machine::arrive(barrier, 0); }
inline void mbarrier_arrive_expect(std::uint32_t barrier, std::uint32_t bytes) {
  machine::arrive(barrier, bytes);
}
inline void mbarrier_wait(std::uint32_t barrier, std::uint32_t parity) {
  const machine::Barrier& b = machine::barrier_at(barrier);
  machine::wait_until("an mbarrier", [&b, parity] { return (b.phases & 1) != parity; });
}

}  // namespace imf::cuda::ptx

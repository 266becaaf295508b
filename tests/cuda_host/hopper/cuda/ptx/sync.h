// In the place of csrc/cuda/ptx/sync.h.
#pragma once

#include "device.h"

namespace imf::cuda::ptx {

inline std::uint32_t shared_memory() { return 16; }  // aligned to no more than the language promises
inline int uniform(unsigned x) { return static_cast<int>(x); }
inline void barrier_sync(int id, int threads) { machine::meet(id, threads, true); }
inline void barrier_arrive(int id, int threads) { machine::meet(id, threads, false); }
template <int count>
inline void fewer_registers() {}
template <int count>
inline void more_registers() {}

}  // namespace imf::cuda::ptx

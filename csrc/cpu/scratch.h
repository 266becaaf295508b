// Thread-local working memory, reused across calls: fresh pages are expensive.
#pragma once

#include <cstdlib>
#include <new>

#include "types.h"

namespace imf::IMF_ISA {
namespace {

// Scratch memory; at most one per Owner and thread at a time.
template <typename Owner>
class ScratchOf {
 public:
  // Reserves `floats` in total, for up to 64 pieces.
  explicit ScratchOf(index_t floats) {
    static thread_local Block block;
    const index_t wanted = floats + 64 * alignment;
    if (block.capacity < wanted) {
      std::free(block.data);
      block.data = static_cast<float*>(std::malloc(static_cast<std::size_t>(wanted) * sizeof(float)));
      block.capacity = block.data ? wanted : 0;
      if (!block.data) throw std::bad_alloc();
    }
    next_ = block.data;
  }

  // Takes `count` values of 32 bits, aligned to a cache line.
  template <typename T>
  T* take(index_t count) {
    static_assert(sizeof(T) == sizeof(float), "all pieces are counted in floats");
    const auto address = (reinterpret_cast<std::uintptr_t>(next_) + alignment * sizeof(float) - 1) /
                         (alignment * sizeof(float)) * (alignment * sizeof(float));
    next_ = reinterpret_cast<float*>(address) + count;
    return reinterpret_cast<T*>(address);
  }

 private:
  static constexpr index_t alignment = 16;  // floats: a cache line
  struct Block {
    float* data = nullptr;
    index_t capacity = 0;
    ~Block() { std::free(data); }
  };
  float* next_;
};
using Scratch = ScratchOf<void>;

}  // namespace
}  // namespace imf::IMF_ISA

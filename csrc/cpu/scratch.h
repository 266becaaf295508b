// Working memory of one thread, kept from call to call: fresh pages are dear.
#pragma once

#include <cstdlib>
#include <new>

#include "common/types.h"

namespace imf {
namespace IMF_ISA {
namespace {

class Scratch {
 public:
  // Room for `floats` in all, however many pieces they are taken in.
  explicit Scratch(index_t floats) {
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

  float* take(index_t floats) {
    const auto address = (reinterpret_cast<std::uintptr_t>(next_) + alignment * sizeof(float) - 1) /
                         (alignment * sizeof(float)) * (alignment * sizeof(float));
    float* piece = reinterpret_cast<float*>(address);
    next_ = piece + floats;
    return piece;
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

}  // namespace
}  // namespace IMF_ISA
}  // namespace imf

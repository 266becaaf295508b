// Thread-local working memory, reused across calls: fresh pages are expensive.
#pragma once

#include <cstdlib>
#include <new>

#include "types.h"

#if defined(__SANITIZE_ADDRESS__)
#include <cstdio>
#include <memory>
#include <vector>
#endif

namespace imf::IMF_ISA {
namespace {

#if defined(__SANITIZE_ADDRESS__)
// For AddressSanitizer: every piece is a block of its own, so that no access beyond a piece stays unseen.
template <typename Owner>
class ScratchOf {
 public:
  explicit ScratchOf(index_t floats) : left_(floats), around_(current()) {
    require(!around_, "two scratches of one owner at a time");
    current() = this;
  }
  ~ScratchOf() { current() = around_; }
  ScratchOf(const ScratchOf&) = delete;

  template <typename T>
  T* take(index_t count) {
    static_assert(sizeof(T) == sizeof(float), "all pieces are counted in floats");
    left_ -= count;
    require(count >= 0 && left_ >= 0 && pieces_.size() < 64, "pieces exceed what was reserved");
    const std::size_t bytes = static_cast<std::size_t>(count) * sizeof(float);
    void* piece = nullptr;
    if (posix_memalign(&piece, 64, bytes)) throw std::bad_alloc();
    pieces_.emplace_back(piece, std::free);
    return static_cast<T*>(piece);
  }

 private:
  static ScratchOf*& current() {
    static thread_local ScratchOf* scratch = nullptr;
    return scratch;
  }
  static void require(bool holds, const char* what) {
    if (holds) return;
    std::fprintf(stderr, "imf_kernels: scratch memory: %s\n", what);
    std::abort();
  }
  index_t left_;
  ScratchOf* around_;
  std::vector<std::unique_ptr<void, void (*)(void*)>> pieces_;
};
#else
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
#endif
using Scratch = ScratchOf<void>;

}  // namespace
}  // namespace imf::IMF_ISA

// In the place of csrc/cuda/ptx/launch.h: what the driver refuses is refused here, and blocks run one by one.
#pragma once

#include "cuda/ptx/descriptor.h"
#include "cuda/ptx/tma.h"
#include "cuda/runtime.h"

namespace imf::cuda::ptx {

struct Boxes {
  void* data;
  std::uint64_t sizes[4], strides[3];
  std::uint32_t rows, columns;
  Swizzle swizzle;
};

// The emulated device.
inline int& processor_count() {
  static int count = 1;
  return count;
}
inline unsigned& seed() {
  static unsigned value = 0;
  return value;
}
inline int processors(int) { return processor_count(); }

inline TensorMap tensor_map(const Boxes& boxes) {
  const auto refuse = [](const char* what) { throw std::runtime_error(std::string("tensor map: ") + what); };
  TensorMap map{static_cast<const char*>(boxes.data), {}, {2}, 0, 0, static_cast<int>(boxes.swizzle)};
  if (reinterpret_cast<std::uintptr_t>(boxes.data) % 16) refuse("the address is no multiple of 16");
  for (int i = 0; i < 4; ++i) {
    if (boxes.sizes[i] == 0 || boxes.sizes[i] >> 32) refuse("a size is 0 or beyond 32 bits");
    map.sizes[i] = static_cast<std::int64_t>(boxes.sizes[i]);
    if (i == 3) break;
    if (boxes.strides[i] == 0 || boxes.strides[i] % 16 || boxes.strides[i] >> 40) {
      refuse("a stride is 0, no multiple of 16, or beyond 40 bits");
    }
    map.strides[i + 1] = static_cast<std::int64_t>(boxes.strides[i]);
  }
  if (boxes.rows > 256 || boxes.columns * 2 != static_cast<std::uint32_t>(boxes.swizzle)) refuse("the box");
  map.rows = static_cast<int>(boxes.rows);
  map.columns = static_cast<int>(boxes.columns);
  return map;
}

template <typename Parameters>
void launch(void (*kernel)(Parameters), int blocks, int threads, int shared, void*,
            const Parameters& parameters, const char*) {
  if (shared > machine::shared_bytes) throw std::runtime_error("more shared memory than there is");
  for (int i = 0; i < blocks; ++i) {
    machine::Block b;
    b.index.x = static_cast<unsigned>(i);
    b.blocks.x = static_cast<unsigned>(blocks);
    b.kernel = [&] { kernel(parameters); };
    b.random.seed(seed() * 1000003u + static_cast<unsigned>(i));
    b.shared.assign(static_cast<std::size_t>(shared) + 16, '\xff');  // shared_memory() is 16
    machine::run(b, threads);
  }
}

}  // namespace imf::cuda::ptx

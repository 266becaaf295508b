// Layout of a tile in shared memory, as TMA writes it and wgmma reads it; plain integers, no instruction.
// Source: PTX ISA, "Asynchronous Warpgroup Level Matrix Shared Memory Layout" and "Matrix Descriptor Format".
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define IMF_PTX __host__ __device__ __forceinline__
#else
#define IMF_PTX inline
#endif

namespace imf::cuda::ptx {

// Bytes per row of a box. Within eight rows, chunks of 16 bytes are permuted by the row's number, so that a
// column of chunks meets every bank; by the address, so boxes begin at multiples of eight rows.
enum class Swizzle : std::uint32_t { bytes_32 = 32, bytes_64 = 64, bytes_128 = 128 };

// Returns the descriptor of a wgmma operand in shared memory. `stride`: bytes between groups of eight rows of
// the box; `leading`: bytes to the box with the next columns, read only if rows are summed over.
constexpr IMF_PTX std::uint64_t descriptor(std::uint32_t address, std::uint32_t leading, std::uint32_t stride,
                                           Swizzle swizzle) {
  const std::uint64_t mode = swizzle == Swizzle::bytes_128 ? 1 : swizzle == Swizzle::bytes_64 ? 2 : 3;
  return static_cast<std::uint64_t>((address & 0x3ffff) >> 4) |
         static_cast<std::uint64_t>((leading & 0x3ffff) >> 4) << 16 |
         static_cast<std::uint64_t>((stride & 0x3ffff) >> 4) << 32 | mode << 62;
}

// Returns the operand that begins `bytes` later.
constexpr IMF_PTX std::uint64_t advance(std::uint64_t descriptor, std::uint32_t bytes) {
  return descriptor + (bytes >> 4);
}

}  // namespace imf::cuda::ptx

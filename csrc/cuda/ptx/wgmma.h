// Products of a warpgroup's tiles, issued by its four warps together and finished asynchronously.
//
// A product adds a [64, 16] tile times a [16, N] tile to N / 2 fp32 registers of each thread. Thread t holds
// rows r = 16 (t / 32) + (t % 32) / 4 and r + 8: register 4 j + 2 i + c is row r + 8 i, column 8 j + 2 (t %
// 4) + c. A left operand in registers lies the same way, two columns a register: {row r, row r + 8} of
// columns 0 to 7, then of 8 to 15.
//
// Between the issue and the wait for it, no thread may touch the registers of a product; before the first
// product after that, fence() orders what was written to them. Source: PTX ISA, "Asynchronous Warpgroup Level
// Matrix Instructions".
#pragma once

#include <cstdint>

#include "cuda/ptx/descriptor.h"
#include "types.h"

namespace imf::cuda::ptx {

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// Commits the products issued since the last commit as a group.
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Keeps the compiler from moving operations on registers across this point.
template <int count>
__device__ __forceinline__ void settle(float (&registers)[count]) {
#pragma unroll
  for (int i = 0; i < count; ++i) asm volatile("" : "+f"(registers[i])::"memory");
}

// Ends the lifetime of what registers hold: the compiler need not keep it for a product that overwrites it.
template <int count>
__device__ __forceinline__ void forget(float (&registers)[count]) {
#pragma unroll
  for (int i = 0; i < count; ++i) asm volatile("" : "=f"(registers[i]));
}

// Makes the compiler read pairs anew instead of keeping their unpacked values in registers.
template <int count>
__device__ __forceinline__ void renew(std::uint32_t (&pairs)[count][4]) {
#pragma unroll
  for (int i = 0; i < 4 * count; ++i) asm volatile("" : "+r"(pairs[i / 4][i % 4]));
}

// Waits until at most the latest `pending` groups are unfinished. `sums` belong to finished groups.
template <int pending, typename... Sums>
__device__ __forceinline__ void wgmma_wait(Sums&... sums) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
  (settle(sums), ...);
}

// Multiplies operands in shared memory, both summed over columns: sum (+)= a b^T.
template <int n>
__device__ void multiply_rows(float (&sum)[n / 2], std::uint64_t a, std::uint64_t b, bool add);

// Multiplies a left operand in registers by one in shared memory, summed over its rows: sum += a b.
template <int n>
__device__ void multiply_columns(float (&sum)[n / 2], const std::uint32_t (&a)[4], std::uint64_t b);

#define IMF_LIST_24                                                                                      \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, " \
  "%22, %23"
#define IMF_LIST_32 IMF_LIST_24 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define IMF_LIST_40 IMF_LIST_32 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define IMF_LIST_48 IMF_LIST_40 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define IMF_LIST_64 \
  IMF_LIST_48 ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define IMF_8(i)                                                                              \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])
#define IMF_REGISTERS_24 IMF_8(0), IMF_8(8), IMF_8(16)
#define IMF_REGISTERS_32 IMF_REGISTERS_24, IMF_8(24)
#define IMF_REGISTERS_40 IMF_REGISTERS_32, IMF_8(32)
#define IMF_REGISTERS_48 IMF_REGISTERS_40, IMF_8(40)
#define IMF_REGISTERS_64 IMF_REGISTERS_48, IMF_8(48), IMF_8(56)

// A, B, ...: the numbers of the operands after the sums.
#define IMF_MULTIPLY_ROWS(N, COUNT, A, B, ADD)                                                              \
  template <>                                                                                               \
  __device__ __forceinline__ void multiply_rows<N>(float (&d)[COUNT], std::uint64_t a, std::uint64_t b,     \
                                                   bool add) {                                              \
    asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %" #ADD ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N \
                 "k16.f32.bf16.bf16 {" IMF_LIST_##COUNT "}, %" #A ", %" #B ", add, 1, 1, 0, 0;\n}\n"        \
                 : IMF_REGISTERS_##COUNT                                                                    \
                 : "l"(a), "l"(b), "r"(static_cast<int>(add)));                                             \
  }
#define IMF_MULTIPLY_COLUMNS(N, COUNT, A0, A1, A2, A3, B)                                             \
  template <>                                                                                         \
  __device__ __forceinline__ void multiply_columns<N>(float (&d)[COUNT], const std::uint32_t (&a)[4], \
                                                      std::uint64_t b) {                              \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" IMF_LIST_##COUNT        \
                 "}, {%" #A0 ", %" #A1 ", %" #A2 ", %" #A3 "}, %" #B ", 1, 1, 1, 1;\n"                \
                 : IMF_REGISTERS_##COUNT                                                              \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                               \
  }
#define IMF_PRODUCTS                               \
  IMF_MULTIPLY_ROWS(48, 24, 24, 25, 26)            \
  IMF_MULTIPLY_ROWS(80, 40, 40, 41, 42)            \
  IMF_MULTIPLY_ROWS(96, 48, 48, 49, 50)            \
  IMF_MULTIPLY_COLUMNS(64, 32, 32, 33, 34, 35, 36) \
  IMF_MULTIPLY_COLUMNS(80, 40, 40, 41, 42, 43, 44) \
  IMF_MULTIPLY_COLUMNS(96, 48, 48, 49, 50, 51, 52) \
  IMF_MULTIPLY_COLUMNS(128, 64, 64, 65, 66, 67, 68)
IMF_PRODUCTS
#undef IMF_PRODUCTS
#undef IMF_MULTIPLY_COLUMNS
#undef IMF_MULTIPLY_ROWS
#undef IMF_REGISTERS_64
#undef IMF_LIST_64
#undef IMF_REGISTERS_48
#undef IMF_LIST_48
#undef IMF_REGISTERS_40
#undef IMF_LIST_40
#undef IMF_REGISTERS_32
#undef IMF_LIST_32
#undef IMF_REGISTERS_24
#undef IMF_LIST_24
#undef IMF_8

}  // namespace imf::cuda::ptx

// SIMD vectors of floats: one interface for AVX-512, AVX2, NEON and plain C++, chosen by the compiler's flags
// (see isa.h). CPU kernels compute in fp32; bf16 is for storage only, rounded to nearest even, NaN staying
// NaN (by the processor's instruction if there is one, which treats denormals as zero).
//
// Contract of exp: relative error at most 2 ulp on [-87.3, 88.7]; below it 0 (denormal results are flushed),
// above it inf; NaN propagates. Enforced by tests/csrc/test_vec.py.
#pragma once

#include <cmath>

#include "cpu/dual.h"
#include "types.h"

#if IMF_ISA_LEVEL >= 2 && defined(IMF_X86)
#include <immintrin.h>
#define IMF_VEC_WIDTH (IMF_ISA_LEVEL >= 3 ? 16 : 8)
#else
#define IMF_VEC_WIDTH 4
#if IMF_ISA_LEVEL >= 2
#include <arm_neon.h>
#endif
#endif

// Internal linkage: if the linker merged copies of a header, a processor could be given AVX-512 code.
namespace imf::IMF_ISA {
namespace {

inline float to_float(bfloat16 x) {
  const std::uint32_t bits = static_cast<std::uint32_t>(x.bits) << 16;
  float y;
  std::memcpy(&y, &bits, sizeof y);
  return y;
}
inline bfloat16 to_bfloat16(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  if (x != x) return {0x7fc0};
  return {static_cast<std::uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}
inline float to_float(float x) { return x; }
inline void store(float* p, float x) { *p = x; }
inline void store(bfloat16* p, float x) { *p = to_bfloat16(x); }

// The compiler's vectors, on which C++'s operators work lane by lane.
struct Vec {
  static constexpr int width = IMF_VEC_WIDTH;
  typedef float Lanes __attribute__((vector_size(width * sizeof(float))));
  typedef std::int32_t Integers __attribute__((vector_size(width * sizeof(float))));
  typedef std::uint32_t Bits __attribute__((vector_size(width * sizeof(float))));
  typedef std::uint16_t Halves __attribute__((vector_size(width * sizeof(bfloat16))));
  Lanes v;
  Vec() = default;
  Vec(Lanes x) : v(x) {}
  explicit Vec(float x) : v(x - Lanes{}) {}
};

inline Vec operator+(Vec a, Vec b) { return a.v + b.v; }
inline Vec operator-(Vec a, Vec b) { return a.v - b.v; }
inline Vec operator*(Vec a, Vec b) { return a.v * b.v; }
inline Vec operator/(Vec a, Vec b) { return a.v / b.v; }
inline Vec& operator+=(Vec& a, Vec b) { return a = a + b; }
inline Vec abs(Vec a) { return (Vec::Lanes)((Vec::Bits)a.v & 0x7fffffffu); }
// Returns yes where a < b, otherwise (also for NaN) no.
inline Vec select_less(Vec a, Vec b, Vec yes, Vec no) { return a.v < b.v ? yes.v : no.v; }

inline Vec::Integers first_lanes(int n) {
  alignas(64) static constexpr std::int32_t numbers[16] = {0, 1, 2,  3,  4,  5,  6,  7,
                                                           8, 9, 10, 11, 12, 13, 14, 15};
  Vec::Integers lanes;
  std::memcpy(&lanes, numbers, sizeof lanes);
  return lanes < n;
}
// Returns the first n lanes, and `other` in the rest.
inline Vec keep(Vec a, int n, float other) { return first_lanes(n) ? a.v : Vec(other).v; }

inline Vec load(const float* p) {
  Vec a;
  std::memcpy(&a.v, p, sizeof a.v);
  return a;
}
inline void store(float* p, Vec a) { std::memcpy(p, &a.v, sizeof a.v); }

#if IMF_ISA_LEVEL < 3
// n integral in [-126, 128], or NaN where a is; in two halves, so that 2^128 itself need not be representable
inline Vec scale_by_power_of_two(Vec a, Vec n) {
  const Vec::Integers all = __builtin_convertvector(n.v, Vec::Integers), half = all >> 1;
  const auto power = [](Vec::Integers e) { return (Vec::Lanes)((e + 127) << 23); };
  return a.v * power(half) * power(all - half);
}
#endif

#if IMF_ISA_LEVEL >= 3  // AVX-512, with bf16 dot products from 4 on

inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a.v, b.v, c.v); }
inline Vec sqrt(Vec a) { return _mm512_sqrt_ps(a.v); }
inline Vec max(Vec a, Vec b) { return _mm512_max_ps(a.v, b.v); }  // b where either is NaN
inline Vec min(Vec a, Vec b) { return _mm512_min_ps(a.v, b.v); }
inline Vec round(Vec a) { return _mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline Vec scale_by_power_of_two(Vec a, Vec n) { return _mm512_scalef_ps(a.v, n.v); }
inline float reduce_add(Vec a) { return _mm512_reduce_add_ps(a.v); }
inline float reduce_max(Vec a) { return _mm512_reduce_max_ps(a.v); }

inline Vec::Bits extend(Vec::Halves x) { return (Vec::Bits)_mm512_cvtepu16_epi32((__m256i)x); }
inline Vec::Halves truncate(Vec::Bits x) { return (Vec::Halves)_mm512_cvtepi32_epi16((__m512i)x); }

inline Vec swap_pairs(Vec a) { return _mm512_permute_ps(a.v, 0xB1); }
inline Vec duplicate_lower(Vec a) {  // lanes 0 0 1 1 2 2 ...
  return _mm512_permutexvar_ps(_mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7), a.v);
}
inline Vec unpack_low(Vec a, Vec b) { return _mm512_unpacklo_ps(a.v, b.v); }
inline Vec unpack_high(Vec a, Vec b) { return _mm512_unpackhi_ps(a.v, b.v); }
inline Vec join_low(Vec a, Vec b) { return _mm512_shuffle_ps(a.v, b.v, 0x44); }
inline Vec join_high(Vec a, Vec b) { return _mm512_shuffle_ps(a.v, b.v, 0xEE); }
template <int choice>
inline Vec join_fours(Vec a, Vec b) {
  return _mm512_shuffle_f32x4(a.v, b.v, choice);
}
inline void transpose_fours(const Vec (&f)[16], Vec (&a)[16]) {
  for (int j = 0; j < 4; ++j) {  // column 4 k + j of the result lies in quarter k of f[j], f[4 + j], ...
    const Vec low = join_fours<0x88>(f[j], f[4 + j]), high = join_fours<0x88>(f[8 + j], f[12 + j]);
    const Vec low2 = join_fours<0xDD>(f[j], f[4 + j]), high2 = join_fours<0xDD>(f[8 + j], f[12 + j]);
    a[j] = join_fours<0x88>(low, high);
    a[8 + j] = join_fours<0xDD>(low, high);
    a[4 + j] = join_fours<0x88>(low2, high2);
    a[12 + j] = join_fours<0xDD>(low2, high2);
  }
}

#elif IMF_ISA_LEVEL == 2 && defined(IMF_X86)  // AVX2 and FMA

inline Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a.v, b.v, c.v); }
inline Vec sqrt(Vec a) { return _mm256_sqrt_ps(a.v); }
inline Vec max(Vec a, Vec b) { return _mm256_max_ps(a.v, b.v); }  // b where either is NaN
inline Vec min(Vec a, Vec b) { return _mm256_min_ps(a.v, b.v); }
inline Vec round(Vec a) { return _mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline float reduce_add(Vec a) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
inline float reduce_max(Vec a) {
  __m128 s = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  s = _mm_max_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}

inline Vec::Bits extend(Vec::Halves x) { return (Vec::Bits)_mm256_cvtepu16_epi32((__m128i)x); }
inline Vec::Halves truncate(Vec::Bits x) {
  const __m256i all = (__m256i)x;
  return (Vec::Halves)_mm_packus_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
}

inline Vec swap_pairs(Vec a) { return _mm256_permute_ps(a.v, 0xB1); }
inline Vec duplicate_lower(Vec a) {  // lanes 0 0 1 1 2 2 ...
  return _mm256_permutevar8x32_ps(a.v, _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3));
}
inline Vec unpack_low(Vec a, Vec b) { return _mm256_unpacklo_ps(a.v, b.v); }
inline Vec unpack_high(Vec a, Vec b) { return _mm256_unpackhi_ps(a.v, b.v); }
inline Vec join_low(Vec a, Vec b) { return _mm256_shuffle_ps(a.v, b.v, 0x44); }
inline Vec join_high(Vec a, Vec b) { return _mm256_shuffle_ps(a.v, b.v, 0xEE); }
inline void transpose_fours(const Vec (&f)[8], Vec (&a)[8]) {
  for (int j = 0; j < 4; ++j) {
    a[j] = _mm256_permute2f128_ps(f[j].v, f[4 + j].v, 0x20);
    a[4 + j] = _mm256_permute2f128_ps(f[j].v, f[4 + j].v, 0x31);
  }
}

#else  // four lanes

#if IMF_ISA_LEVEL == 2  // NEON, which every 64-bit ARM processor has, with FMA
inline Vec fma(Vec a, Vec b, Vec c) { return vfmaq_f32(c.v, a.v, b.v); }
inline Vec sqrt(Vec a) { return vsqrtq_f32(a.v); }
inline Vec round(Vec a) { return vrndnq_f32(a.v); }
inline float reduce_add(Vec a) { return vaddvq_f32(a.v); }
inline float reduce_max(Vec a) { return vmaxvq_f32(a.v); }
#else                   // plain C++
// Rounded twice where the processor has no FMA; ::fmaf in software would be ten times slower.
inline Vec fma(Vec a, Vec b, Vec c) { return a.v * b.v + c.v; }
inline Vec sqrt(Vec a) {
  return Vec::Lanes{::sqrtf(a.v[0]), ::sqrtf(a.v[1]), ::sqrtf(a.v[2]), ::sqrtf(a.v[3])};
}
// Adding and taking away 1.5 * 2^23 leaves the nearest integer for |x| < 2^22.
inline Vec round(Vec a) { return (a.v + 12582912.0f) - 12582912.0f; }
inline float reduce_add(Vec a) { return (a.v[0] + a.v[2]) + (a.v[1] + a.v[3]); }
inline float reduce_max(Vec a) {
  const auto larger = [](float x, float y) { return x > y ? x : y; };
  return larger(larger(a.v[0], a.v[2]), larger(a.v[1], a.v[3]));
}
#endif
inline Vec::Bits extend(Vec::Halves x) { return __builtin_convertvector(x, Vec::Bits); }
inline Vec::Halves truncate(Vec::Bits x) { return __builtin_convertvector(x, Vec::Halves); }
// b where either is NaN; NEON's own maximum and minimum would be NaN.
inline Vec max(Vec a, Vec b) { return a.v > b.v ? a.v : b.v; }
inline Vec min(Vec a, Vec b) { return a.v < b.v ? a.v : b.v; }

inline Vec swap_pairs(Vec a) { return Vec::Lanes{a.v[1], a.v[0], a.v[3], a.v[2]}; }
inline Vec duplicate_lower(Vec a) { return Vec::Lanes{a.v[0], a.v[0], a.v[1], a.v[1]}; }
inline Vec unpack_low(Vec a, Vec b) { return Vec::Lanes{a.v[0], b.v[0], a.v[1], b.v[1]}; }
inline Vec unpack_high(Vec a, Vec b) { return Vec::Lanes{a.v[2], b.v[2], a.v[3], b.v[3]}; }
inline Vec join_low(Vec a, Vec b) { return Vec::Lanes{a.v[0], a.v[1], b.v[0], b.v[1]}; }
inline Vec join_high(Vec a, Vec b) { return Vec::Lanes{a.v[2], a.v[3], b.v[2], b.v[3]}; }
inline void transpose_fours(const Vec (&f)[4], Vec (&a)[4]) { std::memcpy(a, f, sizeof f); }

#endif

inline Vec widen(Vec::Halves bits) { return (Vec::Lanes)(extend(bits) << 16); }
#if IMF_ISA_LEVEL >= 4
inline Vec::Halves narrow(Vec a) { return (Vec::Halves)_mm512_cvtneps_pbh(a.v); }
#else
inline Vec::Halves narrow(Vec a) {
  const Vec::Bits x = (Vec::Bits)a.v, rounded = (x + 0x7fff + ((x >> 16) & 1)) >> 16;
  return truncate(a.v == a.v ? rounded : Vec::Bits{} + 0x7fc0);
}
#endif
inline Vec load(const bfloat16* p) {
  Vec::Halves bits;
  std::memcpy(&bits, p, sizeof bits);
  return widen(bits);
}
inline void store(bfloat16* p, Vec a) {
  const Vec::Halves bits = narrow(a);
  std::memcpy(p, &bits, sizeof bits);
}

// The first n elements, zeros in the other lanes.
template <typename T>
inline Vec load(const T* p, int n) {
  T elements[Vec::width] = {};
  std::memcpy(elements, p, static_cast<std::size_t>(n) * sizeof(T));
  return load(elements);
}
template <typename T>
inline void store(T* p, Vec a, int n) {
  T elements[Vec::width];
  store(elements, a);
  std::memcpy(p, elements, static_cast<std::size_t>(n) * sizeof(T));
}

#if IMF_ISA_LEVEL >= 3
inline __mmask16 first_bits(int n) { return static_cast<__mmask16>((1u << n) - 1u); }
inline Vec load(const float* p, int n) { return _mm512_maskz_loadu_ps(first_bits(n), p); }
inline void store(float* p, Vec a, int n) { _mm512_mask_storeu_ps(p, first_bits(n), a.v); }
inline Vec load(const bfloat16* p, int n) {
  return widen((Vec::Halves)_mm256_maskz_loadu_epi16(first_bits(n), p));
}
inline void store(bfloat16* p, Vec a, int n) {
  _mm256_mask_storeu_epi16(p, first_bits(n), (__m256i)narrow(a));
}
#elif IMF_ISA_LEVEL == 2 && defined(IMF_X86)
inline Vec load(const float* p, int n) { return _mm256_maskload_ps(p, (__m256i)first_lanes(n)); }
inline void store(float* p, Vec a, int n) { _mm256_maskstore_ps(p, (__m256i)first_lanes(n), a.v); }
#endif

// Transposes the square matrix whose rows are a[0], a[1], ...: pairs, fours, then the fours of each row.
inline void transpose(Vec (&a)[Vec::width]) {
  Vec t[Vec::width], f[Vec::width];
  for (int i = 0; i < Vec::width; i += 2) {
    t[i] = unpack_low(a[i], a[i + 1]);
    t[i + 1] = unpack_high(a[i], a[i + 1]);
  }
  for (int i = 0; i < Vec::width; i += 4) {
    f[i] = join_low(t[i], t[i + 2]);
    f[i + 1] = join_high(t[i], t[i + 2]);
    f[i + 2] = join_low(t[i + 1], t[i + 3]);
    f[i + 3] = join_high(t[i + 1], t[i + 3]);
  }
  transpose_fours(f, a);
}

// Prefetches data of the next row; the hardware itself prefetches streams without gaps.
inline void prefetch(const void* p) { __builtin_prefetch(p); }

// e^x = 2^n e^r with n = round(x / ln 2) and |r| <= ln 2 / 2; e^r by its Taylor polynomial of degree 7, whose
// remainder there is below 6e-9 of the result. ln 2 is split so that n ln2_high is exact.
inline Vec exp(Vec x) {
  const Vec highest(88.72283935546875f), lowest(-87.33654022216796875f);
  // The bound comes first in max and min, so that a NaN in x survives.
  const Vec bounded = max(lowest, min(highest, x));
  const Vec n = round(bounded * Vec(1.44269504088896341f));
  Vec r = fma(n, Vec(-0.693359375f), bounded);
  r = fma(n, Vec(2.12194440e-4f), r);
  Vec p(1.0f / 5040.0f);
  p = fma(p, r, Vec(1.0f / 720.0f));
  p = fma(p, r, Vec(1.0f / 120.0f));
  p = fma(p, r, Vec(1.0f / 24.0f));
  p = fma(p, r, Vec(1.0f / 6.0f));
  p = fma(p, r, Vec(0.5f));
  p = fma(p, r, Vec(1.0f));
  p = fma(p, r, Vec(1.0f));
  const Vec y = scale_by_power_of_two(p, n);
  const Vec overflowed = select_less(highest, x, Vec(INFINITY), y);
  return select_less(x, lowest, Vec(0.0f), overflowed);
}

// Computes the normal distribution, the integral of e^(-u^2/2) / sqrt(2 pi) up to x, and the density.
// Contract, enforced by tests/csrc/test_vec.py: relative error of the distribution at most 3 ulp for x >= 0
// and 3
// + x^2 / 2 ulp below, down to -13.2, from where on both are 0; the derivative of x times it, distribution +
// x density, to 2 ulp of 1; NaN propagates. (1 + erf) / 2 would cancel below 0. At -|x| it is e^(-x^2/2) t
// P(t), t = 1 / (1 + 0.34 |x|), P of degree 8 with the least relative error for |x| <= 13.3, 2.5e-8.
inline void normal(Vec x, Vec& distribution, Vec& density) {
  const Vec e = exp(x * x * Vec(-0.5f));
  const Vec t = Vec(1.0f) / fma(abs(x), Vec(0.34f), Vec(1.0f));
  Vec p(-0.026471859f);
  p = fma(p, t, Vec(0.141149966f));
  p = fma(p, t, Vec(-0.276413889f));
  p = fma(p, t, Vec(0.205777377f));
  p = fma(p, t, Vec(-0.0470845145f));
  p = fma(p, t, Vec(0.116314142f));
  p = fma(p, t, Vec(0.114967554f));
  p = fma(p, t, Vec(0.13614238f));
  p = fma(p, t, Vec(0.135618856f));
  const Vec below = e * t * p;
  distribution = select_less(x, Vec(0.0f), below, Vec(1.0f) - below);
  density = e * Vec(0.398942280401432678f);  // 1 / sqrt(2 pi)
}

// Calls body(offset, lanes) over [0, n), a vector at a time; lanes < width in the last call only.
// `load_lanes`, `store_lanes` and `keep_lanes` below take the faster path for full vectors.
template <typename Body>
inline void for_each_vec(index_t n, Body body) {
  index_t i = 0;
  for (; i + Vec::width <= n; i += Vec::width) body(i, Vec::width);
  if (i < n) body(i, static_cast<int>(n - i));
}
template <typename T>
inline Vec load_lanes(const T* p, int lanes) {
  return lanes == Vec::width ? load(p) : load(p, lanes);
}
// Returns zeros if p is null.
template <typename T>
inline Vec load_or_zero(const T* p, index_t i, int lanes) {
  return p ? load_lanes(p + i, lanes) : Vec(0.0f);
}
template <typename T>
inline void store_lanes(T* p, Vec a, int lanes) {
  if (lanes == Vec::width) {
    store(p, a);
  } else {
    store(p, a, lanes);
  }
}
inline Vec keep_lanes(Vec a, int lanes, float other) {
  return lanes == Vec::width ? a : keep(a, lanes, other);
}

// The same for duals.
inline Dual<Vec> keep_lanes(Dual<Vec> a, int lanes, float other) {
  return {keep_lanes(a.primal, lanes, other), keep_lanes(a.tangent, lanes, other)};
}
inline Dual<float> reduce_add(Dual<Vec> a) { return {reduce_add(a.primal), reduce_add(a.tangent)}; }
inline float primal(float x) { return x; }
inline float primal(Dual<float> x) { return x.primal; }
inline Vec broadcast(float x) { return Vec(x); }
inline Dual<Vec> broadcast(Dual<float> x) { return {Vec(x.primal), Vec(x.tangent)}; }

}  // namespace
}  // namespace imf::IMF_ISA

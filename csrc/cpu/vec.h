// SIMD vectors of floats: one interface for AVX-512, AVX2, NEON and plain C++, chosen by the compiler's flags
// (see isa.h). CPU kernels compute in fp32; bf16 is for storage only, rounded to nearest even, NaN staying
// NaN (by the processor's instruction if there is one, which treats denormals as zero).
//
// Contract of exp: relative error at most 2 ulp on [-87.3, 88.7]; below it 0 (denormal results are flushed),
// above it inf; NaN propagates. Enforced by tests/test_vec.py.
#pragma once

#include <cmath>

#include "common/dual.h"
#include "common/types.h"

#if IMF_ISA_LEVEL >= 2 && defined(IMF_X86)
#include <immintrin.h>
#elif IMF_ISA_LEVEL >= 2
#include <arm_neon.h>
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

#if IMF_ISA_LEVEL >= 3  // AVX-512, with bf16 dot products from 4 on

struct Vec {
  static constexpr int width = 16;
  __m512 v;
  Vec() = default;
  Vec(__m512 x) : v(x) {}
  explicit Vec(float x) : v(_mm512_set1_ps(x)) {}
};

inline __mmask16 first_lanes(int n) { return static_cast<__mmask16>((1u << n) - 1u); }

inline Vec operator+(Vec a, Vec b) { return _mm512_add_ps(a.v, b.v); }
inline Vec operator-(Vec a, Vec b) { return _mm512_sub_ps(a.v, b.v); }
inline Vec operator*(Vec a, Vec b) { return _mm512_mul_ps(a.v, b.v); }
inline Vec operator/(Vec a, Vec b) { return _mm512_div_ps(a.v, b.v); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a.v, b.v, c.v); }
inline Vec sqrt(Vec a) { return _mm512_sqrt_ps(a.v); }
inline Vec abs(Vec a) { return _mm512_abs_ps(a.v); }
inline Vec max(Vec a, Vec b) { return _mm512_max_ps(a.v, b.v); }  // b where either is NaN
inline Vec min(Vec a, Vec b) { return _mm512_min_ps(a.v, b.v); }
inline Vec round(Vec a) { return _mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline Vec scale_by_power_of_two(Vec a, Vec n) { return _mm512_scalef_ps(a.v, n.v); }
// Returns yes where a < b, otherwise (also for NaN) no.
inline Vec select_less(Vec a, Vec b, Vec yes, Vec no) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), no.v, yes.v);
}
// Returns the first n lanes, and `other` in the rest.
inline Vec keep(Vec a, int n, float other) {
  return _mm512_mask_mov_ps(_mm512_set1_ps(other), first_lanes(n), a.v);
}
inline Vec swap_pairs(Vec a) { return _mm512_permute_ps(a.v, 0xB1); }
inline Vec duplicate_lower(Vec a) {  // lanes 0 0 1 1 2 2 ...
  return _mm512_permutexvar_ps(_mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7), a.v);
}
// Transposes the 16 x 16 matrix whose rows are a[0] ... a[15]: pairs, fours, then quarters of rows.
inline void transpose(Vec (&a)[16]) {
  __m512 t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(a[i].v, a[i + 1].v);
    t[i + 1] = _mm512_unpackhi_ps(a[i].v, a[i + 1].v);
  }
  __m512 f[16];
  for (int i = 0; i < 16; i += 4) {
    f[i] = _mm512_shuffle_ps(t[i], t[i + 2], 0x44);
    f[i + 1] = _mm512_shuffle_ps(t[i], t[i + 2], 0xEE);
    f[i + 2] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    f[i + 3] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0xEE);
  }
  for (int j = 0; j < 4; ++j) {  // column 4 k + j of the result lies in quarter k of f[j], f[4 + j], ...
    const __m512 low = _mm512_shuffle_f32x4(f[j], f[4 + j], 0x88),
                 high = _mm512_shuffle_f32x4(f[8 + j], f[12 + j], 0x88);
    const __m512 low2 = _mm512_shuffle_f32x4(f[j], f[4 + j], 0xDD),
                 high2 = _mm512_shuffle_f32x4(f[8 + j], f[12 + j], 0xDD);
    a[j] = _mm512_shuffle_f32x4(low, high, 0x88);
    a[8 + j] = _mm512_shuffle_f32x4(low, high, 0xDD);
    a[4 + j] = _mm512_shuffle_f32x4(low2, high2, 0x88);
    a[12 + j] = _mm512_shuffle_f32x4(low2, high2, 0xDD);
  }
}
inline float reduce_add(Vec a) { return _mm512_reduce_add_ps(a.v); }
inline float reduce_max(Vec a) { return _mm512_reduce_max_ps(a.v); }

inline Vec load(const float* p) { return _mm512_loadu_ps(p); }
inline Vec load(const float* p, int n) { return _mm512_maskz_loadu_ps(first_lanes(n), p); }
inline void store(float* p, Vec a) { _mm512_storeu_ps(p, a.v); }
inline void store(float* p, Vec a, int n) { _mm512_mask_storeu_ps(p, first_lanes(n), a.v); }

inline Vec widen(__m256i bits) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
#if IMF_ISA_LEVEL >= 4
inline __m256i narrow(Vec a) { return (__m256i)_mm512_cvtneps_pbh(a.v); }
#else
inline __m256i narrow(Vec a) {
  const __m512i x = _mm512_castps_si512(a.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(x, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(x, _mm512_set1_epi32(0x7fff)), odd);
  rounded = _mm512_srli_epi32(rounded, 16);
  const __mmask16 is_nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(rounded, is_nan, _mm512_set1_epi32(0x7fc0)));
}
#endif
inline Vec load(const bfloat16* p) { return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
inline Vec load(const bfloat16* p, int n) { return widen(_mm256_maskz_loadu_epi16(first_lanes(n), p)); }
inline void store(bfloat16* p, Vec a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(a)); }
inline void store(bfloat16* p, Vec a, int n) { _mm256_mask_storeu_epi16(p, first_lanes(n), narrow(a)); }

#elif IMF_ISA_LEVEL == 2 && defined(IMF_X86)  // AVX2 and FMA

struct Vec {
  static constexpr int width = 8;
  __m256 v;
  Vec() = default;
  Vec(__m256 x) : v(x) {}
  explicit Vec(float x) : v(_mm256_set1_ps(x)) {}
};

inline __m256i first_lanes(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

inline Vec operator+(Vec a, Vec b) { return _mm256_add_ps(a.v, b.v); }
inline Vec operator-(Vec a, Vec b) { return _mm256_sub_ps(a.v, b.v); }
inline Vec operator*(Vec a, Vec b) { return _mm256_mul_ps(a.v, b.v); }
inline Vec operator/(Vec a, Vec b) { return _mm256_div_ps(a.v, b.v); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a.v, b.v, c.v); }
inline Vec sqrt(Vec a) { return _mm256_sqrt_ps(a.v); }
inline Vec abs(Vec a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v); }
inline Vec max(Vec a, Vec b) { return _mm256_max_ps(a.v, b.v); }  // b where either is NaN
inline Vec min(Vec a, Vec b) { return _mm256_min_ps(a.v, b.v); }
inline Vec round(Vec a) { return _mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
// n integral in [-126, 128]; in two halves, so that 2^128 itself need not be representable
inline Vec scale_by_power_of_two(Vec a, Vec n) {
  const __m256i whole = _mm256_cvtps_epi32(n.v);
  const __m256i half = _mm256_srai_epi32(whole, 1);
  const auto power = [](__m256i e) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(e, _mm256_set1_epi32(127)), 23));
  };
  return _mm256_mul_ps(_mm256_mul_ps(a.v, power(half)), power(_mm256_sub_epi32(whole, half)));
}
inline Vec select_less(Vec a, Vec b, Vec yes, Vec no) {
  return _mm256_blendv_ps(no.v, yes.v, _mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ));
}
inline Vec keep(Vec a, int n, float other) {
  return _mm256_blendv_ps(_mm256_set1_ps(other), a.v, _mm256_castsi256_ps(first_lanes(n)));
}
inline Vec swap_pairs(Vec a) { return _mm256_permute_ps(a.v, 0xB1); }
inline Vec duplicate_lower(Vec a) {  // lanes 0 0 1 1 2 2 ...
  return _mm256_permutevar8x32_ps(a.v, _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3));
}
// Transposes the 8 x 8 matrix whose rows are a[0] ... a[7]: pairs, fours, then halves of rows.
inline void transpose(Vec (&a)[8]) {
  __m256 t[8], f[8];
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(a[i].v, a[i + 1].v);
    t[i + 1] = _mm256_unpackhi_ps(a[i].v, a[i + 1].v);
  }
  for (int i = 0; i < 8; i += 4) {
    f[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
    f[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xEE);
    f[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    f[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xEE);
  }
  for (int j = 0; j < 4; ++j) {
    a[j] = _mm256_permute2f128_ps(f[j], f[4 + j], 0x20);
    a[4 + j] = _mm256_permute2f128_ps(f[j], f[4 + j], 0x31);
  }
}
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

inline Vec load(const float* p) { return _mm256_loadu_ps(p); }
inline Vec load(const float* p, int n) { return _mm256_maskload_ps(p, first_lanes(n)); }
inline void store(float* p, Vec a) { _mm256_storeu_ps(p, a.v); }
inline void store(float* p, Vec a, int n) { _mm256_maskstore_ps(p, first_lanes(n), a.v); }

inline Vec widen(__m128i bits) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
inline __m128i narrow(Vec a) {
  const __m256i x = _mm256_castps_si256(a.v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(x, 16), _mm256_set1_epi32(1));
  __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(x, _mm256_set1_epi32(0x7fff)), odd);
  rounded = _mm256_srli_epi32(rounded, 16);
  const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q));
  rounded = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), is_nan);
  return _mm_packus_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
}
inline Vec load(const bfloat16* p) { return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
inline Vec load(const bfloat16* p, int n) {
  alignas(16) bfloat16 buffer[8] = {};
  std::memcpy(buffer, p, static_cast<std::size_t>(n) * sizeof(bfloat16));
  return load(buffer);
}
inline void store(bfloat16* p, Vec a) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow(a)); }
inline void store(bfloat16* p, Vec a, int n) {
  alignas(16) bfloat16 buffer[8];
  store(buffer, a);
  std::memcpy(p, buffer, static_cast<std::size_t>(n) * sizeof(bfloat16));
}

#elif IMF_ISA_LEVEL == 2  // NEON, which every 64-bit ARM processor has, with FMA

struct Vec {
  static constexpr int width = 4;
  float32x4_t v;
  Vec() = default;
  Vec(float32x4_t x) : v(x) {}
  explicit Vec(float x) : v(vdupq_n_f32(x)) {}
};

inline Vec operator+(Vec a, Vec b) { return vaddq_f32(a.v, b.v); }
inline Vec operator-(Vec a, Vec b) { return vsubq_f32(a.v, b.v); }
inline Vec operator*(Vec a, Vec b) { return vmulq_f32(a.v, b.v); }
inline Vec operator/(Vec a, Vec b) { return vdivq_f32(a.v, b.v); }
inline Vec fma(Vec a, Vec b, Vec c) { return vfmaq_f32(c.v, a.v, b.v); }
inline Vec sqrt(Vec a) { return vsqrtq_f32(a.v); }
inline Vec abs(Vec a) { return vabsq_f32(a.v); }
// b where either is NaN; the processor's own maximum and minimum would be NaN.
inline Vec max(Vec a, Vec b) { return vbslq_f32(vcgtq_f32(a.v, b.v), a.v, b.v); }
inline Vec min(Vec a, Vec b) { return vbslq_f32(vcltq_f32(a.v, b.v), a.v, b.v); }
inline Vec round(Vec a) { return vrndnq_f32(a.v); }
// n integral in [-126, 128]; in two halves, so that 2^128 itself need not be representable
inline Vec scale_by_power_of_two(Vec a, Vec n) {
  const int32x4_t whole = vcvtnq_s32_f32(n.v);
  const int32x4_t half = vshrq_n_s32(whole, 1);
  const auto power = [](int32x4_t e) {
    return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(e, vdupq_n_s32(127)), 23));
  };
  return vmulq_f32(vmulq_f32(a.v, power(half)), power(vsubq_s32(whole, half)));
}
inline Vec select_less(Vec a, Vec b, Vec yes, Vec no) { return vbslq_f32(vcltq_f32(a.v, b.v), yes.v, no.v); }
inline Vec keep(Vec a, int n, float other) {
  static constexpr std::int32_t lanes[4] = {0, 1, 2, 3};
  return vbslq_f32(vcltq_s32(vld1q_s32(lanes), vdupq_n_s32(n)), a.v, vdupq_n_f32(other));
}
inline Vec swap_pairs(Vec a) { return vrev64q_f32(a.v); }
inline Vec duplicate_lower(Vec a) { return vzip1q_f32(a.v, a.v); }  // lanes 0 0 1 1
// Transposes the 4 x 4 matrix whose rows are a[0] ... a[3]: pairs, then halves of rows.
inline void transpose(Vec (&a)[4]) {
  float64x2_t t[4];
  for (int i = 0; i < 4; i += 2) {
    t[i] = vreinterpretq_f64_f32(vtrn1q_f32(a[i].v, a[i + 1].v));
    t[i + 1] = vreinterpretq_f64_f32(vtrn2q_f32(a[i].v, a[i + 1].v));
  }
  for (int j = 0; j < 2; ++j) {
    a[j] = vreinterpretq_f32_f64(vzip1q_f64(t[j], t[2 + j]));
    a[2 + j] = vreinterpretq_f32_f64(vzip2q_f64(t[j], t[2 + j]));
  }
}
inline float reduce_add(Vec a) { return vaddvq_f32(a.v); }
inline float reduce_max(Vec a) { return vmaxvq_f32(a.v); }

inline Vec load(const float* p) { return vld1q_f32(p); }
inline Vec load(const float* p, int n) {
  float32x4_t x = vdupq_n_f32(0.0f);
  if (n > 0) x = vld1q_lane_f32(p, x, 0);
  if (n > 1) x = vld1q_lane_f32(p + 1, x, 1);
  if (n > 2) x = vld1q_lane_f32(p + 2, x, 2);
  if (n > 3) x = vld1q_lane_f32(p + 3, x, 3);
  return x;
}
inline void store(float* p, Vec a) { vst1q_f32(p, a.v); }
inline void store(float* p, Vec a, int n) {
  if (n > 0) vst1q_lane_f32(p, a.v, 0);
  if (n > 1) vst1q_lane_f32(p + 1, a.v, 1);
  if (n > 2) vst1q_lane_f32(p + 2, a.v, 2);
  if (n > 3) vst1q_lane_f32(p + 3, a.v, 3);
}

inline Vec widen(uint16x4_t bits) { return vreinterpretq_f32_u32(vshlq_n_u32(vmovl_u16(bits), 16)); }
inline uint16x4_t narrow(Vec a) {
  const uint32x4_t x = vreinterpretq_u32_f32(a.v);
  const uint32x4_t odd = vandq_u32(vshrq_n_u32(x, 16), vdupq_n_u32(1));
  const uint16x4_t rounded = vshrn_n_u32(vaddq_u32(vaddq_u32(x, vdupq_n_u32(0x7fff)), odd), 16);
  const uint16x4_t is_number = vmovn_u32(vceqq_f32(a.v, a.v));
  return vbsl_u16(is_number, rounded, vdup_n_u16(0x7fc0));
}
inline Vec load(const bfloat16* p) { return widen(vld1_u16(&p->bits)); }
inline Vec load(const bfloat16* p, int n) {
  uint16x4_t x = vdup_n_u16(0);
  if (n > 0) x = vld1_lane_u16(&p[0].bits, x, 0);
  if (n > 1) x = vld1_lane_u16(&p[1].bits, x, 1);
  if (n > 2) x = vld1_lane_u16(&p[2].bits, x, 2);
  if (n > 3) x = vld1_lane_u16(&p[3].bits, x, 3);
  return widen(x);
}
inline void store(bfloat16* p, Vec a) { vst1_u16(&p->bits, narrow(a)); }
inline void store(bfloat16* p, Vec a, int n) {
  const uint16x4_t x = narrow(a);
  if (n > 0) vst1_lane_u16(&p[0].bits, x, 0);
  if (n > 1) vst1_lane_u16(&p[1].bits, x, 1);
  if (n > 2) vst1_lane_u16(&p[2].bits, x, 2);
  if (n > 3) vst1_lane_u16(&p[3].bits, x, 3);
}

#else  // plain C++: four lanes that any compiler turns into what the processor has

struct Vec {
  static constexpr int width = 4;
  float v[4];
  Vec() = default;
  explicit Vec(float x) : v{x, x, x, x} {}
};

template <typename F>
inline Vec each_lane(F f) {
  Vec r;
  for (int i = 0; i < Vec::width; ++i) r.v[i] = f(i);
  return r;
}

inline Vec operator+(Vec a, Vec b) {
  return each_lane([&](int i) { return a.v[i] + b.v[i]; });
}
inline Vec operator-(Vec a, Vec b) {
  return each_lane([&](int i) { return a.v[i] - b.v[i]; });
}
inline Vec operator*(Vec a, Vec b) {
  return each_lane([&](int i) { return a.v[i] * b.v[i]; });
}
inline Vec operator/(Vec a, Vec b) {
  return each_lane([&](int i) { return a.v[i] / b.v[i]; });
}
// Rounded twice where the processor has no FMA; ::fmaf in software would be ten times slower.
inline Vec fma(Vec a, Vec b, Vec c) {
  return each_lane([&](int i) { return a.v[i] * b.v[i] + c.v[i]; });
}
inline Vec sqrt(Vec a) {
  return each_lane([&](int i) { return ::sqrtf(a.v[i]); });
}
inline Vec abs(Vec a) {
  return each_lane([&](int i) { return ::fabsf(a.v[i]); });
}
inline Vec max(Vec a, Vec b) {
  return each_lane([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
inline Vec min(Vec a, Vec b) {
  return each_lane([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
}
// Adding and taking away 1.5 * 2^23 leaves the nearest integer for |x| < 2^22.
inline Vec round(Vec a) {
  return each_lane([&](int i) {
    volatile float shifted = a.v[i] + 12582912.0f;
    return shifted - 12582912.0f;
  });
}
inline Vec scale_by_power_of_two(Vec a, Vec n) {
  return each_lane([&](int i) {
    const auto power = [](int e) {
      const std::uint32_t bits = static_cast<std::uint32_t>(e + 127) << 23;
      float x;
      std::memcpy(&x, &bits, sizeof x);
      return x;
    };
    // NaN lanes carry any exponent: a NaN times anything stays NaN.
    const int whole = n.v[i] >= -126.0f && n.v[i] <= 128.0f ? static_cast<int>(n.v[i]) : 0;
    const int half = whole >> 1;
    return a.v[i] * power(half) * power(whole - half);
  });
}
inline Vec select_less(Vec a, Vec b, Vec yes, Vec no) {
  return each_lane([&](int i) { return a.v[i] < b.v[i] ? yes.v[i] : no.v[i]; });
}
inline Vec keep(Vec a, int n, float other) {
  return each_lane([&](int i) { return i < n ? a.v[i] : other; });
}
inline Vec swap_pairs(Vec a) {
  return each_lane([&](int i) { return a.v[i ^ 1]; });
}
inline Vec duplicate_lower(Vec a) {
  return each_lane([&](int i) { return a.v[i / 2]; });
}
inline void transpose(Vec (&a)[4]) {
  for (int i = 0; i < 4; ++i) {
    for (int j = 0; j < i; ++j) {
      const float swapped = a[i].v[j];
      a[i].v[j] = a[j].v[i];
      a[j].v[i] = swapped;
    }
  }
}
inline float reduce_add(Vec a) { return (a.v[0] + a.v[2]) + (a.v[1] + a.v[3]); }
inline float reduce_max(Vec a) {
  const auto larger = [](float x, float y) { return x > y ? x : y; };
  return larger(larger(a.v[0], a.v[2]), larger(a.v[1], a.v[3]));
}

template <typename T>
inline Vec load(const T* p) {
  return each_lane([&](int i) { return to_float(p[i]); });
}
template <typename T>
inline Vec load(const T* p, int n) {
  return each_lane([&](int i) { return i < n ? to_float(p[i]) : 0.0f; });
}
inline void store(float* p, Vec a, int n = Vec::width) {
  for (int i = 0; i < n; ++i) p[i] = a.v[i];
}
inline void store(bfloat16* p, Vec a, int n = Vec::width) {
  for (int i = 0; i < n; ++i) p[i] = to_bfloat16(a.v[i]);
}

#endif

// Prefetches data of the next row; the hardware itself prefetches streams without gaps.
inline void prefetch(const void* p) { __builtin_prefetch(p); }

inline Vec& operator+=(Vec& a, Vec b) { return a = a + b; }

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
// Contract, enforced by tests/test_vec.py: relative error of the distribution at most 3 ulp for x >= 0 and 3
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

// Elements with their tangents.
template <typename T>
inline Dual<Vec> load_dual(const T* primal, const T* tangent, int lanes) {
  return {load_lanes(primal, lanes), load_lanes(tangent, lanes)};
}
template <typename T>
inline void store_dual(T* primal, T* tangent, Dual<Vec> a, int lanes) {
  store_lanes(primal, a.primal, lanes);
  store_lanes(tangent, a.tangent, lanes);
}
inline Dual<Vec> keep_lanes(Dual<Vec> a, int lanes, float other) {
  return {keep_lanes(a.primal, lanes, other), keep_lanes(a.tangent, lanes, other)};
}
inline Dual<float> reduce_add(Dual<Vec> a) { return {reduce_add(a.primal), reduce_add(a.tangent)}; }
inline Vec broadcast(float x) { return Vec(x); }
inline Dual<Vec> broadcast(Dual<float> x) { return {Vec(x.primal), Vec(x.tangent)}; }

}  // namespace
}  // namespace imf::IMF_ISA

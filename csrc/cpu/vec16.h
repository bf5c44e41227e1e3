// Sixteen floats in the widest registers that the including file is compiled for. Every version has
// the same lanes, so a sum has the same order on all of them. Include inside no namespace.
#pragma once

#include <cstring>
#include <limits>

#include "../common/logit_types.h"

// GCC 12 takes the undefined lanes inside its own AVX-512 header for a mistake (GCC bug 105593).
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#if defined(__AVX512F__) && defined(__AVX512BW__)
#define MRL_VEC_AVX512 1
#include <immintrin.h>
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define MRL_VEC_AVX2 1
#include <immintrin.h>
#endif

#define MRL_INLINE inline __attribute__((always_inline))

// Minimax polynomial of 2^f for |f| <= 1/2, relative error 1.9e-9; exactly 1 at 0.
#define MRL_EXP2_FIRST 0.00015345799329224974f
#define MRL_EXP2_REST(APPLY)    \
  APPLY(0.0013399930903688073f) \
  APPLY(0.009618489071726799f)  \
  APPLY(0.05550328642129898f)   \
  APPLY(0.24022646248340607f)   \
  APPLY(0.6931471824645996f)    \
  APPLY(1.0f)

namespace megatron_rl {
namespace {

constexpr int kLanes = 16;

#if defined(MRL_VEC_AVX512)

constexpr float kExp2Floor = -150.f;  // exp2 is 0 here

struct Vec16 {
  __m512 v;

  static MRL_INLINE Vec16 all(float x) { return {_mm512_set1_ps(x)}; }
  static MRL_INLINE Vec16 load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static MRL_INLINE Vec16 load(const Bf16* p) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16))};
  }
  static MRL_INLINE Vec16 load(const Fp16* p) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
  }
  MRL_INLINE void store(float* p) const { _mm512_storeu_ps(p, v); }
  MRL_INLINE void store(Bf16* p) const {
    const __m512i word = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(word, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(word, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    rounded = _mm512_srli_epi32(rounded, 16);
    const __mmask16 is_nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    rounded = _mm512_mask_mov_epi32(rounded, is_nan, _mm512_set1_epi32(0x7fc0));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(rounded));
  }
  MRL_INLINE void store(Fp16* p) const {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }
};

MRL_INLINE Vec16 operator+(Vec16 a, Vec16 b) { return {_mm512_add_ps(a.v, b.v)}; }
MRL_INLINE Vec16 operator-(Vec16 a, Vec16 b) { return {_mm512_sub_ps(a.v, b.v)}; }
MRL_INLINE Vec16 operator*(Vec16 a, Vec16 b) { return {_mm512_mul_ps(a.v, b.v)}; }
MRL_INLINE Vec16 operator/(Vec16 a, Vec16 b) { return {_mm512_div_ps(a.v, b.v)}; }
MRL_INLINE Vec16 fma(Vec16 a, Vec16 b, Vec16 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
// The second operand wins where either is NaN.
MRL_INLINE Vec16 max(Vec16 a, Vec16 b) { return {_mm512_max_ps(a.v, b.v)}; }
MRL_INLINE Vec16 exp2(Vec16 x) {
  const __m512 whole = _mm512_roundscale_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 f = _mm512_sub_ps(x.v, whole);
  __m512 y = _mm512_set1_ps(MRL_EXP2_FIRST);
#define MRL_HORNER(C) y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(C));
  MRL_EXP2_REST(MRL_HORNER)
#undef MRL_HORNER
  return {_mm512_scalef_ps(y, whole)};
}

#elif defined(MRL_VEC_AVX2)

constexpr float kExp2Floor = -127.f;  // exp2 is 0 here

struct Vec16 {
  __m256 lo, hi;

  static MRL_INLINE Vec16 all(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
  static MRL_INLINE Vec16 load(const float* p) {
    return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)};
  }
  static MRL_INLINE __m128i half(const void* p, int part) {
    return _mm_loadu_si128(static_cast<const __m128i*>(p) + part);
  }
  static MRL_INLINE __m256 widen8(__m128i bits) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
  }
  static MRL_INLINE Vec16 load(const Bf16* p) { return {widen8(half(p, 0)), widen8(half(p, 1))}; }
  static MRL_INLINE Vec16 load(const Fp16* p) {
    return {_mm256_cvtph_ps(half(p, 0)), _mm256_cvtph_ps(half(p, 1))};
  }
  MRL_INLINE void store(float* p) const {
    _mm256_storeu_ps(p, lo);
    _mm256_storeu_ps(p + 8, hi);
  }
  static MRL_INLINE __m256i narrow8(__m256 x) {
    const __m256i word = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(word, 16), _mm256_set1_epi32(1));
    __m256i rounded = _mm256_add_epi32(word, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    rounded = _mm256_srli_epi32(rounded, 16);
    const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    return _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), is_nan);
  }
  MRL_INLINE void store(Bf16* p) const {
    const __m256i packed = _mm256_packus_epi32(narrow8(lo), narrow8(hi));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(packed, 0xd8));
  }
  MRL_INLINE void store(Fp16* p) const {
    __m128i* out = reinterpret_cast<__m128i*>(p);
    _mm_storeu_si128(out, _mm256_cvtps_ph(lo, _MM_FROUND_TO_NEAREST_INT));
    _mm_storeu_si128(out + 1, _mm256_cvtps_ph(hi, _MM_FROUND_TO_NEAREST_INT));
  }
};

MRL_INLINE Vec16 operator+(Vec16 a, Vec16 b) {
  return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)};
}
MRL_INLINE Vec16 operator-(Vec16 a, Vec16 b) {
  return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)};
}
MRL_INLINE Vec16 operator*(Vec16 a, Vec16 b) {
  return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)};
}
MRL_INLINE Vec16 operator/(Vec16 a, Vec16 b) {
  return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)};
}
MRL_INLINE Vec16 fma(Vec16 a, Vec16 b, Vec16 c) {
  return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
// The second operand wins where either is NaN.
MRL_INLINE Vec16 max(Vec16 a, Vec16 b) {
  return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)};
}
MRL_INLINE __m256 exp2_of_8(__m256 x) {
  const __m256 whole = _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m256 f = _mm256_sub_ps(x, whole);
  __m256 y = _mm256_set1_ps(MRL_EXP2_FIRST);
#define MRL_HORNER(C) y = _mm256_fmadd_ps(y, f, _mm256_set1_ps(C));
  MRL_EXP2_REST(MRL_HORNER)
#undef MRL_HORNER
  const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(whole), _mm256_set1_epi32(127));
  return _mm256_mul_ps(y, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
}
MRL_INLINE Vec16 exp2(Vec16 x) { return {exp2_of_8(x.lo), exp2_of_8(x.hi)}; }

#else

constexpr float kExp2Floor = -127.f;  // exp2 is 0 here

// Plain loops over lanes, which compilers vectorise for what they target.
struct Vec16 {
  float v[kLanes];

  template <typename Fn>
  static MRL_INLINE Vec16 each(Fn fn) {
    Vec16 result;
    for (int i = 0; i < kLanes; ++i) result.v[i] = fn(i);
    return result;
  }
  static MRL_INLINE Vec16 all(float x) {
    return each([&](int) { return x; });
  }
  template <typename logit_t>
  static MRL_INLINE Vec16 load(const logit_t* p) {
    return each([&](int i) { return widen(p[i]); });
  }
  template <typename logit_t>
  MRL_INLINE void store(logit_t* p) const {
    for (int i = 0; i < kLanes; ++i) p[i] = Narrow<logit_t>::from(v[i]);
  }
};

MRL_INLINE Vec16 operator+(const Vec16& a, const Vec16& b) {
  return Vec16::each([&](int i) { return a.v[i] + b.v[i]; });
}
MRL_INLINE Vec16 operator-(const Vec16& a, const Vec16& b) {
  return Vec16::each([&](int i) { return a.v[i] - b.v[i]; });
}
MRL_INLINE Vec16 operator*(const Vec16& a, const Vec16& b) {
  return Vec16::each([&](int i) { return a.v[i] * b.v[i]; });
}
MRL_INLINE Vec16 operator/(const Vec16& a, const Vec16& b) {
  return Vec16::each([&](int i) { return a.v[i] / b.v[i]; });
}
// Not fused where the target has no such instruction: a library call per lane would be slow.
MRL_INLINE Vec16 fma(const Vec16& a, const Vec16& b, const Vec16& c) {
  return Vec16::each([&](int i) { return a.v[i] * b.v[i] + c.v[i]; });
}
// The second operand wins where either is NaN.
MRL_INLINE Vec16 max(const Vec16& a, const Vec16& b) {
  return Vec16::each([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
MRL_INLINE Vec16 exp2(const Vec16& x) {
  return Vec16::each([&](int i) {
    constexpr float kRounder = 12582912.f;  // 1.5 * 2^23: adding it leaves no fraction
    const float shifted = x.v[i] + kRounder;
    const float f = x.v[i] - (shifted - kRounder);
    float y = MRL_EXP2_FIRST;
#define MRL_HORNER(C) y = y * f + C;
    MRL_EXP2_REST(MRL_HORNER)
#undef MRL_HORNER
    const uint32_t exponent = bits::as_word(shifted) - bits::as_word(kRounder) + 127u;
    return y * bits::as_float(exponent << 23);
  });
}

#endif

// In a fixed tree.
template <typename Fn>
MRL_INLINE float fold(Vec16 x, Fn fn) {
  float lane[kLanes];
  x.store(lane);
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lane[i] = fn(lane[i], lane[i + width]);
  }
  return lane[0];
}

#if defined(MRL_VEC_AVX512) || defined(MRL_VEC_AVX2)
MRL_INLINE __m256 halves_sum(Vec16 x) {
#if defined(MRL_VEC_AVX512)
  const __m512 swapped = _mm512_shuffle_f32x4(x.v, x.v, _MM_SHUFFLE(1, 0, 3, 2));
  return _mm512_castps512_ps256(_mm512_add_ps(x.v, swapped));
#else
  return _mm256_add_ps(x.lo, x.hi);
#endif
}
// The tree of fold, without a way through memory.
MRL_INLINE float sum(Vec16 x) {
  const __m256 eight = halves_sum(x);
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
}
#else
MRL_INLINE float sum(Vec16 x) {
  return fold(x, [](float a, float b) { return a + b; });
}
#endif
// Up to kLanes floats; zeros in the place of what is missing.
MRL_INLINE Vec16 load_some(const float* from, int count) {
  if (count >= kLanes) return Vec16::load(from);
  float lane[kLanes] = {};
  std::memcpy(lane, from, sizeof(float) * count);
  return Vec16::load(lane);
}

MRL_INLINE void store_some(Vec16 x, float* to, int count) {
  if (count >= kLanes) return x.store(to);
  float lane[kLanes];
  x.store(lane);
  std::memcpy(to, lane, sizeof(float) * count);
}

MRL_INLINE float max(Vec16 x) {
  return fold(x, [](float a, float b) { return a > b ? a : b; });
}

}  // namespace
}  // namespace megatron_rl

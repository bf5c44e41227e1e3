// Sixteen words of 32 bits, beside vec16.h. Include inside no namespace.
#pragma once

#include "vec16.h"

namespace megatron_rl {
namespace {

#if defined(MRL_VEC_AVX512)

struct Word16 {
  __m512i v;

  static MRL_INLINE Word16 all(uint32_t x) { return {_mm512_set1_epi32(static_cast<int>(x))}; }
  static MRL_INLINE Word16 from(uint32_t first) {
    const __m512i steps = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return {_mm512_add_epi32(all(first).v, steps)};
  }
};

MRL_INLINE Word16 operator^(Word16 a, Word16 b) { return {_mm512_xor_si512(a.v, b.v)}; }

// The high and the low halves of products of 64 bits.
MRL_INLINE void multiply(Word16 a, Word16 b, Word16& high, Word16& low) {
  const __m512i even = _mm512_mul_epu32(a.v, b.v);
  const __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64(a.v, 32), b.v);
  low = {_mm512_mask_blend_epi32(0xaaaa, even, _mm512_slli_epi64(odd, 32))};
  high = {_mm512_mask_blend_epi32(0xaaaa, _mm512_srli_epi64(even, 32), odd)};
}

// out [64]: a, b, c and d of the first one, then those of the second.
MRL_INLINE void store_by_turns(Word16 a, Word16 b, Word16 c, Word16 d, uint32_t* out) {
  const __m512i ab_low = _mm512_unpacklo_epi32(a.v, b.v), cd_low = _mm512_unpacklo_epi32(c.v, d.v);
  const __m512i ab_high = _mm512_unpackhi_epi32(a.v, b.v);
  const __m512i cd_high = _mm512_unpackhi_epi32(c.v, d.v);
  const __m512i row[4] = {
      _mm512_unpacklo_epi64(ab_low, cd_low), _mm512_unpackhi_epi64(ab_low, cd_low),
      _mm512_unpacklo_epi64(ab_high, cd_high), _mm512_unpackhi_epi64(ab_high, cd_high)};
  for (int i = 0; i < 4; ++i) {
    __m128i* target = reinterpret_cast<__m128i*>(out) + i;
    _mm_storeu_si128(target, _mm512_extracti32x4_epi32(row[i], 0));
    _mm_storeu_si128(target + 4, _mm512_extracti32x4_epi32(row[i], 1));
    _mm_storeu_si128(target + 8, _mm512_extracti32x4_epi32(row[i], 2));
    _mm_storeu_si128(target + 12, _mm512_extracti32x4_epi32(row[i], 3));
  }
}

#elif defined(MRL_VEC_AVX2)

struct Word16 {
  __m256i lo, hi;

  static MRL_INLINE Word16 all(uint32_t x) {
    return {_mm256_set1_epi32(static_cast<int>(x)), _mm256_set1_epi32(static_cast<int>(x))};
  }
  static MRL_INLINE Word16 from(uint32_t first) {
    const __m256i steps = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return {_mm256_add_epi32(all(first).lo, steps), _mm256_add_epi32(all(first + 8).lo, steps)};
  }
};

MRL_INLINE Word16 operator^(Word16 a, Word16 b) {
  return {_mm256_xor_si256(a.lo, b.lo), _mm256_xor_si256(a.hi, b.hi)};
}

MRL_INLINE void multiply_8(__m256i a, __m256i b, __m256i& high, __m256i& low) {
  const __m256i even = _mm256_mul_epu32(a, b);
  const __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64(a, 32), b);
  low = _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa);
  high = _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa);
}

// The high and the low halves of products of 64 bits.
MRL_INLINE void multiply(Word16 a, Word16 b, Word16& high, Word16& low) {
  multiply_8(a.lo, b.lo, high.lo, low.lo);
  multiply_8(a.hi, b.hi, high.hi, low.hi);
}

MRL_INLINE void store_8_by_turns(__m256i a, __m256i b, __m256i c, __m256i d, uint32_t* out) {
  const __m256i ab_low = _mm256_unpacklo_epi32(a, b), cd_low = _mm256_unpacklo_epi32(c, d);
  const __m256i ab_high = _mm256_unpackhi_epi32(a, b), cd_high = _mm256_unpackhi_epi32(c, d);
  const __m256i row[4] = {
      _mm256_unpacklo_epi64(ab_low, cd_low), _mm256_unpackhi_epi64(ab_low, cd_low),
      _mm256_unpacklo_epi64(ab_high, cd_high), _mm256_unpackhi_epi64(ab_high, cd_high)};
  for (int i = 0; i < 4; ++i) {
    __m128i* target = reinterpret_cast<__m128i*>(out) + i;
    _mm_storeu_si128(target, _mm256_extracti128_si256(row[i], 0));
    _mm_storeu_si128(target + 4, _mm256_extracti128_si256(row[i], 1));
  }
}

// out [64]: a, b, c and d of the first one, then those of the second.
MRL_INLINE void store_by_turns(Word16 a, Word16 b, Word16 c, Word16 d, uint32_t* out) {
  store_8_by_turns(a.lo, b.lo, c.lo, d.lo, out);
  store_8_by_turns(a.hi, b.hi, c.hi, d.hi, out + 32);
}

#else

struct Word16 {
  uint32_t v[kLanes];

  template <typename Fn>
  static MRL_INLINE Word16 each(Fn fn) {
    Word16 result;
    for (int i = 0; i < kLanes; ++i) result.v[i] = fn(i);
    return result;
  }
  static MRL_INLINE Word16 all(uint32_t x) {
    return each([&](int) { return x; });
  }
  static MRL_INLINE Word16 from(uint32_t first) {
    return each([&](int i) { return first + static_cast<uint32_t>(i); });
  }
};

MRL_INLINE Word16 operator^(const Word16& a, const Word16& b) {
  return Word16::each([&](int i) { return a.v[i] ^ b.v[i]; });
}

// The high and the low halves of products of 64 bits.
MRL_INLINE void multiply(const Word16& a, const Word16& b, Word16& high, Word16& low) {
  for (int i = 0; i < kLanes; ++i) {
    const uint64_t product = static_cast<uint64_t>(a.v[i]) * b.v[i];
    high.v[i] = static_cast<uint32_t>(product >> 32);
    low.v[i] = static_cast<uint32_t>(product);
  }
}

// out [64]: a, b, c and d of the first one, then those of the second.
MRL_INLINE void store_by_turns(const Word16& a, const Word16& b, const Word16& c, const Word16& d,
                               uint32_t* out) {
  for (int i = 0; i < kLanes; ++i) {
    out[4 * i] = a.v[i];
    out[4 * i + 1] = b.v[i];
    out[4 * i + 2] = c.v[i];
    out[4 * i + 3] = d.v[i];
  }
}

#endif

}  // namespace
}  // namespace megatron_rl

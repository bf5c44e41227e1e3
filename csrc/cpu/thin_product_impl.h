// Few rows times a large matrix, some columns at a time. Included by one file per instruction set;
// all names are local to it.
#pragma once

#include <type_traits>

#include "vec16.h"

namespace megatron_rl {
namespace {

// What the registers of an instruction set hold: sums of so many rows and vectors of columns.
#if defined(MRL_VEC_AVX512)
constexpr int kTileRows = 8, kTileVectors = 3;
#else
constexpr int kTileRows = 4, kTileVectors = 1;
#endif
constexpr int kTileColumns = kTileVectors * kLanes;

#if defined(MRL_VEC_AVX512)
// Sixteen rows of sixteen floats, `stride` apart, as columns.
MRL_INLINE void transpose(const float* from, int64_t stride, float* to, int64_t to_stride) {
  __m512 a[16], b[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_ps(from + i * stride);
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
  }
  const auto pair = [](__m512 x, __m512 y, bool high) {
    const __m512d u = _mm512_castps_pd(x), v = _mm512_castps_pd(y);
    return _mm512_castpd_ps(high ? _mm512_unpackhi_pd(u, v) : _mm512_unpacklo_pd(u, v));
  };
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {  // a[i + j]: in quarter q, column 4 q + j of rows i to i + 3
    a[i] = pair(b[i], b[i + 2], false);
    a[i + 1] = pair(b[i], b[i + 2], true);
    a[i + 2] = pair(b[i + 1], b[i + 3], false);
    a[i + 3] = pair(b[i + 1], b[i + 3], true);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const __m512 even0 = _mm512_shuffle_f32x4(a[j], a[4 + j], 0x88);
    const __m512 even1 = _mm512_shuffle_f32x4(a[8 + j], a[12 + j], 0x88);
    const __m512 odd0 = _mm512_shuffle_f32x4(a[j], a[4 + j], 0xdd);
    const __m512 odd1 = _mm512_shuffle_f32x4(a[8 + j], a[12 + j], 0xdd);
    _mm512_storeu_ps(to + j * to_stride, _mm512_shuffle_f32x4(even0, even1, 0x88));
    _mm512_storeu_ps(to + (4 + j) * to_stride, _mm512_shuffle_f32x4(odd0, odd1, 0x88));
    _mm512_storeu_ps(to + (8 + j) * to_stride, _mm512_shuffle_f32x4(even0, even1, 0xdd));
    _mm512_storeu_ps(to + (12 + j) * to_stride, _mm512_shuffle_f32x4(odd0, odd1, 0xdd));
  }
}
#endif

// packed[k * kTileColumns + c] = weight[c][k]; zeros in the place of columns that are missing.
inline void pack(const float* weight, int columns, int inner, float* packed) {
  for (int first = 0; first < kTileColumns; first += kLanes) {
    const float* from = weight + int64_t(first) * inner;
    float* to = packed + first;
    int done = 0;
#if defined(MRL_VEC_AVX512)
    for (; first + kLanes <= columns && done + kLanes <= inner; done += kLanes) {
      transpose(from + done, inner, to + done * kTileColumns, kTileColumns);
    }
#endif
    for (int k = done; k < inner; ++k) {
      for (int c = 0; c < kLanes; ++c) {
        to[k * kTileColumns + c] = first + c < columns ? from[int64_t(c) * inner + k] : 0.f;
      }
    }
  }
}

// Every sum is in the order of k, whatever stands beside it.
template <int kRows>
MRL_INLINE void multiply_tile(const float* left, int inner, const float* packed, int columns,
                              float* out, int64_t out_stride, const float* next) {
  Vec16 sums[kRows][kTileVectors];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 3
    for (int v = 0; v < kTileVectors; ++v) sums[r][v] = Vec16::all(0.f);
  }
  for (int k = 0; k < inner; ++k) {
    if (next != nullptr) {
      for (int v = 0; v < kTileVectors; ++v) {
        __builtin_prefetch(next + k * kTileColumns + v * kLanes, 0, 2);
      }
    }
    Vec16 column[kTileVectors];
#pragma GCC unroll 3
    for (int v = 0; v < kTileVectors; ++v) {
      column[v] = Vec16::load(packed + k * kTileColumns + v * kLanes);
    }
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const Vec16 x = Vec16::all(left[int64_t(r) * inner + k]);
#pragma GCC unroll 3
      for (int v = 0; v < kTileVectors; ++v) sums[r][v] = fma(x, column[v], sums[r][v]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 3
    for (int v = 0; v < kTileVectors; ++v) {
      const int count = columns - v * kLanes;
      if (count > 0) store_some(sums[r][v], out + r * out_stride + v * kLanes, count);
    }
  }
}

// out [rows, columns] = left [rows, inner] times weight [columns, inner], transposed. packed: room
// for inner * kMostTileColumns floats.
void multiply_thin(const float* left, int rows, const float* weight, int columns, int inner,
                   float* packed, float* out, int64_t out_stride) {
  for (int c = 0; c < columns; c += kTileColumns) {
    const int count = columns - c < kTileColumns ? columns - c : kTileColumns;
    pack(weight + int64_t(c) * inner, count, inner, packed);
    const bool is_last = columns - c < 2 * kTileColumns;
    const float* next = is_last ? nullptr : weight + int64_t(c + kTileColumns) * inner;
    int r = 0;
    const auto tile = [&](auto size) {
      for (; r + size.value <= rows; r += size.value) {
        multiply_tile<size.value>(left + int64_t(r) * inner, inner, packed, count,
                                  out + r * out_stride + c, out_stride, r == 0 ? next : nullptr);
      }
    };
    tile(std::integral_constant<int, kTileRows>());
    tile(std::integral_constant<int, 4>());
    tile(std::integral_constant<int, 1>());
  }
}

}  // namespace
}  // namespace megatron_rl

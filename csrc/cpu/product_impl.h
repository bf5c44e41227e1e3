// Products of float32 matrices, a few rows and columns of the result at a time in registers.
// Included by one file per instruction set; all names are local to it.
#pragma once

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "layer_kernels.h"
#include "vec16.h"

namespace megatron_rl {
namespace {

// What the registers of an instruction set hold: the sums of so many rows, for so many vectors of
// columns.
#if defined(MRL_VEC_AVX512)
constexpr int kMostVectors = 3;
constexpr int kRowsOf[] = {0, 16, 12, 8};
#else
constexpr int kMostVectors = 1;
constexpr int kRowsOf[] = {0, 4};
#endif
static_assert(kMostVectors * kLanes <= kMostTileColumns);

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

// A run of `count` columns of a matrix [inner, columns], from `from` on.
// packed[k * width + c] = the element k of column c; zeros in the place of columns that are
// missing.
inline void pack_columns(const float* from, int64_t stride_of_k, int64_t stride_of_column,
                         int count, int inner, int width, float* packed) {
  if (stride_of_column == 1) {
    for (int k = 0; k < inner; ++k) {
      std::memcpy(packed + int64_t(k) * width, from + k * stride_of_k, count * sizeof(float));
      std::fill(packed + int64_t(k) * width + count, packed + int64_t(k + 1) * width, 0.f);
    }
    return;
  }
  for (int first = 0; first < width; first += kLanes) {
    const float* column = from + first * stride_of_column;
    float* to = packed + first;
    int done = 0;
#if defined(MRL_VEC_AVX512)
    for (; stride_of_k == 1 && first + kLanes <= count && done + kLanes <= inner; done += kLanes) {
      transpose(column + done, stride_of_column, to + int64_t(done) * width, width);
    }
#endif
    for (int k = done; k < inner; ++k) {
      for (int c = 0; c < kLanes; ++c) {
        const bool is_there = first + c < count;
        to[int64_t(k) * width + c] =
            is_there ? column[c * stride_of_column + k * stride_of_k] : 0.f;
      }
    }
  }
}

// packed[row * inner + k] of rows whose elements of one k are neighbours.
inline void pack_rows(const float* from, int64_t stride_of_k, int rows, int inner, float* packed) {
  int first = 0;
#if defined(MRL_VEC_AVX512)
  for (; first + kLanes <= rows; first += kLanes) {
    int k = 0;
    for (; k + kLanes <= inner; k += kLanes) {
      transpose(from + k * stride_of_k + first, stride_of_k, packed + int64_t(first) * inner + k,
                inner);
    }
    for (; k < inner; ++k) {
      for (int r = first; r < first + kLanes; ++r) {
        packed[int64_t(r) * inner + k] = from[k * stride_of_k + r];
      }
    }
  }
#endif
  for (int k = 0; k < inner; ++k) {
    for (int r = first; r < rows; ++r) packed[int64_t(r) * inner + k] = from[k * stride_of_k + r];
  }
}

// Every sum is in the order of k, whatever stands beside it, and then added to what is there.
template <int kRows, int kVectors>
MRL_INLINE void multiply_tile(const float* left, int64_t left_stride, int inner,
                              const float* packed, int columns, bool adds, float* out,
                              int64_t out_stride, Ahead ahead) {
  Vec16 sums[kRows][kVectors];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 3
    for (int v = 0; v < kVectors; ++v) {
      sums[r][v] = Vec16::all(0.f);
      __builtin_prefetch(out + r * out_stride + v * kLanes, 1, 2);  // for the end
    }
  }
  for (int k = 0; k < inner; ++k) {
    for (int line = 0; line < ahead.lines; ++line) {
      __builtin_prefetch(ahead.from + k * ahead.stride_of_k + line * kLanes, 0, 2);
    }
    Vec16 column[kVectors];
#pragma GCC unroll 3
    for (int v = 0; v < kVectors; ++v) {
      column[v] = Vec16::load(packed + int64_t(k) * kVectors * kLanes + v * kLanes);
    }
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const Vec16 x = Vec16::all(left[r * left_stride + k]);
#pragma GCC unroll 3
      for (int v = 0; v < kVectors; ++v) sums[r][v] = fma(x, column[v], sums[r][v]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 3
    for (int v = 0; v < kVectors; ++v) {
      const int count = columns - v * kLanes;
      if (count <= 0) continue;
      float* to = out + r * out_stride + v * kLanes;
      store_some(adds ? sums[r][v] + load_some(to, count) : sums[r][v], to, count);
    }
  }
}

// A panel of columns of the result, all rows of it.
template <int kVectors>
void multiply_panel(const float* left, int64_t left_stride, int rows, int inner,
                    const float* packed, int columns, bool adds, float* out, int64_t out_stride,
                    Ahead ahead) {
  int r = 0;
  const int share = (ahead.lines * kRowsOf[kVectors] + rows - 1) / rows;  // of a tile
  const auto tile = [&](auto size) {
    for (; r + size.value <= rows; r += size.value) {
      const Ahead now = {ahead.from, ahead.stride_of_k, std::min(share, ahead.lines)};
      ahead.from += now.lines * kLanes;
      ahead.lines -= now.lines;
      multiply_tile<size.value, kVectors>(left + r * left_stride, left_stride, inner, packed,
                                          columns, adds, out + r * out_stride, out_stride, now);
    }
  };
  tile(std::integral_constant<int, kRowsOf[kVectors]>());
  tile(std::integral_constant<int, 4>());
  tile(std::integral_constant<int, 1>());
}

// Columns of the next panel: as many as registers hold, but no few for the last one.
inline int panel_width(int columns) {
  const int vectors = (columns + kLanes - 1) / kLanes;
  if (vectors == kMostVectors + 1) return (vectors + 1) / 2 * kLanes;
  return (vectors < kMostVectors ? vectors : kMostVectors) * kLanes;
}

void multiply(const ProductArgs& args, float* packed) {
  for (int done = 0; done < args.inner; done += kMostInner) {
    const int inner = args.inner - done < kMostInner ? args.inner - done : kMostInner;
    const bool adds = args.adds || done > 0;
    const float* right = args.right + done * args.right_stride_of_k;
    for (int c = 0, width; c < args.columns; c += width) {
      width = panel_width(args.columns - c);
      const int count = args.columns - c < width ? args.columns - c : width;
      const float* from = right + c * args.right_stride_of_column;
      pack_columns(from, args.right_stride_of_k, args.right_stride_of_column, count, inner, width,
                   packed);
      // The next panel, if it is whole, in the order of memory; behind the last what the caller
      // names.
      Ahead ahead = args.columns - c > width ? Ahead{nullptr, 0, 0} : args.ahead;
      if (args.columns - c >= 2 * width) {
        const bool is_in_rows = args.right_stride_of_column == 1;
        ahead = {from + width * args.right_stride_of_column,
                 is_in_rows ? args.right_stride_of_k : width, width / kLanes};
      }
      const auto panel = [&](auto vectors) {
        multiply_panel<vectors.value>(args.left + done, args.left_stride, args.rows, inner, packed,
                                      count, adds, args.out + c, args.out_stride, ahead);
      };
      if (width == kLanes) panel(std::integral_constant<int, 1>());
#if defined(MRL_VEC_AVX512)
      if (width == 2 * kLanes) panel(std::integral_constant<int, 2>());
      if (width == 3 * kLanes) panel(std::integral_constant<int, 3>());
#endif
    }
  }
}

}  // namespace
}  // namespace megatron_rl

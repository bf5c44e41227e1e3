// What the kernels share: 16-byte loads, one-instruction exp2, sums over a block. Everything that
// is to be fused is written as __fmaf_rn; the compiler fuses nothing (-fmad=false), so that two
// kernels that do the same arithmetic have the same bits.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "logit_types.h"

namespace megatron_rl {

constexpr float kLowestFloat = -3.402823466e+38f;
constexpr unsigned kAllLanes = 0xffffffffu;

// 2^x to 2 ulp; 0 below -126.
__device__ __forceinline__ float fast_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// A pack: 16 bytes of a row, which a thread loads and stores at once.
template <typename logit_t>
struct Pack {
  static constexpr int kSize = 16 / sizeof(logit_t);
  uint4 words;

  __device__ __forceinline__ void load(const logit_t* p) {
    words = *reinterpret_cast<const uint4*>(p);
  }
  __device__ __forceinline__ void store(logit_t* p) const { *reinterpret_cast<uint4*>(p) = words; }
  __device__ __forceinline__ void widen_to(float (&x)[kSize]) const {
    const uint32_t word[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) unpack(word[i], &x[i * kSize / 4]);
  }
  __device__ __forceinline__ void narrow_from(const float (&x)[kSize]) {
    words = {pack(&x[0]), pack(&x[kSize / 4]), pack(&x[kSize / 2]), pack(&x[3 * kSize / 4])};
  }

 private:
  static __device__ __forceinline__ void unpack(uint32_t word, float* x) {
    if constexpr (sizeof(logit_t) == 4) {
      x[0] = __uint_as_float(word);
    } else if constexpr (std::is_same_v<logit_t, Bf16>) {
      x[0] = __uint_as_float(word << 16);
      x[1] = __uint_as_float(word & 0xffff0000u);
    } else {
      const float2 both = __half22float2(*reinterpret_cast<const __half2*>(&word));
      x[0] = both.x;
      x[1] = both.y;
    }
  }
  static __device__ __forceinline__ uint32_t pack(const float* x) {
    if constexpr (sizeof(logit_t) == 4) {
      return __float_as_uint(x[0]);
    } else if constexpr (std::is_same_v<logit_t, Bf16>) {
      const __nv_bfloat162 both = __floats2bfloat162_rn(x[0], x[1]);
      return *reinterpret_cast<const uint32_t*>(&both);
    } else {
      const __half2 both = __floats2half2_rn(x[0], x[1]);
      return *reinterpret_cast<const uint32_t*>(&both);
    }
  }
};

// The maximum and the sums of one thread's logits, and after the reductions of a whole row's.
// Exponentials are powers of 2, relative to max.
template <bool kEntropy>
struct OnlineSums {
  float max;  // of unscaled logits; kLowestFloat where there is none
  float sum;
  float weighted;

  static __device__ __forceinline__ OnlineSums empty() { return {kLowestFloat, 0.f, 0.f}; }

  // Adds kSize logits and rescales the sums once; scale is log2(e) over temperature.
  template <int kSize>
  __device__ __forceinline__ void add(const float (&x)[kSize], float scale) {
    float top = max;
#pragma unroll
    for (int i = 0; i < kSize; ++i) top = fmaxf(top, x[i]);
    raise_max(top, scale);
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      const float exponent = (x[i] - max) * scale;
      const float e = fast_exp2(exponent);
      sum += e;
      // 0 times -inf would be NaN.
      if (kEntropy) weighted = __fmaf_rn(e, at_least(exponent, -200.f), weighted);
    }
  }

  __device__ __forceinline__ void raise_max(float top, float scale) {
    const float shift = at_least((max - top) * scale, -200.f);
    const float factor = fast_exp2(shift);
    if (kEntropy) weighted = factor * __fmaf_rn(sum, shift, weighted);
    sum *= factor;
    max = top;
  }

  __device__ __forceinline__ void merge(OnlineSums other, float scale) {
    const float top = fmaxf(max, other.max);
    raise_max(top, scale);
    other.raise_max(top, scale);
    sum += other.sum;
    if (kEntropy) weighted += other.weighted;
  }

  // Adds up over a warp, in a fixed tree; lane 0 has the result.
  __device__ __forceinline__ void fold_warp(float scale) {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) {
      OnlineSums other;
      other.max = __shfl_down_sync(kAllLanes, max, distance);
      other.sum = __shfl_down_sync(kAllLanes, sum, distance);
      other.weighted = kEntropy ? __shfl_down_sync(kAllLanes, weighted, distance) : 0.f;
      merge(other, scale);
    }
  }
};

// Adds up over a block, in a fixed tree; thread 0 has the result. Every thread must call it.
template <bool kEntropy, int kThreads>
__device__ __forceinline__ OnlineSums<kEntropy> fold_block(OnlineSums<kEntropy> mine, float scale) {
  static_assert(kThreads % 32 == 0 && kThreads <= 1024);
  __shared__ OnlineSums<kEntropy> warps[kThreads / 32];
  mine.fold_warp(scale);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = mine;
  __syncthreads();
  if (threadIdx.x < 32) {
    mine = threadIdx.x < kThreads / 32 ? warps[threadIdx.x] : OnlineSums<kEntropy>::empty();
    mine.fold_warp(scale);
  }
  return mine;
}

// Rows that Pack may load and store: all start on 16 bytes and hold whole packs.
template <typename logit_t>
bool is_packable(const logit_t* rows, int64_t row_stride, int num_columns) {
  constexpr int kSize = Pack<logit_t>::kSize;
  return reinterpret_cast<uintptr_t>(rows) % 16 == 0 && row_stride % kSize == 0 &&
         num_columns % kSize == 0;
}

}  // namespace megatron_rl

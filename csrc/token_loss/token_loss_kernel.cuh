#pragma once

#include <cuda_runtime.h>

#include "token_loss.h"

namespace megatron_rl {

constexpr int kTokenThreads = 128;
constexpr int kNumTotals = kNumSums + kNumExtrema;  // first the sums, then the extrema

// What two parts of a batch make together.
__device__ __forceinline__ double combine(int total, double a, double b) {
  return total < kNumSums ? a + b : larger_or_nan(a, b);
}

__device__ __forceinline__ double fold_warp_total(int total, double value) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    value = combine(total, value, __shfl_down_sync(0xffffffffu, value, distance));
  }
  return value;
}

// One thread per token. partial [blocks, kNumTotals] is what each block adds up to.
__global__ void __launch_bounds__(kTokenThreads)
    token_loss_kernel(TokenLossArgs<float> args, double* partial) {
  __shared__ double warps[kNumTotals][kTokenThreads / 32];
  const int64_t t = static_cast<int64_t>(blockIdx.x) * kTokenThreads + threadIdx.x;
  TokenTerms<float> terms = {};
  if (t < args.num_tokens) terms = finish_token(args, t);

  // Reduce: every total over each warp, then over the warps in order.
#pragma unroll
  for (int i = 0; i < kNumTotals; ++i) {
    const float mine = i < kNumSums ? terms.sums[i] : terms.extrema[i - kNumSums];
    const double folded = fold_warp_total(i, static_cast<double>(mine));
    if (threadIdx.x % 32 == 0) warps[i][threadIdx.x / 32] = folded;
  }
  __syncthreads();

  // Store.
  if (threadIdx.x < kNumTotals) {
    double total = warps[threadIdx.x][0];
    for (int warp = 1; warp < kTokenThreads / 32; ++warp) {
      total = combine(threadIdx.x, total, warps[threadIdx.x][warp]);
    }
    partial[static_cast<int64_t>(blockIdx.x) * kNumTotals + threadIdx.x] = total;
  }
}

// One block, one warp per total: the blocks' partial totals, each lane a fixed share of them.
__global__ void __launch_bounds__(kNumTotals * 32)
    token_totals_kernel(TokenLossArgs<float> args, const double* partial, int64_t num_partials) {
  const int total = threadIdx.x / 32;
  double value = 0;
  for (int64_t i = threadIdx.x % 32; i < num_partials; i += 32) {
    value = combine(total, value, partial[i * kNumTotals + total]);
  }
  value = fold_warp_total(total, value);
  if (threadIdx.x % 32 != 0) return;
  if (total < kNumSums) {
    args.sums[total] = value;
  } else {
    args.extrema[total - kNumSums] = value;
  }
  if (total == kLoss) *args.loss = static_cast<float>(value);
}

}  // namespace megatron_rl

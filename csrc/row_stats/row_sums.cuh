// Reading a row of logits on a GPU: by one block, or by a cluster of blocks that keeps it on chip.
#pragma once

#include "../common/device_math.cuh"
#include "row_stats.h"

namespace megatron_rl {

constexpr int kRowThreads = 512;

template <typename logit_t>
__device__ __forceinline__ float scale_of(const LogitRows<logit_t>& rows) {
  return static_cast<float>(rows.inv_temp) * static_cast<float>(kLog2E);
}

template <bool kEntropy>
__device__ __forceinline__ RowRecord<float> record_of(const OnlineSums<kEntropy>& sums,
                                                      float inv_temp, float target) {
  RowRecord<float> record;
  record.max = sums.max == kLowestFloat ? negative_infinity<float>() : sums.max * inv_temp;
  record.sum = sums.sum;
  record.weighted = kEntropy ? sums.weighted * static_cast<float>(kLn2) : 0.f;
  record.target = target;
  return record;
}

// z of the target, or -inf where it is not in this shard.
template <typename logit_t>
__device__ __forceinline__ float scaled_target(const LogitRows<logit_t>& rows, int64_t row) {
  const int column = rows.target_column(row);
  if (column < 0) return negative_infinity<float>();
  return widen(rows.logits[row * rows.row_stride + column]) * static_cast<float>(rows.inv_temp);
}

// Columns from num_valid on count for nothing.
template <int kSize>
__device__ __forceinline__ void forget_padding(float (&x)[kSize], int column, int num_valid) {
  if (column + kSize <= num_valid) return;
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    if (column + i >= num_valid) x[i] = negative_infinity<float>();
  }
}

// One thread's packs of a row: kPacks of them, kStride packs apart, held in registers.
template <typename logit_t, int kPacks, int kStride>
struct HeldRow {
  static constexpr int kSize = Pack<logit_t>::kSize;
  Pack<logit_t> packs[kPacks];

  // first: this thread's first pack.
  __device__ __forceinline__ void load(const logit_t* row, int first, int num_valid) {
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      const int column = (first + i * kStride) * kSize;
      if (column < num_valid) packs[i].load(row + column);
    }
  }

  template <bool kEntropy>
  __device__ __forceinline__ OnlineSums<kEntropy> sums(int first, int num_valid,
                                                       float scale) const {
    auto sums = OnlineSums<kEntropy>::empty();
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      const int column = (first + i * kStride) * kSize;
      if (column >= num_valid) continue;
      float x[kSize];
      packs[i].widen_to(x);
      forget_padding(x, column, num_valid);
      sums.add(x, scale);
    }
    return sums;
  }
};

// Packs that a thread of a cluster holds, so that a row of kClusterPacks * kRowThreads *
// cluster_size packs fits: 163,840 columns of 16-bit logits over 8 blocks.
constexpr int kClusterPacks = 5;
constexpr int kMaxCluster = 8;

// Smallest cluster that holds a row, by its columns alone, so that equal rows are summed alike
// whatever batch they are in; 0 where none does.
template <typename logit_t>
int cluster_for(int num_columns) {
  for (int size = 1; size <= kMaxCluster; size *= 2) {
    if (num_columns <= Pack<logit_t>::kSize * kClusterPacks * kRowThreads * size) return size;
  }
  return 0;
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define MRL_HAS_CLUSTERS 1
#endif

__device__ __forceinline__ void cluster_arrive() {
#if defined(MRL_HAS_CLUSTERS)
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
#endif
}

__device__ __forceinline__ void cluster_wait() {
#if defined(MRL_HAS_CLUSTERS)
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
#endif
}

// The float that another block of the cluster keeps where this one keeps *mine.
__device__ __forceinline__ float read_remote(const float* mine, int rank) {
  float value = 0.f;
#if defined(MRL_HAS_CLUSTERS)
  const uint32_t local = static_cast<uint32_t>(__cvta_generic_to_shared(mine));
  uint32_t remote;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(local), "r"(rank));
  asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(value) : "r"(remote) : "memory");
#endif
  return value;
}

// Sums of a row whose blocks are a cluster, equal in thread 0 of each of them. Every thread of the
// cluster must call it, and wait for the cluster once more before it ends: others read its memory.
template <bool kEntropy, int kCluster>
__device__ __forceinline__ OnlineSums<kEntropy> fold_cluster(OnlineSums<kEntropy> mine,
                                                             float scale) {
  mine = fold_block<kEntropy, kRowThreads>(mine, scale);
  if constexpr (kCluster > 1) {
    __shared__ OnlineSums<kEntropy> block_total;
    if (threadIdx.x == 0) block_total = mine;
    cluster_arrive();
    cluster_wait();
    if (threadIdx.x == 0) {
      mine = OnlineSums<kEntropy>::empty();
      for (int rank = 0; rank < kCluster; ++rank) {
        OnlineSums<kEntropy> block;
        block.max = read_remote(&block_total.max, rank);
        block.sum = read_remote(&block_total.sum, rank);
        block.weighted = kEntropy ? read_remote(&block_total.weighted, rank) : 0.f;
        mine.merge(block, scale);
      }
    }
  }
  return mine;
}

}  // namespace megatron_rl

#pragma once

#include "row_sums.cuh"

namespace megatron_rl {

// One block per row, which it streams: in 16-byte packs if kPacked, else logit by logit.
template <typename logit_t, bool kPacked, bool kEntropy>
__global__ void __launch_bounds__(kRowThreads) row_stats_kernel(RowStatsArgs<logit_t, float> args) {
  const int64_t row = blockIdx.x;
  const auto& rows = args.rows;
  if (args.weights != nullptr && args.weights[row] == 0.f) {
    if (threadIdx.x == 0) args.records[row] = unread_row<float>();
    return;
  }
  const logit_t* logits = rows.logits + row * rows.row_stride;
  const float scale = scale_of(rows);
  auto sums = OnlineSums<kEntropy>::empty();

  // Load: a thread folds its columns.
  if constexpr (kPacked) {
    constexpr int kSize = Pack<logit_t>::kSize;
#pragma unroll 4
    for (int column = threadIdx.x * kSize; column < rows.num_valid; column += kRowThreads * kSize) {
      Pack<logit_t> pack;
      pack.load(logits + column);
      float x[kSize];
      pack.widen_to(x);
      forget_padding(x, column, rows.num_valid);
      sums.add(x, scale);
    }
  } else {
#pragma unroll 4
    for (int column = threadIdx.x; column < rows.num_valid; column += kRowThreads) {
      const float x[1] = {widen(logits[column])};
      sums.add(x, scale);
    }
  }

  // Reduce and store.
  sums = fold_block<kEntropy, kRowThreads>(sums, scale);
  if (threadIdx.x == 0) {
    args.records[row] =
        record_of(sums, static_cast<float>(rows.inv_temp), scaled_target(rows, row));
  }
}

// A cluster of kCluster blocks per row, summed exactly as policy_loss_onepass sums it, so that the
// log-probabilities of both have the same bits.
template <typename logit_t, int kCluster, bool kEntropy>
__global__ void __launch_bounds__(kRowThreads, 2)
    row_stats_cluster_kernel(RowStatsArgs<logit_t, float> args) {
  const int64_t row = blockIdx.x / kCluster;
  const auto& rows = args.rows;
  if (args.weights != nullptr && args.weights[row] == 0.f) {
    if (threadIdx.x == 0 && blockIdx.x % kCluster == 0) args.records[row] = unread_row<float>();
    return;  // all blocks of the cluster return alike, so none waits for another
  }
  const int first = blockIdx.x % kCluster * kRowThreads + threadIdx.x;
  const float scale = scale_of(rows);

  // Load.
  HeldRow<logit_t, kClusterPacks, kCluster * kRowThreads> held;
  held.load(rows.logits + row * rows.row_stride, first, rows.num_valid);

  // Reduce and store.
  auto sums = held.template sums<kEntropy>(first, rows.num_valid, scale);
  sums = fold_cluster<kEntropy, kCluster>(sums, scale);
  if (threadIdx.x == 0 && blockIdx.x % kCluster == 0) {
    args.records[row] =
        record_of(sums, static_cast<float>(rows.inv_temp), scaled_target(rows, row));
  }
  if constexpr (kCluster > 1) {
    cluster_arrive();
    cluster_wait();
  }
}

}  // namespace megatron_rl

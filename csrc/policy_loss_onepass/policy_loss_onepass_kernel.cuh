#pragma once

#include "../dlogits/gradient_lanes.cuh"
#include "../row_stats/row_sums.cuh"
#include "policy_loss_onepass.h"

namespace megatron_rl {

// kCluster blocks per row. The row is read once into registers; when its sums are known, one thread
// of each block works out the loss, and the registers become the gradient.
template <typename logit_t, int kCluster, bool kEntropy>
__global__ void __launch_bounds__(kRowThreads, 2)
    policy_loss_onepass_kernel(OnepassArgs<logit_t, float> args) {
  constexpr int kSize = Pack<logit_t>::kSize;
  constexpr int kStride = kCluster * kRowThreads;
  const int64_t row = blockIdx.x / kCluster;
  const int block = blockIdx.x % kCluster;
  const auto& rows = args.rows;
  logit_t* logits = rows.logits + row * rows.row_stride;
  const int first = block * kRowThreads + threadIdx.x;
  const bool is_read = args.inputs.weights[row] != 0.f;
  const int num_read = is_read ? rows.num_valid : 0;
  const float scale = scale_of(rows);
  __shared__ GradientRow<float> shared_params;

  // Load. The target is read by everyone who needs it before anyone writes.
  HeldRow<logit_t, kClusterPacks, kStride> held;
  held.load(logits, first, num_read);
  RowRecord<float> record = unread_row<float>();
  const float target_logit = threadIdx.x == 0 && is_read ? scaled_target(rows, row) : 0.f;

  // Reduce.
  if (is_read) {  // all blocks of the cluster alike
    auto sums = held.template sums<kEntropy>(first, num_read, scale);
    sums = fold_cluster<kEntropy, kCluster>(sums, scale);
    record = record_of(sums, static_cast<float>(rows.inv_temp), target_logit);
    if constexpr (kCluster > 1) cluster_arrive();
  }
  if (threadIdx.x == 0) {
    shared_params = is_read ? args.gradient(row, record) : GradientRow<float>{};
    if (block == 0) args.records[row] = record;
  }
  __syncthreads();
  const GradientRow<float> params = shared_params;
  const bool is_zero = params.is_zero();
  const int target = rows.target_column(row);
  const GradientOfLogit gradient(params, static_cast<float>(rows.inv_temp));

  // Store.
#pragma unroll
  for (int i = 0; i < kClusterPacks; ++i) {
    const int column = (first + i * kStride) * kSize;
    if (column >= rows.num_columns) continue;
    float x[kSize];
    if (is_zero || column >= num_read) {
#pragma unroll
      for (int j = 0; j < kSize; ++j) x[j] = 0.f;
    } else {
      held.packs[i].widen_to(x);
      forget_padding(x, column, num_read);
#pragma unroll
      for (int j = 0; j < kSize; ++j) {
        x[j] = gradient.at(x[j]) + (column + j == target ? params.c : 0.f);
      }
    }
    held.packs[i].narrow_from(x);
    held.packs[i].store(logits + column);
  }
  if constexpr (kCluster > 1) {
    if (is_read) cluster_wait();
  }
}

}  // namespace megatron_rl

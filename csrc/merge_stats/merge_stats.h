#pragma once

#include <cstdint>

#include "../row_stats/row_record.h"

namespace megatron_rl {

template <typename acc_t>
struct MergeStatsArgs {
  const RowRecord<acc_t>* records;  // [num_shards, T]
  int64_t num_rows;                 // T
  int num_shards;
  acc_t* logprobs;     // [T]
  acc_t* entropy;      // [T]
  acc_t* log_sum_exp;  // [T]

  MRL_HOST_DEVICE void merge(int64_t row) const {
    const MergedRow<acc_t> merged = merge_shards(records + row, num_rows, num_shards);
    logprobs[row] = merged.logprob;
    entropy[row] = merged.entropy;
    log_sum_exp[row] = merged.log_sum_exp;
  }
};

// Returns a cudaError_t.
int launch_merge_stats(const MergeStatsArgs<float>& args, void* stream);

}  // namespace megatron_rl

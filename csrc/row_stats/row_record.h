// The record of a row of logits, which one read of it gives, and how the records of its shards are
// put together.
#pragma once

#include "../common/host_device.h"

namespace megatron_rl {

// z being logits over temperature and e = exp(z - max). The online form of the sum is Milakov &
// Gimelshein 2018, arXiv:1805.02867; `weighted` gives the entropy without cancellation.
template <typename acc_t>
struct RowRecord {
  acc_t max;       // of z; -inf in a row or shard without any token
  acc_t sum;       // of e
  acc_t weighted;  // sum of e * (z - max)
  acc_t target;    // z of the target; -inf in shards that do not own it
};

// A row that was not read: its log-probability and entropy are 0.
template <typename acc_t>
MRL_HOST_DEVICE RowRecord<acc_t> unread_row() {
  return {acc_t(0), acc_t(1), acc_t(0), acc_t(0)};
}

template <typename acc_t>
struct MergedRow {
  acc_t logprob;
  acc_t entropy;
  acc_t log_sum_exp;
};

// Records of one row from shard 0 to the last one; a sum in another order would have other bits.
template <typename acc_t>
MRL_HOST_DEVICE MergedRow<acc_t> merge_shards(const RowRecord<acc_t>* first, int64_t shard_stride,
                                              int num_shards) {
  acc_t max = first->max;
  acc_t target = first->target;
  for (int shard = 1; shard < num_shards; ++shard) {
    max = larger_or_nan(max, first[shard * shard_stride].max);
    target = larger_or_nan(target, first[shard * shard_stride].target);
  }
  acc_t total = 0;
  acc_t weighted = 0;
  for (int shard = 0; shard < num_shards; ++shard) {
    const RowRecord<acc_t> record = first[shard * shard_stride];
    const acc_t shift = at_least(record.max - max, acc_t(kLogZero));
    const acc_t scale = std::exp(shift);
    total = total + scale * record.sum;
    weighted = weighted + scale * (record.weighted + record.sum * shift);
  }
  const acc_t log_total = std::log(total);
  return {target - max - log_total, log_total - weighted / total, max + log_total};
}

}  // namespace megatron_rl

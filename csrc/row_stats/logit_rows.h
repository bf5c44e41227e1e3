// Makes LogitRows of tensors, with the checks that all ops on logits share.
#pragma once

#include "../common/tensors.h"
#include "row_stats.h"

namespace megatron_rl {

inline void check_logits(const Checks& checks, const Tensor& logits, const Tensor& targets,
                         int64_t vocab_start, double inv_temp, bool is_written) {
  checks.rows(logits, "logits", is_written);
  checks.dense(targets, "targets", ScalarType::Long, {logits.size(0)});
  checks.that(vocab_start >= 0, "vocab_start", "at least 0", std::to_string(vocab_start));
  checks.that(inv_temp > 0, "inv_temp", "a positive number", std::to_string(inv_temp));
}

// Checks that each row that carries loss has a token for target. It is done on the CPU only, where
// reading the targets costs no waiting.
template <typename acc_t>
void check_targets(const Checks& checks, const Tensor& targets, const Tensor& weights,
                   int64_t valid_vocab) {
  if (!targets.is_cpu()) return;
  const int64_t* target = input<int64_t>(targets);
  const acc_t* weight = input<acc_t>(weights);
  for (int64_t t = 0; t < targets.numel(); ++t) {
    if (weight[t] == 0 || (target[t] >= 0 && target[t] < valid_vocab)) continue;
    checks.fail("targets",
                "ids in [0, " + std::to_string(valid_vocab) + ") where weights are not 0",
                std::to_string(target[t]) + " in row " + std::to_string(t));
  }
}

template <typename logit_t>
LogitRows<logit_t> logit_rows(const Tensor& logits, const Tensor& targets, int64_t vocab_start,
                              int64_t valid_vocab, double inv_temp) {
  const int64_t num_columns = logits.size(1);
  const int64_t num_valid = std::min(std::max<int64_t>(valid_vocab - vocab_start, 0), num_columns);
  return {static_cast<logit_t*>(const_cast<void*>(logits.const_data_ptr())),
          logits.stride(0),
          input<int64_t>(targets),
          logits.size(0),
          static_cast<int>(num_columns),
          static_cast<int>(num_valid),
          vocab_start,
          inv_temp};
}

}  // namespace megatron_rl

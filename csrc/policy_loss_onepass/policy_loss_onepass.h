#pragma once

#include "../row_stats/row_stats.h"
#include "../token_loss/token_loss.h"

namespace megatron_rl {

// Logits of a whole vocabulary, which become their own gradient while they are on the chip.
template <typename logit_t, typename acc_t>
struct OnepassArgs {
  LogitRows<logit_t> rows;
  RowRecord<acc_t>* records;  // [T], what token_loss then reads
  TokenInputs<acc_t> inputs;
  LossSpec<acc_t> spec;
  acc_t grad_scale;

  // The gradient of a row that has been read.
  MRL_HOST_DEVICE GradientRow<acc_t> gradient(int64_t t, const RowRecord<acc_t>& record) const {
    const MergedRow<acc_t> row = merge_shards(&record, 0, 1);
    const TokenTerms<acc_t> terms = token_terms(inputs.token(t, row.logprob, row.entropy), spec);
    return scaled(gradient_row(row.log_sum_exp, row.entropy, terms.logprob_grad, terms.entropy_grad,
                               static_cast<acc_t>(rows.inv_temp)),
                  grad_scale);
  }
};

}  // namespace megatron_rl

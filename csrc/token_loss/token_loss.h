#pragma once

#include <cstdint>

#include "../dlogits/gradient_row.h"
#include "../row_stats/row_record.h"
#include "token_terms.h"

namespace megatron_rl {

// What the loss needs to know of T tokens apart from their logits; null where not given.
template <typename acc_t>
struct TokenInputs {
  const acc_t* old_logprobs;      // [T]
  const acc_t* ref_logprobs;      // [T]
  const acc_t* rollout_logprobs;  // [T]
  const acc_t* advantages;        // [T]
  const acc_t* weights;           // [T]

  MRL_HOST_DEVICE Token<acc_t> token(int64_t t, acc_t logprob, acc_t entropy) const {
    return {logprob,
            entropy,
            old_logprobs ? old_logprobs[t] : acc_t(0),
            ref_logprobs ? ref_logprobs[t] : acc_t(0),
            rollout_logprobs ? rollout_logprobs[t] : acc_t(0),
            advantages[t],
            weights[t]};
  }
};

template <typename acc_t>
struct TokenLossArgs {
  const RowRecord<acc_t>* records;  // [num_shards, T]
  int64_t num_tokens;               // T
  int num_shards;                   // tensor-parallel ranks
  TokenInputs<acc_t> inputs;
  LossSpec<acc_t> spec;
  acc_t inv_temp;

  acc_t* logprobs;             // [T]
  acc_t* entropy;              // [T]
  GradientRow<acc_t>* params;  // [T]
  acc_t* loss;                 // one number
  double* sums;                // [kNumSums]
  double* extrema;             // [kNumExtrema]
};

// Everything of one token; the metrics are what is added up over tokens. A token of weight 0 has
// log-probability and entropy 0.
template <typename acc_t>
MRL_HOST_DEVICE TokenTerms<acc_t> finish_token(const TokenLossArgs<acc_t>& args, int64_t t) {
  if (args.inputs.weights[t] == 0) {  // and so its record may say anything
    args.logprobs[t] = 0;
    args.entropy[t] = 0;
    args.params[t] = {};
    return {};
  }
  const MergedRow<acc_t> row = merge_shards(args.records + t, args.num_tokens, args.num_shards);
  const TokenTerms<acc_t> terms =
      token_terms(args.inputs.token(t, row.logprob, row.entropy), args.spec);
  args.logprobs[t] = row.logprob;
  args.entropy[t] = row.entropy;
  args.params[t] = gradient_row(row.log_sum_exp, row.entropy, terms.logprob_grad,
                                terms.entropy_grad, args.inv_temp);
  return terms;
}

}  // namespace megatron_rl

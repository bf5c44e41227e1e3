#pragma once

#include "token_loss.h"

namespace megatron_rl {

// All tokens in order, on one thread: it is O(T), and the order makes the sums repeatable.
template <typename acc_t>
void token_loss_cpu(const TokenLossArgs<acc_t>& args) {
  for (int i = 0; i < kNumSums; ++i) args.sums[i] = 0;
  for (int i = 0; i < kNumExtrema; ++i) args.extrema[i] = 0;
  for (int64_t t = 0; t < args.num_tokens; ++t) {
    const TokenTerms<acc_t> terms = finish_token(args, t);
    for (int i = 0; i < kNumSums; ++i) args.sums[i] += static_cast<double>(terms.sums[i]);
    for (int i = 0; i < kNumExtrema; ++i) {
      args.extrema[i] = larger_or_nan(args.extrema[i], static_cast<double>(terms.extrema[i]));
    }
  }
  *args.loss = static_cast<acc_t>(args.sums[kLoss]);
}

}  // namespace megatron_rl

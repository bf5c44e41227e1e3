#pragma once

#include "token_loss.h"

namespace megatron_rl {

// Doubles of scratch memory that launch_token_loss needs.
int64_t token_loss_scratch(int64_t num_tokens);

// Returns a cudaError_t.
int launch_token_loss(const TokenLossArgs<float>& args, double* scratch, void* stream);

}  // namespace megatron_rl

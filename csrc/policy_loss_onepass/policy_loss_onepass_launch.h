#pragma once

#include "policy_loss_onepass.h"

namespace megatron_rl {

// Whether a row fits on the chip of the current device, and so is read from memory only once.
template <typename logit_t>
bool can_read_once(const LogitRows<logit_t>& rows);

// Needs can_read_once. Returns a cudaError_t.
template <typename logit_t>
int launch_policy_loss_onepass(const OnepassArgs<logit_t, float>& args, void* stream);

}  // namespace megatron_rl

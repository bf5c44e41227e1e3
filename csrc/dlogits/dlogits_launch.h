#pragma once

#include "dlogits.h"

namespace megatron_rl {

// Returns a cudaError_t.
template <typename logit_t>
int launch_dlogits(const DlogitsArgs<logit_t, float>& args, void* stream);

}  // namespace megatron_rl

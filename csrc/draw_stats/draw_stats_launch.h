#pragma once

#include "draw_stats.h"

namespace megatron_rl {

// Returns a cudaError_t.
template <typename logit_t>
int launch_draw_stats(const DrawArgs<logit_t>& args, void* stream);

}  // namespace megatron_rl

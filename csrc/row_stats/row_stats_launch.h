#pragma once

#include "row_stats.h"

namespace megatron_rl {

// Returns a cudaError_t.
template <typename logit_t>
int launch_row_stats(const RowStatsArgs<logit_t, float>& args, void* stream);

}  // namespace megatron_rl

#pragma once

#include <cstdint>

#include "../common/logit_types.h"

namespace megatron_rl {

// x *= grad / expected, and nothing at all where they are equal.
template <typename value_t, typename acc_t>
struct RescaleIfArgs {
  value_t* x;          // [n]
  int64_t num_values;  // n
  const acc_t* grad;   // one number
  acc_t expected;      // what x was computed with

  MRL_HOST_DEVICE bool is_needed() const { return *grad != expected; }
};

// Returns a cudaError_t.
template <typename value_t>
int launch_rescale_if(const RescaleIfArgs<value_t, float>& args, void* stream);

}  // namespace megatron_rl

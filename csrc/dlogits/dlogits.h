#pragma once

#include "../row_stats/row_stats.h"
#include "gradient_row.h"

namespace megatron_rl {

template <typename logit_t, typename acc_t>
struct DlogitsArgs {
  LogitRows<const logit_t> rows;
  logit_t* out;                      // [T, V], contiguous in V; may be rows.logits
  int64_t out_stride;                // elements from one row to the next
  const GradientRow<acc_t>* params;  // [T]; rows of zeros are not read and give zeros
  const acc_t* grad_scale;           // one number in device memory, or null for 1
  acc_t host_scale;                  // a further factor

  MRL_HOST_DEVICE GradientRow<acc_t> params_of(int64_t row) const {
    return scaled(params[row], grad_scale == nullptr ? host_scale : host_scale * *grad_scale);
  }
};

}  // namespace megatron_rl

#pragma once

#include "../row_stats/row_stats_cpu.h"
#include "policy_loss_onepass.h"

namespace megatron_rl {

// A row at a time: it is read from memory once, and from the cache while its gradient is written.
template <typename logit_t, typename acc_t>
void policy_loss_onepass_cpu(const OnepassArgs<logit_t, acc_t>& args, int64_t begin, int64_t end) {
  const LogitRows<const logit_t> rows = as_const(args.rows);
  for (int64_t row = begin; row < end; ++row) {
    GradientRow<acc_t> params = {};
    args.records[row] = unread_row<acc_t>();
    if (args.inputs.weights[row] != 0) {
      args.records[row] = record_of_row<logit_t, acc_t>(rows, row, args.spec.has_entropy);
      params = args.gradient(row, args.records[row]);
    }
    logit_t* logits = args.rows.logits + row * rows.row_stride;
    row_kernels<logit_t>().gradient(
        logits, logits, rows.num_valid, rows.num_columns, rows.target_column(row), params,
        static_cast<acc_t>(rows.inv_temp), row + 1 < end ? logits + rows.row_stride : nullptr);
  }
}

}  // namespace megatron_rl

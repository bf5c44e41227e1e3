#pragma once

#include "../cpu/row_kernels.h"
#include "row_stats.h"

namespace megatron_rl {

template <typename logit_t, typename acc_t>
RowRecord<acc_t> record_of_row(const LogitRows<const logit_t>& rows, int64_t row,
                               bool with_entropy) {
  const logit_t* logits = rows.logits + row * rows.row_stride;
  const acc_t inv_temp = static_cast<acc_t>(rows.inv_temp);
  RowRecord<acc_t> record =
      row_kernels<logit_t>().stats(logits, rows.num_valid, inv_temp, with_entropy);
  const int target = rows.target_column(row);
  if (target >= 0) record.target = widen(logits[target]) * inv_temp;
  return record;
}

template <typename logit_t, typename acc_t>
void row_stats_cpu(const RowStatsArgs<logit_t, acc_t>& args, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const bool is_read = args.weights == nullptr || args.weights[row] != 0;
    args.records[row] = is_read ? record_of_row<logit_t, acc_t>(args.rows, row, args.with_entropy)
                                : unread_row<acc_t>();
  }
}

}  // namespace megatron_rl

#pragma once

#include <cstdint>

#include "row_record.h"

namespace megatron_rl {

// T rows of a shard's logits.
template <typename logit_t>
struct LogitRows {
  logit_t* logits;         // [T, V], contiguous in V
  int64_t row_stride;      // elements from one row to the next
  const int64_t* targets;  // [T] global token ids
  int64_t num_rows;        // T
  int num_columns;         // V
  int num_valid;           // the first columns of V, which are vocabulary and not padding
  int64_t vocab_start;     // global id of column 0
  double inv_temp;         // 1 / temperature; rounded to what is computed in

  // Column of a row's target, or -1 where another shard, or nobody, owns it.
  MRL_HOST_DEVICE int target_column(int64_t row) const {
    const int64_t column = targets[row] - vocab_start;
    return column >= 0 && column < num_valid ? static_cast<int>(column) : -1;
  }
};

template <typename logit_t>
LogitRows<const logit_t> as_const(const LogitRows<logit_t>& rows) {
  return {rows.logits,      rows.row_stride, rows.targets,     rows.num_rows,
          rows.num_columns, rows.num_valid,  rows.vocab_start, rows.inv_temp};
}

template <typename logit_t, typename acc_t>
struct RowStatsArgs {
  LogitRows<const logit_t> rows;
  const acc_t* weights;       // [T] or null: rows of weight 0 are not read
  RowRecord<acc_t>* records;  // [T]
  bool with_entropy;          // else RowRecord::weighted is 0
};

}  // namespace megatron_rl

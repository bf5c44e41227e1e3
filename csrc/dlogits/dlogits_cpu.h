#pragma once

#include "../cpu/row_kernels.h"
#include "dlogits.h"

namespace megatron_rl {

template <typename logit_t, typename acc_t>
void dlogits_cpu(const DlogitsArgs<logit_t, acc_t>& args, int64_t begin, int64_t end) {
  const auto& rows = args.rows;
  for (int64_t row = begin; row < end; ++row) {
    row_kernels<logit_t>().gradient(
        rows.logits + row * rows.row_stride, args.out + row * args.out_stride, rows.num_valid,
        rows.num_columns, rows.target_column(row), args.params_of(row),
        static_cast<acc_t>(rows.inv_temp),
        row + 1 < end ? rows.logits + (row + 1) * rows.row_stride : nullptr);
  }
}

}  // namespace megatron_rl

#pragma once

#include "../row_stats/row_sums.cuh"
#include "dlogits.h"
#include "gradient_lanes.cuh"

namespace megatron_rl {

// One block per row. Rows of zeros are written, not read.
template <typename logit_t, bool kPacked>
__global__ void __launch_bounds__(kRowThreads) dlogits_kernel(DlogitsArgs<logit_t, float> args) {
  const int64_t row = blockIdx.x;
  const auto& rows = args.rows;
  const logit_t* logits = rows.logits + row * rows.row_stride;
  logit_t* out = args.out + row * args.out_stride;
  const GradientRow<float> params = args.params_of(row);
  const bool is_zero = params.is_zero();
  const int num_read = is_zero ? 0 : rows.num_valid;
  const int target = rows.target_column(row);
  const GradientOfLogit gradient(params, static_cast<float>(rows.inv_temp));

  if constexpr (kPacked) {
    constexpr int kSize = Pack<logit_t>::kSize;
#pragma unroll 4
    for (int column = threadIdx.x * kSize; column < rows.num_columns;
         column += kRowThreads * kSize) {
      float x[kSize];
#pragma unroll
      for (int i = 0; i < kSize; ++i) x[i] = 0.f;
      Pack<logit_t> pack;
      if (column < num_read) {
        pack.load(logits + column);
        pack.widen_to(x);
        forget_padding(x, column, num_read);
#pragma unroll
        for (int i = 0; i < kSize; ++i) {
          x[i] = gradient.at(x[i]) + (column + i == target ? params.c : 0.f);
        }
      }
      pack.narrow_from(x);
      pack.store(out + column);
    }
  } else {
    for (int column = threadIdx.x; column < rows.num_columns; column += kRowThreads) {
      float value = 0.f;
      if (column < num_read) {
        value = gradient.at(widen(logits[column])) + (column == target ? params.c : 0.f);
      }
      out[column] = Narrow<logit_t>::from(value);
    }
  }
}

}  // namespace megatron_rl

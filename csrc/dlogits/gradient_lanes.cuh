#pragma once

#include "../common/device_math.cuh"
#include "gradient_row.h"

namespace megatron_rl {

// Computes p * (b - a * log p) of single logits; its constants are made for powers of 2.
struct GradientOfLogit {
  float scale;
  float minus_log_sum;
  float a;
  float b;

  __device__ __forceinline__ GradientOfLogit(const GradientRow<float>& row, float inv_temp)
      : scale(inv_temp * static_cast<float>(kLog2E)),
        minus_log_sum(-row.log_sum_exp * static_cast<float>(kLog2E)),
        a(-row.a * static_cast<float>(kLn2)),
        b(row.b) {}

  __device__ __forceinline__ float at(float x) const {
    // Where p is 0 the product is 0, not NaN.
    const float exponent = at_least(__fmaf_rn(x, scale, minus_log_sum), -200.f);
    return fast_exp2(exponent) * __fmaf_rn(a, exponent, b);
  }
};

}  // namespace megatron_rl

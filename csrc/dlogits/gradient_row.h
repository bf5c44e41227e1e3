// The gradient of a row of logits: p_i * (b - a * log p_i) + c * [i = target].
#pragma once

#include "../common/host_device.h"

namespace megatron_rl {

template <typename acc_t>
struct GradientRow {
  acc_t log_sum_exp;
  acc_t c;  // d loss / d logprob, over temperature
  acc_t a;  // d loss / d entropy, over temperature
  acc_t b;  // -(c + entropy * a)

  MRL_HOST_DEVICE bool is_zero() const { return c == 0 && a == 0 && b == 0; }
};

// d logprob / dz_i = [i = target] - p_i and d entropy / dz_i = -p_i * (log p_i + entropy).
template <typename acc_t>
MRL_HOST_DEVICE GradientRow<acc_t> gradient_row(acc_t log_sum_exp, acc_t entropy,
                                                acc_t logprob_grad, acc_t entropy_grad,
                                                acc_t inv_temp) {
  const acc_t c = logprob_grad * inv_temp;
  const acc_t a = entropy_grad * inv_temp;
  return {log_sum_exp, c, a, a == 0 ? -c : -(c + entropy * a)};
}

template <typename acc_t>
MRL_HOST_DEVICE GradientRow<acc_t> scaled(GradientRow<acc_t> row, acc_t factor) {
  return {row.log_sum_exp, row.c * factor, row.a * factor, row.b * factor};
}

}  // namespace megatron_rl

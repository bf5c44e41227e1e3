// From the arguments of an op to LossSpec and TokenInputs.
#pragma once

#include <limits>

#include "../common/tensors.h"
#include "token_loss.h"

namespace megatron_rl {

// The tensors and numbers that token_loss and policy_loss_onepass_ share, as they arrive.
struct LossArguments {
  const std::optional<Tensor>& old_logprobs;
  const std::optional<Tensor>& ref_logprobs;
  const std::optional<Tensor>& rollout_logprobs;
  const Tensor& advantages;
  const Tensor& weights;
  int64_t kind;
  double low;
  double high;
  std::optional<double> dual_clip;
  double kl_coef;
  int64_t kl_estimator;
  double entropy_coef;
  double correction_low;
  std::optional<double> correction_high;
  bool correction_masks;
  bool with_entropy;
};

inline void check_loss(const Checks& checks, const LossArguments& loss, ScalarType type,
                       int64_t num_tokens) {
  const auto optional = [&](const std::optional<Tensor>& tensor, const char* name) {
    if (tensor.has_value()) checks.dense(*tensor, name, type, {num_tokens});
  };
  optional(loss.old_logprobs, "old_logprobs");
  optional(loss.ref_logprobs, "ref_logprobs");
  optional(loss.rollout_logprobs, "rollout_logprobs");
  checks.dense(loss.advantages, "advantages", type, {num_tokens});
  checks.dense(loss.weights, "weights", type, {num_tokens});
  const auto one_of = [&](int64_t value, int64_t count, const char* name) {
    checks.that(value >= 0 && value < count, name, "0 up to " + std::to_string(count - 1),
                std::to_string(value));
  };
  one_of(loss.kind, kNumLossKinds, "kind");
  one_of(loss.kl_estimator, kNumKlEstimators, "kl_estimator");
  checks.that(loss.kl_coef == 0 || loss.ref_logprobs.has_value(), "ref_logprobs",
              "a tensor, as kl_coef is not 0", "None");
  checks.that(!loss.correction_high.has_value() || loss.rollout_logprobs.has_value(),
              "rollout_logprobs", "a tensor, as correction_high is given", "None");
  checks.that(loss.entropy_coef == 0 || loss.with_entropy, "with_entropy",
              "True, as entropy_coef is not 0", "False");
}

template <typename acc_t>
LossSpec<acc_t> loss_spec(const LossArguments& loss) {
  return {static_cast<int>(loss.kind),
          static_cast<int>(loss.kl_estimator),
          static_cast<acc_t>(loss.low),
          static_cast<acc_t>(loss.high),
          static_cast<acc_t>(loss.dual_clip.value_or(std::numeric_limits<double>::infinity())),
          static_cast<acc_t>(loss.kl_coef),
          static_cast<acc_t>(loss.entropy_coef),
          static_cast<acc_t>(loss.correction_low),
          static_cast<acc_t>(loss.correction_high.value_or(-1)),
          loss.correction_masks,
          loss.old_logprobs.has_value(),
          loss.ref_logprobs.has_value(),
          loss.rollout_logprobs.has_value(),
          loss.with_entropy};
}

template <typename acc_t>
TokenInputs<acc_t> token_inputs(const LossArguments& loss) {
  const auto optional = [](const std::optional<Tensor>& tensor) {
    return tensor.has_value() ? input<acc_t>(*tensor) : nullptr;
  };
  return {optional(loss.old_logprobs), optional(loss.ref_logprobs), optional(loss.rollout_logprobs),
          input<acc_t>(loss.advantages), input<acc_t>(loss.weights)};
}

// What an op on T tokens returns of its loss.
struct LossOutputs {
  Tensor logprobs, entropy, params, loss, sums, extrema;

  LossOutputs(const Tensor& like, ScalarType type, int64_t num_tokens)
      : logprobs(new_tensor(like, {num_tokens}, type)),
        entropy(new_tensor(like, {num_tokens}, type)),
        params(new_tensor(like, {num_tokens, 4}, type)),
        loss(new_tensor(like, {}, type)),
        sums(new_tensor(like, {kNumSums}, ScalarType::Double)),
        extrema(new_tensor(like, {kNumExtrema}, ScalarType::Double)) {}

  template <typename acc_t>
  TokenLossArgs<acc_t> args(const Tensor& records, int64_t num_tokens, int num_shards,
                            const LossArguments& arguments, double inv_temp) const {
    return {input<RowRecord<acc_t>>(records),
            num_tokens,
            num_shards,
            token_inputs<acc_t>(arguments),
            loss_spec<acc_t>(arguments),
            static_cast<acc_t>(inv_temp),
            output<acc_t>(logprobs),
            output<acc_t>(entropy),
            output<GradientRow<acc_t>>(params),
            output<acc_t>(loss),
            output<double>(sums),
            output<double>(extrema)};
  }
};

}  // namespace megatron_rl

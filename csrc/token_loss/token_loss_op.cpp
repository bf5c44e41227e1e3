#include "../common/cuda_stream.h"
#include "loss_inputs.h"
#include "token_loss_cpu.h"
#include "token_loss_launch.h"

namespace megatron_rl {
namespace {

template <typename acc_t>
LossOutputs typed_token_loss(const Checks& checks, const Tensor& stats,
                             const LossArguments& arguments, double inv_temp) {
  const int64_t num_tokens = stats.size(1);
  check_loss(checks, arguments, ScalarTypeOf<acc_t>::value, num_tokens);
  LossOutputs outputs(stats, ScalarTypeOf<acc_t>::value, num_tokens);
  const auto args =
      outputs.args<acc_t>(stats, num_tokens, static_cast<int>(stats.size(0)), arguments, inv_temp);
  if (stats.is_cpu()) {
    token_loss_cpu(args);
    return outputs;
  }
#if defined(MRL_WITH_CUDA)
  if constexpr (std::is_same_v<acc_t, float>) {
    const OnDeviceOf device(stats);
    const Tensor scratch = new_tensor(stats, {token_loss_scratch(num_tokens)}, ScalarType::Double);
    check_launch("token_loss", launch_token_loss(args, output<double>(scratch), device.stream()));
  }
#endif
  return outputs;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> token_loss(
    const Tensor& stats, const std::optional<Tensor>& old_logprobs,
    const std::optional<Tensor>& ref_logprobs, const std::optional<Tensor>& rollout_logprobs,
    const Tensor& advantages, const Tensor& weights, int64_t kind, double low, double high,
    std::optional<double> dual_clip, double kl_coef, int64_t kl_estimator, double entropy_coef,
    double correction_low, std::optional<double> correction_high, bool correction_masks,
    bool with_entropy, double inv_temp) {
  const Checks checks("token_loss", stats, "stats");
  checks.that(stats.dim() == 3 && stats.size(2) == 4 && stats.size(0) > 0, "stats",
              "shape [shards, T, 4]", "shape " + text_of(stats.sizes()));
  const bool is_double = stats.is_cpu() && stats.scalar_type() == ScalarType::Double;
  checks.dense(stats, "stats", is_double ? ScalarType::Double : ScalarType::Float,
               {stats.size(0), stats.size(1), 4});
  const LossArguments arguments = {old_logprobs,
                                   ref_logprobs,
                                   rollout_logprobs,
                                   advantages,
                                   weights,
                                   kind,
                                   low,
                                   high,
                                   dual_clip,
                                   kl_coef,
                                   kl_estimator,
                                   entropy_coef,
                                   correction_low,
                                   correction_high,
                                   correction_masks,
                                   with_entropy};
  const LossOutputs outputs = is_double
                                  ? typed_token_loss<double>(checks, stats, arguments, inv_temp)
                                  : typed_token_loss<float>(checks, stats, arguments, inv_temp);
  return {outputs.logprobs, outputs.entropy, outputs.params,
          outputs.loss,     outputs.sums,    outputs.extrema};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(megatron_rl, CPU, m) { m.impl("token_loss", TORCH_BOX(&token_loss)); }
#if defined(MRL_WITH_CUDA)
STABLE_TORCH_LIBRARY_IMPL(megatron_rl, CUDA, m) { m.impl("token_loss", TORCH_BOX(&token_loss)); }
#endif

}  // namespace megatron_rl

#include "../common/cuda_stream.h"
#include "../dlogits/dlogits_launch.h"
#include "../row_stats/logit_rows.h"
#include "../row_stats/row_stats_launch.h"
#include "../token_loss/loss_inputs.h"
#include "../token_loss/token_loss_cpu.h"
#include "../token_loss/token_loss_launch.h"
#include "policy_loss_onepass_cpu.h"
#include "policy_loss_onepass_launch.h"

namespace megatron_rl {
namespace {

#if defined(MRL_WITH_CUDA)
template <typename logit_t>
void onepass_on_cuda(const OnepassArgs<logit_t, float>& args, const TokenLossArgs<float>& loss,
                     const Tensor& logits) {
  const OnDeviceOf device(logits);
  void* stream = device.stream();
  const Tensor scratch =
      new_tensor(logits, {token_loss_scratch(loss.num_tokens)}, ScalarType::Double);
  const bool reads_once = can_read_once(args.rows);
  if (reads_once) {
    check_launch("policy_loss_onepass_", launch_policy_loss_onepass(args, stream));
  } else {
    const RowStatsArgs<logit_t, float> stats = {as_const(args.rows), loss.inputs.weights,
                                                args.records, args.spec.has_entropy};
    check_launch("policy_loss_onepass_", launch_row_stats(stats, stream));
  }
  check_launch("policy_loss_onepass_", launch_token_loss(loss, output<double>(scratch), stream));
  if (!reads_once) {
    const DlogitsArgs<logit_t, float> gradient = {as_const(args.rows),    args.rows.logits,
                                                  args.rows.row_stride,   loss.params,
                                                  /*grad_scale=*/nullptr, args.grad_scale};
    check_launch("policy_loss_onepass_", launch_dlogits(gradient, stream));
  }
}
#endif

template <typename logit_t>
LossOutputs typed_onepass(const Checks& checks, const Tensor& logits, const Tensor& targets,
                          const LossArguments& arguments, int64_t valid_vocab, double inv_temp,
                          double grad_scale) {
  using acc_t = compute_t<logit_t>;
  const int64_t num_tokens = logits.size(0);
  check_loss(checks, arguments, ScalarTypeOf<acc_t>::value, num_tokens);
  check_targets<acc_t>(checks, targets, arguments.weights, valid_vocab);
  LossOutputs outputs(logits, ScalarTypeOf<acc_t>::value, num_tokens);
  const Tensor records = new_tensor(logits, {1, num_tokens, 4}, ScalarTypeOf<acc_t>::value);
  const OnepassArgs<logit_t, acc_t> args = {
      logit_rows<logit_t>(logits, targets, /*vocab_start=*/0, valid_vocab, inv_temp),
      output<RowRecord<acc_t>>(records),
      token_inputs<acc_t>(arguments),
      loss_spec<acc_t>(arguments),
      static_cast<acc_t>(grad_scale),
  };
  const auto loss = outputs.args<acc_t>(records, num_tokens, 1, arguments, inv_temp);
  if (logits.is_cpu()) {
    row_kernel_table();  // an error is raised here, and not in a thread
    for_rows(num_tokens, logits.size(1),
             [&](int64_t begin, int64_t end) { policy_loss_onepass_cpu(args, begin, end); });
    token_loss_cpu(loss);
    return outputs;
  }
#if defined(MRL_WITH_CUDA)
  if constexpr (!std::is_same_v<logit_t, double>) onepass_on_cuda(args, loss, logits);
#endif
  return outputs;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> policy_loss_onepass_(
    Tensor logits, const Tensor& targets, const std::optional<Tensor>& old_logprobs,
    const std::optional<Tensor>& ref_logprobs, const std::optional<Tensor>& rollout_logprobs,
    const Tensor& advantages, const Tensor& weights, int64_t kind, double low, double high,
    std::optional<double> dual_clip, double kl_coef, int64_t kl_estimator, double entropy_coef,
    double correction_low, std::optional<double> correction_high, bool correction_masks,
    bool with_entropy, int64_t valid_vocab, double inv_temp, double grad_scale) {
  const Checks checks("policy_loss_onepass_", logits, "logits");
  check_logits(checks, logits, targets, /*vocab_start=*/0, inv_temp, /*is_written=*/true);
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
  std::optional<LossOutputs> outputs;
  with_logit_type(checks, "logits", logits, [&](auto zero) {
    outputs = typed_onepass<decltype(zero)>(checks, logits, targets, arguments, valid_vocab,
                                            inv_temp, grad_scale);
  });
  return {outputs->logprobs, outputs->entropy, outputs->loss, outputs->sums, outputs->extrema};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(megatron_rl, CPU, m) {
  m.impl("policy_loss_onepass_", TORCH_BOX(&policy_loss_onepass_));
}
#if defined(MRL_WITH_CUDA)
STABLE_TORCH_LIBRARY_IMPL(megatron_rl, CUDA, m) {
  m.impl("policy_loss_onepass_", TORCH_BOX(&policy_loss_onepass_));
}
#endif

}  // namespace megatron_rl

#include "../common/cuda_stream.h"
#include "logit_rows.h"
#include "row_stats_cpu.h"
#include "row_stats_launch.h"

namespace megatron_rl {
namespace {

template <typename logit_t>
Tensor typed_row_stats(const Checks& checks, const Tensor& logits, const Tensor& targets,
                       const std::optional<Tensor>& weights, int64_t vocab_start,
                       int64_t valid_vocab, double inv_temp, bool with_entropy) {
  using acc_t = compute_t<logit_t>;
  if (weights.has_value()) {
    checks.dense(*weights, "weights", ScalarTypeOf<acc_t>::value, {logits.size(0)});
    check_targets<acc_t>(checks, targets, *weights, valid_vocab);
  }
  Tensor stats = new_tensor(logits, {logits.size(0), 4}, ScalarTypeOf<acc_t>::value);
  const RowStatsArgs<logit_t, acc_t> args = {
      logit_rows<const logit_t>(logits, targets, vocab_start, valid_vocab, inv_temp),
      weights.has_value() ? input<acc_t>(*weights) : nullptr,
      output<RowRecord<acc_t>>(stats),
      with_entropy,
  };
  if (logits.is_cpu()) {
    row_kernel_table();  // an error is raised here, and not in a thread
    for_rows(logits.size(0), logits.size(1),
             [&](int64_t begin, int64_t end) { row_stats_cpu(args, begin, end); });
    return stats;
  }
#if defined(MRL_WITH_CUDA)
  if constexpr (!std::is_same_v<logit_t, double>) {
    const OnDeviceOf device(logits);
    check_launch("row_stats", launch_row_stats(args, device.stream()));
  }
#endif
  return stats;
}

Tensor row_stats(const Tensor& logits, const Tensor& targets, const std::optional<Tensor>& weights,
                 int64_t vocab_start, int64_t valid_vocab, double inv_temp, bool with_entropy) {
  const Checks checks("row_stats", logits, "logits");
  check_logits(checks, logits, targets, vocab_start, inv_temp, /*is_written=*/false);
  std::optional<Tensor> stats;
  with_logit_type(checks, "logits", logits, [&](auto zero) {
    stats = typed_row_stats<decltype(zero)>(checks, logits, targets, weights, vocab_start,
                                            valid_vocab, inv_temp, with_entropy);
  });
  return *stats;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(megatron_rl, CPU, m) { m.impl("row_stats", TORCH_BOX(&row_stats)); }
#if defined(MRL_WITH_CUDA)
STABLE_TORCH_LIBRARY_IMPL(megatron_rl, CUDA, m) { m.impl("row_stats", TORCH_BOX(&row_stats)); }
#endif

}  // namespace megatron_rl

#include "../common/cuda_stream.h"
#include "../row_stats/logit_rows.h"
#include "dlogits_cpu.h"
#include "dlogits_launch.h"

namespace megatron_rl {
namespace {

template <typename logit_t>
void typed_dlogits(const Checks& checks, const Tensor& logits, const Tensor& out,
                   const Tensor& targets, const Tensor& params,
                   const std::optional<Tensor>& grad_scale, int64_t vocab_start,
                   int64_t valid_vocab, double inv_temp) {
  using acc_t = compute_t<logit_t>;
  checks.dense(params, "params", ScalarTypeOf<acc_t>::value, {logits.size(0), 4});
  if (grad_scale.has_value()) {
    checks.dense(*grad_scale, "grad_scale", ScalarTypeOf<acc_t>::value, {});
  }
  const DlogitsArgs<logit_t, acc_t> args = {
      logit_rows<const logit_t>(logits, targets, vocab_start, valid_vocab, inv_temp),
      output<logit_t>(out),
      out.stride(0),
      input<GradientRow<acc_t>>(params),
      grad_scale.has_value() ? input<acc_t>(*grad_scale) : nullptr,
      /*host_scale=*/acc_t(1),
  };
  if (logits.is_cpu()) {
    row_kernel_table();  // an error is raised here, and not in a thread
    for_rows(logits.size(0), logits.size(1),
             [&](int64_t begin, int64_t end) { dlogits_cpu(args, begin, end); });
    return;
  }
#if defined(MRL_WITH_CUDA)
  if constexpr (!std::is_same_v<logit_t, double>) {
    const OnDeviceOf device(logits);
    check_launch("dlogits", launch_dlogits(args, device.stream()));
  }
#endif
}

void dlogits_into(const char* op, const Tensor& logits, const Tensor& out, const Tensor& targets,
                  const Tensor& params, const std::optional<Tensor>& grad_scale,
                  int64_t vocab_start, int64_t valid_vocab, double inv_temp, bool is_written) {
  const Checks checks(op, logits, "logits");
  check_logits(checks, logits, targets, vocab_start, inv_temp, is_written);
  with_logit_type(checks, "logits", logits, [&](auto zero) {
    typed_dlogits<decltype(zero)>(checks, logits, out, targets, params, grad_scale, vocab_start,
                                  valid_vocab, inv_temp);
  });
}

// A tensor argument that is written arrives by value: the handle is copied, the memory is not.
void dlogits_(Tensor logits, const Tensor& targets, const Tensor& params,
              const std::optional<Tensor>& grad_scale, int64_t vocab_start, int64_t valid_vocab,
              double inv_temp) {
  dlogits_into("dlogits_", logits, logits, targets, params, grad_scale, vocab_start, valid_vocab,
               inv_temp, /*is_written=*/true);
}

Tensor dlogits(const Tensor& logits, const Tensor& targets, const Tensor& params,
               const std::optional<Tensor>& grad_scale, int64_t vocab_start, int64_t valid_vocab,
               double inv_temp) {
  const Checks checks("dlogits", logits, "logits");
  checks.rows(logits, "logits", /*is_written=*/false);
  Tensor out = new_tensor(logits, {logits.size(0), logits.size(1)}, logits.scalar_type());
  dlogits_into("dlogits", logits, out, targets, params, grad_scale, vocab_start, valid_vocab,
               inv_temp, /*is_written=*/false);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(megatron_rl, CPU, m) {
  m.impl("dlogits_", TORCH_BOX(&dlogits_));
  m.impl("dlogits", TORCH_BOX(&dlogits));
}
#if defined(MRL_WITH_CUDA)
STABLE_TORCH_LIBRARY_IMPL(megatron_rl, CUDA, m) {
  m.impl("dlogits_", TORCH_BOX(&dlogits_));
  m.impl("dlogits", TORCH_BOX(&dlogits));
}
#endif

}  // namespace megatron_rl

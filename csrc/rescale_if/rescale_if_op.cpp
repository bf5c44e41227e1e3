#include "rescale_if.h"

#include "../common/cuda_stream.h"
#include "../common/tensors.h"

namespace megatron_rl {
namespace {

template <typename value_t>
void typed_rescale_if(const Checks& checks, const Tensor& x, const Tensor& grad, double expected) {
  using acc_t = compute_t<value_t>;
  checks.dense(grad, "grad", ScalarTypeOf<acc_t>::value, {});
  const RescaleIfArgs<value_t, acc_t> args = {output<value_t>(x), x.numel(), input<acc_t>(grad),
                                              static_cast<acc_t>(expected)};
  if (x.is_cpu()) {
    if (!args.is_needed()) return;
    const acc_t factor = *args.grad / args.expected;
    for_rows(args.num_values, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        args.x[i] = Narrow<value_t>::from(widen(args.x[i]) * factor);
      }
    });
    return;
  }
#if defined(MRL_WITH_CUDA)
  if constexpr (!std::is_same_v<value_t, double>) {
    const OnDeviceOf device(x);
    check_launch("rescale_if_", launch_rescale_if(args, device.stream()));
  }
#endif
}

void rescale_if_(Tensor x, const Tensor& grad, double expected) {
  const Checks checks("rescale_if_", x, "x");
  checks.that(x.is_contiguous(), "x", "a contiguous tensor", StridesOf{x});
  checks.that(expected != 0, "expected", "a number other than 0", "0");
  with_logit_type(checks, "x", x,
                  [&](auto zero) { typed_rescale_if<decltype(zero)>(checks, x, grad, expected); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(megatron_rl, CPU, m) { m.impl("rescale_if_", TORCH_BOX(&rescale_if_)); }
#if defined(MRL_WITH_CUDA)
STABLE_TORCH_LIBRARY_IMPL(megatron_rl, CUDA, m) { m.impl("rescale_if_", TORCH_BOX(&rescale_if_)); }
#endif

}  // namespace megatron_rl

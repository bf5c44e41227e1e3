#include "../common/cuda_stream.h"
#include "../common/tensors.h"
#include "../cpu/row_kernels.h"
#include "draw_stats_launch.h"

namespace megatron_rl {
namespace {

template <typename logit_t, typename acc_t>
Winner<acc_t> most_probable(const logit_t* row, int num_valid, acc_t max) {
  for (int column = 0; column < num_valid; ++column) {
    if (static_cast<acc_t>(widen(row[column])) == max) return {max, max, column};
  }
  return {negative_infinity<acc_t>(), negative_infinity<acc_t>(), -1};
}

template <typename logit_t>
void draw_rows(const DrawArgs<logit_t>& args, int64_t begin, int64_t end) {
  using acc_t = compute_t<logit_t>;
  const auto& kernels = row_kernels<logit_t>();
  for (int64_t row = begin; row < end; ++row) {
    const logit_t* logits = args.logits + row * args.row_stride;
    const bool is_greedy = args.temperatures[row] == 0;
    const acc_t inv_temp = is_greedy ? acc_t(1) : static_cast<acc_t>(1.0 / args.temperatures[row]);
    const RowRecord<acc_t> sums = kernels.stats(logits, args.num_valid, inv_temp, false);
    const Winner<acc_t> winner =
        is_greedy ? most_probable(logits, args.num_valid, sums.max)
                  : kernels.race(logits, args.num_valid, inv_temp, sums.max, args.noise_of(row));
    args.write(row, sums.max, sums.sum, winner);
  }
}

Tensor draw_stats(const Tensor& logits, const Tensor& seeds, const Tensor& places,
                  const Tensor& temperatures, int64_t vocab_start, int64_t valid_vocab) {
  const Checks checks("draw_stats", logits, "logits");
  checks.rows(logits, "logits", /*is_written=*/false);
  const int64_t num_rows = logits.size(0);
  checks.dense(seeds, "seeds", ScalarType::Long, {num_rows});
  checks.dense(places, "places", ScalarType::Long, {num_rows});
  checks.dense(temperatures, "temperatures", ScalarType::Double, {num_rows});
  checks.that(vocab_start >= 0, "vocab_start", "at least 0", std::to_string(vocab_start));
  const int64_t num_valid =
      std::min(std::max<int64_t>(valid_vocab - vocab_start, 0), logits.size(1));
  Tensor stats = new_tensor(logits, {num_rows, 5}, ScalarType::Double);
  with_logit_type(checks, "logits", logits, [&](auto zero) {
    using logit_t = decltype(zero);
    const DrawArgs<logit_t> args = {input<logit_t>(logits),
                                    logits.stride(0),
                                    num_rows,
                                    static_cast<int>(num_valid),
                                    vocab_start,
                                    input<int64_t>(seeds),
                                    input<int64_t>(places),
                                    input<double>(temperatures),
                                    output<DrawRecord>(stats)};
    if (logits.is_cpu()) {
      row_kernel_table();  // an error is raised here, and not in a thread
      for_rows(num_rows, logits.size(1),
               [&](int64_t begin, int64_t end) { draw_rows(args, begin, end); });
      return;
    }
#if defined(MRL_WITH_CUDA)
    if constexpr (!std::is_same_v<logit_t, double>) {
      const OnDeviceOf device(logits);
      check_launch("draw_stats", launch_draw_stats(args, device.stream()));
    }
#endif
  });
  return stats;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(megatron_rl, CPU, m) { m.impl("draw_stats", TORCH_BOX(&draw_stats)); }
#if defined(MRL_WITH_CUDA)
STABLE_TORCH_LIBRARY_IMPL(megatron_rl, CUDA, m) { m.impl("draw_stats", TORCH_BOX(&draw_stats)); }
#endif

}  // namespace megatron_rl

#include "merge_stats.h"

#include "../common/cuda_stream.h"
#include "../common/tensors.h"

namespace megatron_rl {
namespace {

using Merged = std::tuple<Tensor, Tensor, Tensor>;

template <typename acc_t>
Merged typed_merge_stats(const Tensor& stats) {
  const int64_t num_rows = stats.size(1);
  constexpr ScalarType type = ScalarTypeOf<acc_t>::value;
  Merged merged = {new_tensor(stats, {num_rows}, type), new_tensor(stats, {num_rows}, type),
                   new_tensor(stats, {num_rows}, type)};
  const MergeStatsArgs<acc_t> args = {
      input<RowRecord<acc_t>>(stats),     num_rows,
      static_cast<int>(stats.size(0)),    output<acc_t>(std::get<0>(merged)),
      output<acc_t>(std::get<1>(merged)), output<acc_t>(std::get<2>(merged))};
  if (stats.is_cpu()) {
    for_rows(num_rows, stats.size(0), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) args.merge(row);
    });
    return merged;
  }
#if defined(MRL_WITH_CUDA)
  if constexpr (std::is_same_v<acc_t, float>) {
    const OnDeviceOf device(stats);
    check_launch("merge_stats", launch_merge_stats(args, device.stream()));
  }
#endif
  return merged;
}

Merged merge_stats(const Tensor& stats) {
  const Checks checks("merge_stats", stats, "stats");
  checks.that(stats.dim() == 3 && stats.size(2) == 4 && stats.size(0) > 0, "stats",
              "shape [shards, T, 4]", ShapeOf{stats});
  const bool is_double = stats.is_cpu() && stats.scalar_type() == ScalarType::Double;
  checks.dense(stats, "stats", is_double ? ScalarType::Double : ScalarType::Float,
               {stats.size(0), stats.size(1), 4});
  return is_double ? typed_merge_stats<double>(stats) : typed_merge_stats<float>(stats);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(megatron_rl, CPU, m) { m.impl("merge_stats", TORCH_BOX(&merge_stats)); }
#if defined(MRL_WITH_CUDA)
STABLE_TORCH_LIBRARY_IMPL(megatron_rl, CUDA, m) { m.impl("merge_stats", TORCH_BOX(&merge_stats)); }
#endif

}  // namespace megatron_rl

#include "group_stats.h"

#include "../common/cuda_stream.h"
#include "../common/tensors.h"

namespace megatron_rl {
namespace {

void group_stats_cpu(const GroupStatsArgs& args, int64_t group) {
  const int64_t begin = args.bound(group);
  const int64_t end = args.bound(group + 1);
  GroupTotals totals = GroupTotals::empty();
  for (int64_t i = begin; i < end; ++i) totals.add(args.rewards[i]);
  const double mean = totals.mean(end - begin);
  double squares = 0;
  for (int64_t i = begin; i < end; ++i) {
    const double deviation = args.rewards[i] - mean;
    squares += deviation * deviation;
  }
  const Group found(args.std_ddof, end - begin, totals, squares);
  found.store(args, group);
  for (int64_t i = begin; i < end; ++i) found.store_response(args, i);
}

void check_offsets(const Checks& checks, const Tensor& offsets, int64_t num_rewards) {
  if (!offsets.is_cpu()) return;
  const int64_t* bounds = input<int64_t>(offsets);
  const int64_t last = offsets.numel() - 1;
  const std::string expected = "numbers that ascend from 0 to " + std::to_string(num_rewards);
  checks.that(bounds[0] == 0, "offsets", expected, std::to_string(bounds[0]) + " first");
  checks.that(bounds[last] == num_rewards, "offsets", expected,
              std::to_string(bounds[last]) + " last");
  for (int64_t g = 0; g < last; ++g) {
    checks.that(bounds[g] <= bounds[g + 1], "offsets", expected,
                std::to_string(bounds[g + 1]) + " after " + std::to_string(bounds[g]));
  }
}

using Results = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Results group_stats(const Tensor& rewards, const Tensor& offsets, int64_t std_ddof,
                    int64_t keep_rules, int64_t advantage_mode, double std_eps) {
  const Checks checks("group_stats", rewards, "rewards");
  const int64_t num_rewards = rewards.numel();
  checks.dense(rewards, "rewards", ScalarType::Double, {num_rewards});
  checks.dense(offsets, "offsets", ScalarType::Long, {offsets.numel()});
  checks.that(offsets.numel() > 0, "offsets", "shape [groups + 1]", ShapeOf{offsets});
  check_offsets(checks, offsets, num_rewards);
  checks.that((keep_rules & ~kKeepRules) == 0, "keep_rules",
              "bits of " + std::to_string(kKeepRules), std::to_string(keep_rules));
  checks.that(advantage_mode >= 0 && advantage_mode < kNumAdvantageModes, "advantage_mode",
              "0 up to " + std::to_string(kNumAdvantageModes - 1), std::to_string(advantage_mode));
  const int64_t num_groups = offsets.numel() - 1;
  const auto column = [&](ScalarType type) { return new_tensor(rewards, {num_groups}, type); };
  const Tensor mean = column(ScalarType::Double);
  const Tensor std = column(ScalarType::Double);
  const Tensor max = column(ScalarType::Double);
  const Tensor min = column(ScalarType::Double);
  const Tensor counts = column(ScalarType::Long);
  const Tensor flags = new_tensor(rewards, {kNumGroupFlags, num_groups}, ScalarType::Bool);
  const Tensor keep = new_tensor(rewards, {num_rewards}, ScalarType::Bool);
  const Tensor advantages = new_tensor(rewards, {num_rewards}, ScalarType::Double);
  const GroupStatsArgs args = {input<double>(rewards),
                               input<int64_t>(offsets),
                               num_rewards,
                               num_groups,
                               std_ddof,
                               keep_rules,
                               advantage_mode,
                               std_eps,
                               output<double>(mean),
                               output<double>(std),
                               output<double>(max),
                               output<double>(min),
                               output<int64_t>(counts),
                               output<bool>(flags),
                               output<bool>(keep),
                               output<double>(advantages)};
  if (rewards.is_cpu()) {
    for_rows(num_groups, 16, [&](int64_t begin, int64_t end) {
      for (int64_t group = begin; group < end; ++group) group_stats_cpu(args, group);
    });
    return {mean, std, max, min, counts, flags, keep, advantages};
  }
#if defined(MRL_WITH_CUDA)
  const OnDeviceOf device(rewards);
  check_launch("group_stats", launch_group_stats(args, device.stream()));
#endif
  return {mean, std, max, min, counts, flags, keep, advantages};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(megatron_rl, CPU, m) { m.impl("group_stats", TORCH_BOX(&group_stats)); }
#if defined(MRL_WITH_CUDA)
STABLE_TORCH_LIBRARY_IMPL(megatron_rl, CUDA, m) { m.impl("group_stats", TORCH_BOX(&group_stats)); }
#endif

}  // namespace megatron_rl

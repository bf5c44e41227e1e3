// Reward statistics of groups. The definition is megatron_rl/ops/group_stats.py.
#pragma once

#include <cstdint>

#include "../common/host_device.h"

namespace megatron_rl {

enum GroupFlag : int { kAllEqual, kAllCorrect, kAllWrong, kSingle, kHasNan, kNumGroupFlags };

struct GroupStatsArgs {
  const double* rewards;   // [n]
  const int64_t* offsets;  // [G + 1]; group g is offsets[g] up to offsets[g + 1]
  int64_t num_rewards;     // n
  int64_t num_groups;      // G
  int64_t std_ddof;
  double* mean;     // [G]
  double* std;      // [G]
  double* max;      // [G]
  double* min;      // [G]
  int64_t* counts;  // [G]
  bool* flags;      // [kNumGroupFlags, G]

  // Never outside of the rewards, whatever the offsets say.
  MRL_HOST_DEVICE int64_t bound(int64_t index) const {
    return clamp(offsets[index], int64_t(0), num_rewards);
  }
};

// First of the two passes over a group: a variance from squares would cancel.
struct GroupTotals {
  double sum;
  double max;
  double min;

  static MRL_HOST_DEVICE GroupTotals empty() {
    return {0, negative_infinity<double>(), -negative_infinity<double>()};
  }
  MRL_HOST_DEVICE void add(double reward) { merge({reward, reward, reward}); }
  MRL_HOST_DEVICE void merge(GroupTotals other) {
    sum += other.sum;
    max = larger_or_nan(max, other.max);
    min = smaller_or_nan(min, other.min);
  }
  // Equal rewards may differ from their rounded mean, and would get an advantage of noise.
  MRL_HOST_DEVICE double mean(int64_t count) const {
    return max == min ? max : sum / static_cast<double>(count > 1 ? count : 1);
  }
};

MRL_HOST_DEVICE void finish_group(const GroupStatsArgs& args, int64_t group, int64_t count,
                                  const GroupTotals& totals, double squares) {
  const int64_t divisor = count - args.std_ddof;
  const bool has_std = count > 1 && divisor > 0;
  args.mean[group] = totals.mean(count);
  args.std[group] = has_std ? std::sqrt(squares / static_cast<double>(divisor)) : 1.0;
  args.max[group] = totals.max;
  args.min[group] = totals.min;
  args.counts[group] = count;
  const auto set = [&](GroupFlag flag, bool value) {
    args.flags[flag * args.num_groups + group] = value;
  };
  set(kAllEqual, totals.max == totals.min);
  set(kAllCorrect, count > 0 && totals.min > 0);
  set(kAllWrong, count > 0 && totals.max <= 0);
  set(kSingle, count == 1);
  set(kHasNan, totals.max != totals.max);
}

// Returns a cudaError_t.
int launch_group_stats(const GroupStatsArgs& args, void* stream);

}  // namespace megatron_rl

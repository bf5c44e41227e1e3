// Reward statistics of groups, and what they say of each response. The definition is
// megatron_rl/ops/group_stats.py.
#pragma once

#include <cstdint>

#include "../common/host_device.h"

namespace megatron_rl {

enum GroupFlag : int { kAllEqual, kAllCorrect, kAllWrong, kSingle, kHasNan, kNumGroupFlags };

// Bits; a response is kept if all that are set agree.
enum KeepRule : int64_t { kPositive = 1, kDropAllWrong = 2, kDropAllCorrect = 4, kKeepRules = 7 };

enum AdvantageMode : int64_t {
  kOne,
  kReward,
  kRewardMinusMean,
  kGroupNorm,
  kRewardOverStd,
  kLeaveOneOut,
  kRewardMinusMeanOverP,
  kNumAdvantageModes
};

struct GroupStatsArgs {
  const double* rewards;   // [n]
  const int64_t* offsets;  // [G + 1]; group g is offsets[g] up to offsets[g + 1]
  int64_t num_rewards;     // n
  int64_t num_groups;      // G
  int64_t std_ddof;
  int64_t keep_rules;
  int64_t advantage_mode;
  double std_eps;
  double* mean;        // [G]
  double* std;         // [G]
  double* max;         // [G]
  double* min;         // [G]
  int64_t* counts;     // [G]
  bool* flags;         // [kNumGroupFlags, G]
  bool* keep;          // [n]
  double* advantages;  // [n]

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
  double correct;  // rewards above 0

  static MRL_HOST_DEVICE GroupTotals empty() {
    return {0, negative_infinity<double>(), -negative_infinity<double>(), 0};
  }
  MRL_HOST_DEVICE void add(double reward) {
    merge({reward, reward, reward, reward > 0 ? 1.0 : 0.0});
  }
  MRL_HOST_DEVICE void merge(GroupTotals other) {
    sum += other.sum;
    max = larger_or_nan(max, other.max);
    min = smaller_or_nan(min, other.min);
    correct += other.correct;
  }
  // Equal rewards may differ from their rounded mean, and would get an advantage of noise.
  MRL_HOST_DEVICE double mean(int64_t count) const {
    return max == min ? max : sum / static_cast<double>(count > 1 ? count : 1);
  }
};

// What both passes found.
struct Group {
  int64_t count;
  double mean;
  double std;
  double max;
  double min;
  double correct;

  MRL_HOST_DEVICE Group(int64_t std_ddof, int64_t count, const GroupTotals& totals, double squares)
      : count(count),
        mean(totals.mean(count)),
        std(1),
        max(totals.max),
        min(totals.min),
        correct(totals.correct) {
    const int64_t divisor = count - std_ddof;
    if (count > 1 && divisor > 0) std = std::sqrt(squares / static_cast<double>(divisor));
  }

  MRL_HOST_DEVICE bool has_nan() const { return max != max; }

  MRL_HOST_DEVICE bool keeps(double reward, int64_t rules) const {
    return !has_nan() && (!(rules & kPositive) || (reward == max && reward > 0)) &&
           (!(rules & kDropAllWrong) || max > 0) && (!(rules & kDropAllCorrect) || min <= 0);
  }

  MRL_HOST_DEVICE double advantage(double reward, int64_t mode, double std_eps) const {
    switch (mode) {
      case kReward:
        return reward;
      case kRewardMinusMean:
        return reward - mean;
      case kGroupNorm: {
        const double centered = reward - (count > 1 ? mean : 0);  // mean 0 and std 1 without others
        return centered == 0 ? 0 : centered / (std + std_eps);    // 0 whatever the divisor
      }
      case kRewardOverStd:
        return reward / (std + std_eps);
      case kLeaveOneOut:
        if (count < 2) return reward;
        return (reward - mean) * static_cast<double>(count) / static_cast<double>(count - 1);
      case kRewardMinusMeanOverP:
        if (correct == 0) return 0;  // p is 0, and the objective has no slope there to follow
        return (reward - mean) * static_cast<double>(count) / correct;
      default:
        return 1;
    }
  }

  MRL_HOST_DEVICE void store(const GroupStatsArgs& args, int64_t group) const {
    args.mean[group] = mean;
    args.std[group] = std;
    args.max[group] = max;
    args.min[group] = min;
    args.counts[group] = count;
    const auto set = [&](GroupFlag flag, bool value) {
      args.flags[flag * args.num_groups + group] = value;
    };
    set(kAllEqual, max == min);
    set(kAllCorrect, count > 0 && min > 0);
    set(kAllWrong, count > 0 && max <= 0);
    set(kSingle, count == 1);
    set(kHasNan, has_nan());
  }

  MRL_HOST_DEVICE void store_response(const GroupStatsArgs& args, int64_t index) const {
    const double reward = args.rewards[index];
    args.keep[index] = keeps(reward, args.keep_rules);
    args.advantages[index] = advantage(reward, args.advantage_mode, args.std_eps);
  }
};

// Returns a cudaError_t.
int launch_group_stats(const GroupStatsArgs& args, void* stream);

}  // namespace megatron_rl

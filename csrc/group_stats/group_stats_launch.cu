#include <cuda_runtime.h>

#include "group_stats.h"

namespace megatron_rl {
namespace {

constexpr int kGroupThreads = 128;
constexpr unsigned kAllLanes = 0xffffffffu;

// One warp per group.
__global__ void __launch_bounds__(kGroupThreads) group_stats_kernel(GroupStatsArgs args) {
  const int64_t group = (static_cast<int64_t>(blockIdx.x) * kGroupThreads + threadIdx.x) / 32;
  if (group >= args.num_groups) return;  // a whole warp
  const int lane = threadIdx.x % 32;
  const int64_t begin = args.bound(group);
  const int64_t end = args.bound(group + 1);

  // Load and reduce, twice; after the butterfly all lanes have the same totals.
  GroupTotals totals = GroupTotals::empty();
  for (int64_t i = begin + lane; i < end; i += 32) totals.add(args.rewards[i]);
  for (int distance = 16; distance > 0; distance /= 2) {
    totals.merge({__shfl_xor_sync(kAllLanes, totals.sum, distance),
                  __shfl_xor_sync(kAllLanes, totals.max, distance),
                  __shfl_xor_sync(kAllLanes, totals.min, distance),
                  __shfl_xor_sync(kAllLanes, totals.correct, distance)});
  }
  const double mean = totals.mean(end - begin);
  double squares = 0;
  for (int64_t i = begin + lane; i < end; i += 32) {
    const double deviation = args.rewards[i] - mean;
    squares += deviation * deviation;
  }
  for (int distance = 16; distance > 0; distance /= 2) {
    squares += __shfl_xor_sync(kAllLanes, squares, distance);
  }

  // Store.
  const Group found(args.std_ddof, end > begin ? end - begin : 0, totals, squares);
  if (lane == 0) found.store(args, group);
  for (int64_t i = begin + lane; i < end; i += 32) found.store_response(args, i);
}

}  // namespace

int launch_group_stats(const GroupStatsArgs& args, void* stream) {
  if (args.num_groups == 0) return cudaSuccess;  // an empty grid is a launch error
  constexpr int kGroupsPerBlock = kGroupThreads / 32;
  const unsigned blocks = static_cast<unsigned>((args.num_groups - 1) / kGroupsPerBlock + 1);
  group_stats_kernel<<<blocks, kGroupThreads, 0, static_cast<cudaStream_t>(stream)>>>(args);
  return cudaGetLastError();
}

}  // namespace megatron_rl

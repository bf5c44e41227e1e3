#include <cuda_runtime.h>

#include "merge_stats.h"

namespace megatron_rl {
namespace {

constexpr int kMergeThreads = 256;

// One thread per row.
__global__ void __launch_bounds__(kMergeThreads) merge_stats_kernel(MergeStatsArgs<float> args) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kMergeThreads + threadIdx.x;
  if (row < args.num_rows) args.merge(row);
}

}  // namespace

int launch_merge_stats(const MergeStatsArgs<float>& args, void* stream) {
  if (args.num_rows == 0) return cudaSuccess;  // an empty grid is a launch error
  const unsigned blocks = static_cast<unsigned>((args.num_rows - 1) / kMergeThreads + 1);
  merge_stats_kernel<<<blocks, kMergeThreads, 0, static_cast<cudaStream_t>(stream)>>>(args);
  return cudaGetLastError();
}

}  // namespace megatron_rl

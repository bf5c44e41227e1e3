#include "../common/cluster_launch.cuh"
#include "row_stats_kernel.cuh"
#include "row_stats_launch.h"

namespace megatron_rl {

const char* cuda_error_text(int error) {
  return cudaGetErrorString(static_cast<cudaError_t>(error));
}

namespace {

template <typename logit_t, bool kEntropy>
cudaError_t launch(const RowStatsArgs<logit_t, float>& args, cudaStream_t stream) {
  const auto& rows = args.rows;
  const unsigned grid = static_cast<unsigned>(rows.num_rows);
  if (!is_packable(rows.logits, rows.row_stride, rows.num_columns)) {
    row_stats_kernel<logit_t, false, kEntropy><<<grid, kRowThreads, 0, stream>>>(args);
    return cudaGetLastError();
  }
  const int cluster = cluster_for<logit_t>(rows.num_columns);
  if (cluster == 0 || !has_clusters(row_stats_cluster_kernel<logit_t, 1, kEntropy>)) {
    row_stats_kernel<logit_t, true, kEntropy><<<grid, kRowThreads, 0, stream>>>(args);
    return cudaGetLastError();
  }
  return with_cluster(cluster, [&](auto size) {
    return launch_in_clusters(row_stats_cluster_kernel<logit_t, size(), kEntropy>, args,
                              rows.num_rows, cluster, kRowThreads, stream);
  });
}

}  // namespace

template <typename logit_t>
int launch_row_stats(const RowStatsArgs<logit_t, float>& args, void* stream) {
  if (args.rows.num_rows == 0) return cudaSuccess;  // an empty grid is a launch error
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  return args.with_entropy ? launch<logit_t, true>(args, cuda_stream)
                           : launch<logit_t, false>(args, cuda_stream);
}

template int launch_row_stats(const RowStatsArgs<Bf16, float>&, void*);
template int launch_row_stats(const RowStatsArgs<Fp16, float>&, void*);
template int launch_row_stats(const RowStatsArgs<float, float>&, void*);

}  // namespace megatron_rl

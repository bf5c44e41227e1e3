#include "../common/cluster_launch.cuh"
#include "policy_loss_onepass_kernel.cuh"
#include "policy_loss_onepass_launch.h"

namespace megatron_rl {
namespace {

template <typename logit_t, bool kEntropy>
cudaError_t launch(const OnepassArgs<logit_t, float>& args, cudaStream_t stream) {
  const int cluster = cluster_for<logit_t>(args.rows.num_columns);
  return with_cluster(cluster, [&](auto size) {
    return launch_in_clusters(policy_loss_onepass_kernel<logit_t, size(), kEntropy>, args,
                              args.rows.num_rows, cluster, kRowThreads, stream);
  });
}

}  // namespace

template <typename logit_t>
bool can_read_once(const LogitRows<logit_t>& rows) {
  return is_packable(rows.logits, rows.row_stride, rows.num_columns) &&
         cluster_for<logit_t>(rows.num_columns) > 0 &&
         has_clusters(policy_loss_onepass_kernel<logit_t, 1, true>);
}

template <typename logit_t>
int launch_policy_loss_onepass(const OnepassArgs<logit_t, float>& args, void* stream) {
  if (args.rows.num_rows == 0) return cudaSuccess;  // an empty grid is a launch error
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  return args.spec.has_entropy ? launch<logit_t, true>(args, cuda_stream)
                               : launch<logit_t, false>(args, cuda_stream);
}

template bool can_read_once(const LogitRows<Bf16>&);
template bool can_read_once(const LogitRows<Fp16>&);
template bool can_read_once(const LogitRows<float>&);
template int launch_policy_loss_onepass(const OnepassArgs<Bf16, float>&, void*);
template int launch_policy_loss_onepass(const OnepassArgs<Fp16, float>&, void*);
template int launch_policy_loss_onepass(const OnepassArgs<float, float>&, void*);

}  // namespace megatron_rl

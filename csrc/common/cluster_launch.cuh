// Launches of a grid whose blocks come in clusters.
#pragma once

#include <cuda_runtime.h>

#include <utility>

namespace megatron_rl {

// Clusters need a device of compute capability 9.0 and code that was compiled for it. A newer
// device alone does not suffice, since its code may be translated from instructions for an older
// one.
template <typename Args>
bool has_clusters(void (*kernel)(Args)) {
  int device = 0;
  int major = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return false;
  if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess) {
    return false;
  }
  cudaFuncAttributes attributes = {};
  if (cudaFuncGetAttributes(&attributes, kernel) != cudaSuccess) return false;
  return major >= 9 && attributes.ptxVersion >= 90;
}

template <typename Args>
cudaError_t launch_in_clusters(void (*kernel)(Args), const Args& args, int64_t num_rows,
                               int cluster, int threads, cudaStream_t stream) {
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = static_cast<unsigned>(cluster);
  attribute.val.clusterDim.y = 1;
  attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(num_rows * cluster));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, args);
}

// Calls fn(std::integral_constant<int, cluster>), for a cluster of 1, 2, 4 or 8.
template <typename Fn>
auto with_cluster(int cluster, Fn fn) {
  switch (cluster) {
    case 1:
      return fn(std::integral_constant<int, 1>{});
    case 2:
      return fn(std::integral_constant<int, 2>{});
    case 4:
      return fn(std::integral_constant<int, 4>{});
    default:
      return fn(std::integral_constant<int, 8>{});
  }
}

}  // namespace megatron_rl

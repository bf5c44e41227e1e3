#include <cuda_runtime.h>

#include "rescale_if.h"

namespace megatron_rl {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = 8192;  // a grid-stride loop, so that doing nothing costs little

template <typename value_t>
__global__ void __launch_bounds__(kThreads) rescale_if_kernel(RescaleIfArgs<value_t, float> args) {
  if (!args.is_needed()) return;
  const float factor = *args.grad / args.expected;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < args.num_values;
       i += stride) {
    args.x[i] = Narrow<value_t>::from(widen(args.x[i]) * factor);
  }
}

}  // namespace

template <typename value_t>
int launch_rescale_if(const RescaleIfArgs<value_t, float>& args, void* stream) {
  if (args.num_values == 0) return cudaSuccess;  // an empty grid is a launch error
  const int64_t needed = (args.num_values - 1) / kThreads + 1;
  const unsigned blocks = static_cast<unsigned>(needed < kMaxBlocks ? needed : kMaxBlocks);
  rescale_if_kernel<<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(args);
  return cudaGetLastError();
}

template int launch_rescale_if(const RescaleIfArgs<Bf16, float>&, void*);
template int launch_rescale_if(const RescaleIfArgs<Fp16, float>&, void*);
template int launch_rescale_if(const RescaleIfArgs<float, float>&, void*);

}  // namespace megatron_rl

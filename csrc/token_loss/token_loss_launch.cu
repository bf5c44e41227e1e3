#include "token_loss_kernel.cuh"
#include "token_loss_launch.h"

namespace megatron_rl {
namespace {

int64_t num_blocks(int64_t num_tokens) { return (num_tokens + kTokenThreads - 1) / kTokenThreads; }

}  // namespace

int64_t token_loss_scratch(int64_t num_tokens) { return num_blocks(num_tokens) * kNumTotals; }

int launch_token_loss(const TokenLossArgs<float>& args, double* scratch, void* stream) {
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  const int64_t blocks = num_blocks(args.num_tokens);
  if (blocks > 0) {  // an empty grid is a launch error
    token_loss_kernel<<<static_cast<unsigned>(blocks), kTokenThreads, 0, cuda_stream>>>(args,
                                                                                        scratch);
    const cudaError_t error = cudaGetLastError();
    if (error != cudaSuccess) return error;
  }
  token_totals_kernel<<<1, kNumTotals * 32, 0, cuda_stream>>>(args, scratch, blocks);
  return cudaGetLastError();
}

}  // namespace megatron_rl

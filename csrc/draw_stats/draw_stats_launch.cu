#include "../common/device_math.cuh"
#include "draw_stats_launch.h"

namespace megatron_rl {
namespace {

constexpr int kDrawThreads = 512;
constexpr int kWarps = kDrawThreads / 32;

__device__ __forceinline__ Winner<float> better(const Winner<float>& a, const Winner<float>& b) {
  const bool takes_b = b.score > a.score || (b.score == a.score && b.column >= 0 &&
                                             (a.column < 0 || b.column < a.column));
  return takes_b ? b : a;
}

__device__ __forceinline__ Winner<float> from_lane(const Winner<float>& a, int distance) {
  return {__shfl_down_sync(kAllLanes, a.score, distance),
          __shfl_down_sync(kAllLanes, a.z, distance),
          __shfl_down_sync(kAllLanes, a.column, distance)};
}

// Whole on thread 0; fn puts two values together.
template <typename T, typename Shift, typename Fn>
__device__ T fold_threads(T value, T* shared, Shift shift, Fn fn) {
  for (int distance = 16; distance > 0; distance /= 2) value = fn(value, shift(value, distance));
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = value;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int warp = 1; warp < kWarps; ++warp) value = fn(value, shared[warp]);
  }
  return value;
}

// One block per row: its maximum, then its sum and the race.
template <typename logit_t>
__global__ void __launch_bounds__(kDrawThreads) draw_stats_kernel(DrawArgs<logit_t> args) {
  __shared__ float floats[kWarps];
  __shared__ Winner<float> winners[kWarps];
  __shared__ float row_max;
  const int64_t row = blockIdx.x;
  const logit_t* logits = args.logits + row * args.row_stride;
  const double temperature = args.temperatures[row];
  const bool is_greedy = temperature == 0;
  const float inv_temp = is_greedy ? 1.f : static_cast<float>(1.0 / temperature);
  const auto shift = [](float x, int distance) { return __shfl_down_sync(kAllLanes, x, distance); };

  // Reduce the maximum.
  float max = negative_infinity<float>();
  for (int column = threadIdx.x; column < args.num_valid; column += kDrawThreads) {
    max = larger_or_nan(max, widen(logits[column]) * inv_temp);
  }
  max = fold_threads(max, floats, shift, [](float a, float b) { return larger_or_nan(a, b); });
  if (threadIdx.x == 0) row_max = max;
  __syncthreads();
  max = row_max;

  // Race: a thread takes four tokens at a time, which share a counter.
  const RowNoise noise = args.noise_of(row);
  const int64_t behind = args.vocab_start + args.num_valid;
  float sum = 0.f;
  Winner<float> best = {is_greedy ? negative_infinity<float>() : max + kLeastNoise,
                        negative_infinity<float>(), -1};
  for (int64_t counter = args.vocab_start / 4 + threadIdx.x; 4 * counter < behind;
       counter += kDrawThreads) {
    uint32_t words[4] = {0, 0, 0, 0};
    if (!is_greedy) philox(static_cast<uint32_t>(counter), noise, words);
    for (int i = 0; i < 4; ++i) {
      const int64_t column = 4 * counter + i - args.vocab_start;
      if (column < 0 || column >= args.num_valid) continue;
      const float z = widen(logits[column]) * inv_temp;
      sum += std::exp(z - max);
      float score = z;
      if (!is_greedy) {
        const float uniform = static_cast<float>(words[i]) * 0x1p-32f;
        if (uniform > kGenerous * std::exp(z - best.score) + kGenerousUniform) continue;
        score = z + static_cast<float>(gumbel_of(words[i]));
      }
      if (score > best.score) best = {score, z, column};
    }
  }

  // Reduce and store.
  __syncthreads();
  sum = fold_threads(sum, floats, shift, [](float a, float b) { return a + b; });
  best = fold_threads(best, winners, from_lane, better);
  if (threadIdx.x == 0) args.write(row, max, sum, best);
}

}  // namespace

template <typename logit_t>
int launch_draw_stats(const DrawArgs<logit_t>& args, void* stream) {
  if (args.num_rows == 0) return cudaSuccess;  // an empty grid is a launch error
  const unsigned grid = static_cast<unsigned>(args.num_rows);
  draw_stats_kernel<logit_t><<<grid, kDrawThreads, 0, static_cast<cudaStream_t>(stream)>>>(args);
  return cudaGetLastError();
}

template int launch_draw_stats(const DrawArgs<Bf16>&, void*);
template int launch_draw_stats(const DrawArgs<Fp16>&, void*);
template int launch_draw_stats(const DrawArgs<float>&, void*);

}  // namespace megatron_rl

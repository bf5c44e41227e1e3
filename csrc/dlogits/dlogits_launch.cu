#include "dlogits_kernel.cuh"
#include "dlogits_launch.h"

namespace megatron_rl {

template <typename logit_t>
int launch_dlogits(const DlogitsArgs<logit_t, float>& args, void* stream) {
  const auto& rows = args.rows;
  if (rows.num_rows == 0) return cudaSuccess;  // an empty grid is a launch error
  const unsigned grid = static_cast<unsigned>(rows.num_rows);
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  if (is_packable(rows.logits, rows.row_stride, rows.num_columns) &&
      is_packable(args.out, args.out_stride, rows.num_columns)) {
    dlogits_kernel<logit_t, true><<<grid, kRowThreads, 0, cuda_stream>>>(args);
  } else {
    dlogits_kernel<logit_t, false><<<grid, kRowThreads, 0, cuda_stream>>>(args);
  }
  return cudaGetLastError();
}

template int launch_dlogits(const DlogitsArgs<Bf16, float>&, void*);
template int launch_dlogits(const DlogitsArgs<Fp16, float>&, void*);
template int launch_dlogits(const DlogitsArgs<float, float>&, void*);

}  // namespace megatron_rl

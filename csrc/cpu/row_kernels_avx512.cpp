// Compiled with -mavx512f -mavx512bw (setup.py).
#include "row_kernels_impl.h"

namespace megatron_rl {

const RowKernelTable kRowKernelsAvx512 = table("avx512");

}  // namespace megatron_rl

// Compiled with -mavx2 -mfma -mf16c (setup.py).
#include "row_kernels_impl.h"

namespace megatron_rl {

const RowKernelTable kRowKernelsAvx2 = table("avx2");

}  // namespace megatron_rl

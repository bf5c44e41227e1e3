// What is computed of rows on a CPU, compiled once per instruction set: the three loops over a row
// of logits, and those of layers.
#pragma once

#include "../common/logit_types.h"
#include "../dlogits/gradient_row.h"
#include "../draw_stats/draw_stats.h"
#include "../row_stats/row_record.h"
#include "layer_kernels.h"

namespace megatron_rl {

template <typename logit_t>
struct RowKernels {
  using acc_t = compute_t<logit_t>;

  // All but the target of a row's record, from its first num_valid columns.
  RowRecord<acc_t> (*stats)(const logit_t* row, int num_valid, acc_t inv_temp, bool with_entropy);

  // The gradient of a row; out may be row. target is a column or -1. next, if not null, is a row
  // that is read soon: it is brought from memory while this one is computed.
  void (*gradient)(const logit_t* row, logit_t* out, int num_valid, int num_columns, int target,
                   const GradientRow<acc_t>& params, acc_t inv_temp, const logit_t* next);

  // The first token with the largest z + noise. max: of z.
  Winner<acc_t> (*race)(const logit_t* row, int num_valid, acc_t inv_temp, acc_t max,
                        const RowNoise& noise);
};

struct RowKernelTable {
  const char* instruction_set;
  RowKernels<Bf16> bf16;
  RowKernels<Fp16> fp16;
  RowKernels<float> fp32;
  LayerKernels layers;
};

// Those of the running machine; MEGATRON_RL_CPU_ISA=avx512|avx2|baseline asks for others that it
// has, and raises an error where it has not.
const RowKernelTable& row_kernel_table();

extern const RowKernelTable kRowKernelsBaseline;
#if defined(__x86_64__)
extern const RowKernelTable kRowKernelsAvx2;
extern const RowKernelTable kRowKernelsAvx512;
#endif
extern const RowKernels<double> kRowKernelsDouble;

template <typename logit_t>
const RowKernels<logit_t>& row_kernels();
template <>
inline const RowKernels<Bf16>& row_kernels() {
  return row_kernel_table().bf16;
}
template <>
inline const RowKernels<Fp16>& row_kernels() {
  return row_kernel_table().fp16;
}
template <>
inline const RowKernels<float>& row_kernels() {
  return row_kernel_table().fp32;
}
template <>
inline const RowKernels<double>& row_kernels() {
  return kRowKernelsDouble;
}

}  // namespace megatron_rl

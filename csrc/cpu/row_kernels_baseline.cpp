// Compiled for every machine of the architecture; also holds what needs no vectors.
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "row_kernels_impl.h"

namespace megatron_rl {

const RowKernelTable kRowKernelsBaseline = table("baseline");

namespace {

RowRecord<double> stats_of_doubles(const double* row, int num_valid, double inv_temp,
                                   bool with_entropy) {
  double max = negative_infinity<double>();
  for (int i = 0; i < num_valid; ++i) max = larger(row[i], max);
  RowRecord<double> record = {max * inv_temp, 0, 0, negative_infinity<double>()};
  const double reference = max == negative_infinity<double>() ? 0 : max;
  for (int i = 0; i < num_valid; ++i) {
    const double shifted = at_least((row[i] - reference) * inv_temp, kLogZero);
    const double e = std::exp(shifted);
    record.sum += e;
    if (with_entropy) record.weighted += e * shifted;
  }
  return record;
}

void gradient_of_doubles(const double* row, double* out, int num_valid, int num_columns, int target,
                         const GradientRow<double>& params, double inv_temp,
                         const double* /*next*/) {
  if (params.is_zero()) {
    std::memset(out, 0, sizeof(double) * num_columns);
    return;
  }
  for (int i = 0; i < num_valid; ++i) {
    const double log_p = at_least(row[i] * inv_temp - params.log_sum_exp, kLogZero);
    out[i] = std::exp(log_p) * (params.b - params.a * log_p) + (i == target ? params.c : 0);
  }
  std::memset(out + num_valid, 0, sizeof(double) * (num_columns - num_valid));
}

Winner<double> race_of_doubles(const double* row, int num_valid, double inv_temp, double /*max*/,
                               const RowNoise& noise) {
  Winner<double> best = {negative_infinity<double>(), negative_infinity<double>(), -1};
  uint32_t words[kRaceBlock];
  const int64_t behind = noise.vocab_start + num_valid;
  for (int64_t counter = noise.vocab_start / 4; 4 * counter < behind; counter += kCounters) {
    words_of_block(static_cast<uint32_t>(counter), noise, words);
    const int64_t start = 4 * counter - noise.vocab_start;
    for (int i = 0; i < kRaceBlock; ++i) {
      const int64_t column = start + i;
      if (column < 0 || column >= num_valid) continue;
      const double z = row[column] * inv_temp;
      const double score = z + gumbel_of(words[i]);
      if (score > best.score) best = {score, z, column};
    }
  }
  return best;
}

const RowKernelTable& best_table() {
  const char* wanted = std::getenv("MEGATRON_RL_CPU_ISA");
  const auto allows = [&](const char* name) {
    return wanted == nullptr || *wanted == '\0' || std::strcmp(wanted, name) == 0;
  };
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw");
  if (has_avx2 && has_avx512 && allows("avx512")) return kRowKernelsAvx512;
  if (has_avx2 && allows("avx2")) return kRowKernelsAvx2;
#endif
  if (allows("baseline")) return kRowKernelsBaseline;
  throw std::runtime_error("MEGATRON_RL_CPU_ISA=" + std::string(wanted) +
                           ": this processor has no such instructions that the package knows of. "
                           "Unset it, or name avx512, avx2 or baseline");
}

}  // namespace

const RowKernels<double> kRowKernelsDouble = {stats_of_doubles, gradient_of_doubles,
                                              race_of_doubles};

const RowKernelTable& row_kernel_table() {
  static const RowKernelTable& table = best_table();
  return table;
}

}  // namespace megatron_rl

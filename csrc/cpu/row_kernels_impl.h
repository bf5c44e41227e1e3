// The row loops over Vec16. Included by one file per instruction set; all names are local to it.
#pragma once

#include <cstring>

#include "layer_kernels_impl.h"
#include "row_kernels.h"
#include "word16.h"

namespace megatron_rl {
namespace {

constexpr int kBlock = 1024;  // elements whose maximum is found before they are summed: fits L1
constexpr float kLowest = std::numeric_limits<float>::lowest();

// The last, incomplete vector of a row, filled up with -inf, which counts for nothing.
template <typename logit_t>
struct Tail {
  logit_t lane[kLanes];
  int size;

  MRL_INLINE Tail(const logit_t* from, int count) : size(count) {
    Vec16::all(-std::numeric_limits<float>::infinity()).store(lane);
    std::memcpy(lane, from, sizeof(logit_t) * count);
  }
};

struct Accumulator {
  float max = kLowest;
  float sum = 0.f;
  float weighted = 0.f;  // of exponents of 2

  MRL_INLINE void raise_max(float candidate, float scale) {
    if (!(candidate > max)) return;
    const float shift = at_least((max - candidate) * scale, static_cast<float>(kLogZero));
    const float factor = std::exp2(shift);
    weighted = factor * (weighted + sum * shift);
    sum = factor * sum;
    max = candidate;
  }
};

template <bool kEntropy>
struct BlockSum {
  Vec16 sum = Vec16::all(0.f);
  Vec16 weighted = Vec16::all(0.f);

  MRL_INLINE void add(Vec16 x, Vec16 max, Vec16 scale) {
    // Where e is 0 the product is 0, not NaN.
    const Vec16 exponent = megatron_rl::max(Vec16::all(kExp2Floor), (x - max) * scale);
    const Vec16 e = exp2(exponent);
    sum = sum + e;
    if (kEntropy) weighted = fma(e, exponent, weighted);
  }
};

template <bool kEntropy, typename logit_t>
MRL_INLINE void add_block(Accumulator& total, const logit_t* block, int count, float scale) {
  const int whole = count - count % kLanes;
  const Tail<logit_t> tail(block + whole, count - whole);
  Vec16 max = Vec16::load(tail.lane);
  for (int i = 0; i < whole; i += kLanes) max = megatron_rl::max(max, Vec16::load(block + i));
  total.raise_max(megatron_rl::max(max), scale);

  const Vec16 block_max = Vec16::all(total.max);
  const Vec16 scales = Vec16::all(scale);
  BlockSum<kEntropy> part;
  for (int i = 0; i < whole; i += kLanes) part.add(Vec16::load(block + i), block_max, scales);
  if (tail.size > 0) part.add(Vec16::load(tail.lane), block_max, scales);
  total.sum += sum(part.sum);
  if (kEntropy) total.weighted += sum(part.weighted);
}

template <typename logit_t>
RowRecord<float> stats_of_row(const logit_t* row, int num_valid, float inv_temp,
                              bool with_entropy) {
  const float scale = inv_temp * static_cast<float>(kLog2E);
  Accumulator total;
  for (int start = 0; start < num_valid; start += kBlock) {
    const int count = num_valid - start < kBlock ? num_valid - start : kBlock;
    if (with_entropy) {
      add_block<true>(total, row + start, count, scale);
    } else {
      add_block<false>(total, row + start, count, scale);
    }
  }
  RowRecord<float> record;
  record.max = total.max == kLowest ? negative_infinity<float>() : total.max * inv_temp;
  record.sum = total.sum;
  record.weighted = total.weighted * static_cast<float>(kLn2);
  record.target = negative_infinity<float>();
  return record;
}

// p * (b - a * log p), with all constants in lanes.
struct GradientLanes {
  Vec16 scale, minus_log_sum, a, b;
  bool has_entropy;

  MRL_INLINE GradientLanes(const GradientRow<float>& params, float inv_temp)
      : scale(Vec16::all(inv_temp * static_cast<float>(kLog2E))),
        minus_log_sum(Vec16::all(-params.log_sum_exp * static_cast<float>(kLog2E))),
        a(Vec16::all(-params.a * static_cast<float>(kLn2))),
        b(Vec16::all(params.b)),
        has_entropy(params.a != 0.f) {}

  template <bool kEntropy>
  MRL_INLINE Vec16 at(Vec16 x) const {
    const Vec16 exponent = megatron_rl::max(Vec16::all(kExp2Floor), fma(x, scale, minus_log_sum));
    const Vec16 p = exp2(exponent);
    return kEntropy ? p * fma(a, exponent, b) : p * b;
  }
};

// To the second-level cache, which holds several rows of any vocabulary of today.
template <typename logit_t>
MRL_INLINE void prefetch(const logit_t* p) {
  __builtin_prefetch(p, /*for writing=*/0, /*locality=*/2);
}

template <bool kEntropy, typename logit_t>
MRL_INLINE void write_gradient(const GradientLanes& lanes, const logit_t* row, logit_t* out,
                               int count, const logit_t* next) {
  const int whole = count - count % kLanes;
  for (int i = 0; i < whole; i += kLanes) {
    if (next != nullptr) prefetch(next + i);
    lanes.at<kEntropy>(Vec16::load(row + i)).store(out + i);
  }
  if (whole == count) return;
  Tail<logit_t> tail(row + whole, count - whole);
  lanes.at<kEntropy>(Vec16::load(tail.lane)).store(tail.lane);
  std::memcpy(out + whole, tail.lane, sizeof(logit_t) * tail.size);
}

template <typename logit_t>
void gradient_of_row(const logit_t* row, logit_t* out, int num_valid, int num_columns, int target,
                     const GradientRow<float>& params, float inv_temp, const logit_t* next) {
  if (params.is_zero()) {
    std::memset(out, 0, sizeof(logit_t) * num_columns);
    return;
  }
  const GradientLanes lanes(params, inv_temp);
  float at_target = params.c;
  if (target >= 0) {  // before it may be overwritten
    float value[kLanes];
    const Vec16 x = Vec16::all(widen(row[target]));
    (lanes.has_entropy ? lanes.at<true>(x) : lanes.at<false>(x)).store(value);
    at_target += value[0];
  }
  if (lanes.has_entropy) {
    write_gradient<true>(lanes, row, out, num_valid, next);
  } else {
    write_gradient<false>(lanes, row, out, num_valid, next);
  }
  if (target >= 0) out[target] = Narrow<logit_t>::from(at_target);
  std::memset(out + num_valid, 0, sizeof(logit_t) * (num_columns - num_valid));
}

constexpr int kCounters = kLanes;          // of Philox, of a block of the race
constexpr int kRaceBlock = 4 * kCounters;  // tokens

// Words of the tokens 4 * first to 4 * first + 63; see philox.
MRL_INLINE void words_of_block(uint32_t first, const RowNoise& noise, uint32_t* words) {
  Word16 c0 = Word16::from(first), c1 = Word16::all(noise.place);
  Word16 c2 = Word16::all(0), c3 = Word16::all(0);
  uint32_t key0 = noise.key0, key1 = noise.key1;
  for (int round = 0; round < kPhiloxRounds; ++round) {
    Word16 high0, low0, high1, low1;
    multiply(c0, Word16::all(kPhiloxFactor0), high0, low0);
    multiply(c2, Word16::all(kPhiloxFactor1), high1, low1);
    c0 = high1 ^ c1 ^ Word16::all(key0);
    c1 = low1;
    c2 = high0 ^ c3 ^ Word16::all(key1);
    c3 = low0;
    key0 += kPhiloxWeyl0;
    key1 += kPhiloxWeyl1;
  }
  store_by_turns(c0, c1, c2, c3, words);
}

// A block of which only the first columns are there, filled up as a Tail is.
template <typename logit_t>
struct Part {
  logit_t lane[kRaceBlock];

  MRL_INLINE Part(const logit_t* from, int64_t count) {
    for (int i = 0; i < kRaceBlock; i += kLanes) {
      Vec16::all(-std::numeric_limits<float>::infinity()).store(lane + i);
    }
    std::memcpy(lane, from, sizeof(logit_t) * count);
  }
};

// Whether any of a block may win; see kGenerous. 2^x is at most the float whose bits are
// (x + 127) * 2^23, which is a straight line from one power to the next, and 1.06 times 2^x at
// most.
template <typename logit_t>
MRL_INLINE bool may_win(const logit_t* block, const uint32_t* words, float scale, float best) {
  constexpr float kOne = 0x1p23f, kBias = 127.f, kMost = 0x1.fep30f;  // of bits
  const Vec16 scales = Vec16::all(scale * kOne);
  const Vec16 offset = Vec16::all((kBias - best * static_cast<float>(kLog2E)) * kOne);
  float bits[kRaceBlock];
  for (int i = 0; i < kRaceBlock; i += kLanes) {
    fma(Vec16::load(block + i), scales, offset).store(bits + i);
  }
  int may = 0;
  for (int i = 0; i < kRaceBlock; ++i) {
    const float held = bits[i] > 0.f ? (bits[i] < kMost ? bits[i] : kMost) : 0.f;
    const int32_t whole = static_cast<int32_t>(held);
    float power;
    std::memcpy(&power, &whole, sizeof power);
    const float uniform = static_cast<float>(words[i]) * 0x1p-32f;
    may |= power * kGenerous + kGenerousUniform > uniform;
  }
  return may != 0;
}

template <typename logit_t>
Winner<float> race_of_row(const logit_t* row, int num_valid, float inv_temp, float max,
                          const RowNoise& noise) {
  Winner<float> best = {max + kLeastNoise, negative_infinity<float>(), -1};
  const float scale = inv_temp * static_cast<float>(kLog2E);
  uint32_t words[kRaceBlock];
  const int64_t first_counter = noise.vocab_start / 4;
  const int64_t behind = noise.vocab_start + num_valid;
  for (int64_t counter = first_counter; 4 * counter < behind; counter += kCounters) {
    words_of_block(static_cast<uint32_t>(counter), noise, words);
    const int64_t start = 4 * counter - noise.vocab_start;  // column of the block's first token
    const int64_t left = num_valid - start;
    const bool may =
        start < 0 ||
        (left < kRaceBlock ? may_win(Part(row + start, left).lane, words, scale, best.score)
                           : may_win(row + start, words, scale, best.score));
    if (!may) continue;
    for (int i = 0; i < kRaceBlock; ++i) {
      const int64_t column = start + i;
      if (column < 0 || column >= num_valid) continue;
      const float z = widen(row[column]) * inv_temp;
      const float uniform = static_cast<float>(words[i]) * 0x1p-32f;
      if (uniform > kGenerous * std::exp(z - best.score) + kGenerousUniform) continue;
      const float score = z + static_cast<float>(gumbel_of(words[i]));
      if (score > best.score) best = {score, z, column};
    }
  }
  return best;
}

constexpr RowKernelTable table(const char* instruction_set) {
  return {instruction_set,
          {stats_of_row<Bf16>, gradient_of_row<Bf16>, race_of_row<Bf16>},
          {stats_of_row<Fp16>, gradient_of_row<Fp16>, race_of_row<Fp16>},
          {stats_of_row<float>, gradient_of_row<float>, race_of_row<float>},
          kLayerKernels};
}

}  // namespace
}  // namespace megatron_rl

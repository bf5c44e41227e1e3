#include <memory>

#include "../common/tensors.h"
#include "../cpu/row_kernels.h"
#include "draw_stats.h"

namespace megatron_rl {
namespace {

constexpr int64_t kBlockFloats = 1 << 17;  // logits of a block: with the rest they stay in a cache

struct HeadRows {
  const float* hidden;  // [T, H]
  const float* weight;  // [V, H]
  int64_t num_rows, inner, num_valid, vocab_start;
  const int64_t* seeds;
  const int64_t* places;
  const double* temperatures;
};

// The two records of the same row, of which the first has the smaller ids.
DrawRecord joined(const DrawRecord& one, const DrawRecord& other) {
  const double max = std::max(one.max, other.max);
  const auto share = [max](const DrawRecord& part) {
    return part.sum == 0 ? 0.0 : part.sum * std::exp(part.max - max);
  };
  const DrawRecord& best = other.score > one.score ? other : one;
  return {max, share(one) + share(other), best.score, best.z, best.token};
}

// What draw_stats records of a row, of `count` logits of it. bound: what others have scored before;
// who is not above it need not be found.
DrawRecord draw_of_block(const HeadRows& args, int64_t row, const float* logits, int64_t first,
                         int count, double bound) {
  const auto& kernels = row_kernels<float>();
  const bool is_greedy = args.temperatures[row] == 0;
  const float inv_temp = is_greedy ? 1.f : static_cast<float>(1.0 / args.temperatures[row]);
  const RowRecord<float> sums = kernels.stats(logits, count, inv_temp, false);
  const double start = args.vocab_start + first;
  if (is_greedy) {
    int column = 0;
    while (column < count && logits[column] != sums.max) ++column;
    if (column == count) return {sums.max, sums.sum, negative_infinity<double>(), 0, start};
    return {sums.max, sums.sum, sums.max, sums.max, start + column};
  }
  const float floor = std::max(sums.max, static_cast<float>(bound) - kLeastNoise);
  const uint64_t seed = static_cast<uint64_t>(args.seeds[row]);
  const RowNoise noise = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32),
                          static_cast<uint32_t>(args.places[row]), args.vocab_start + first};
  const Winner<float> best = kernels.race(logits, count, inv_temp, floor, noise);
  if (best.column < 0) return {sums.max, sums.sum, negative_infinity<double>(), 0, start};
  return {sums.max, sums.sum, best.score, best.z, start + static_cast<double>(best.column)};
}

Tensor draw_from_head(const Tensor& hidden, const Tensor& weight, const Tensor& seeds,
                      const Tensor& places, const Tensor& temperatures, int64_t vocab_start,
                      int64_t valid_vocab) {
  const Checks checks("draw_from_head", hidden, "hidden");
  checks.that(hidden.dim() == 2, "hidden", "shape [T, H]", ShapeOf{hidden});
  checks.that(weight.dim() == 2, "weight", "shape [V, H]", ShapeOf{weight});
  const int64_t num_rows = hidden.size(0), inner = hidden.size(1);
  checks.dense(hidden, "hidden", ScalarType::Float, {num_rows, inner});
  checks.dense(weight, "weight", ScalarType::Float, {weight.size(0), inner});
  checks.dense(seeds, "seeds", ScalarType::Long, {num_rows});
  checks.dense(places, "places", ScalarType::Long, {num_rows});
  checks.dense(temperatures, "temperatures", ScalarType::Double, {num_rows});
  checks.that(vocab_start >= 0, "vocab_start", "at least 0", std::to_string(vocab_start));
  const int64_t num_valid =
      std::min(std::max<int64_t>(valid_vocab - vocab_start, 0), weight.size(0));
  const HeadRows args = {input<float>(hidden),
                         input<float>(weight),
                         num_rows,
                         inner,
                         num_valid,
                         vocab_start,
                         input<int64_t>(seeds),
                         input<int64_t>(places),
                         input<double>(temperatures)};
  Tensor stats = new_tensor(hidden, {num_rows, 5}, ScalarType::Double);
  DrawRecord* records = output<DrawRecord>(stats);
  const double none = negative_infinity<double>();
  std::fill_n(records, num_rows, DrawRecord{none, 0, none, none, 0});
  if (num_rows == 0 || num_valid == 0) return stats;

  // Whole vectors of words of the noise, and so many columns that a block's logits fit.
  const int64_t columns = std::max<int64_t>(64, kBlockFloats / num_rows / 64 * 64);
  const int64_t num_blocks = (num_valid + columns - 1) / columns;
  const auto& kernels = row_kernel_table().layers;
  std::vector<DrawRecord> of_blocks(num_blocks * num_rows);
  for_rows(num_blocks, 2 * columns * num_rows * inner, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<float[]> packed(
        new float[std::min<int64_t>(inner, kMostInner) * kMostTileColumns]);
    const std::unique_ptr<float[]> logits(new float[num_rows * columns]);
    std::vector<double> bounds(num_rows, none);
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * columns;
      const int count = static_cast<int>(std::min(columns, num_valid - first));
      const ProductArgs product = {.left = args.hidden,
                                   .left_stride = inner,
                                   .right = args.weight + first * inner,
                                   .right_stride_of_k = 1,
                                   .right_stride_of_column = inner,
                                   .out = logits.get(),
                                   .out_stride = columns,
                                   .rows = static_cast<int>(num_rows),
                                   .inner = static_cast<int>(inner),
                                   .columns = count,
                                   .adds = false,
                                   .ahead = {}};
      kernels.multiply(product, packed.get());
      for (int64_t row = 0; row < num_rows; ++row) {
        DrawRecord& own = of_blocks[block * num_rows + row];
        own = draw_of_block(args, row, logits.get() + row * columns, first, count, bounds[row]);
        bounds[row] = std::max(bounds[row], own.score);
      }
    }
  });
  for (int64_t block = 0; block < num_blocks; ++block) {
    for (int64_t row = 0; row < num_rows; ++row) {
      const DrawRecord& own = of_blocks[block * num_rows + row];
      records[row] = block == 0 ? own : joined(records[row], own);
    }
  }
  return stats;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(megatron_rl, CPU, m) {
  m.impl("draw_from_head", TORCH_BOX(&draw_from_head));
}

}  // namespace megatron_rl

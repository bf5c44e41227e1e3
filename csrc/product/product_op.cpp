#include <memory>

#include "../common/tensors.h"
#include "../cpu/row_kernels.h"

namespace megatron_rl {
namespace {

// Rows of a left factor that is contiguous in them: whole tiles, and whole vectors to transpose.
constexpr int64_t kRowsOfBlock = 96;

struct Factors {
  Tensor left, right;
  int64_t rows, inner, columns;

  bool is_left_transposed() const { return left.stride(1) != 1 && inner > 1; }
};

// The part of the result that one thread makes.
struct Part {
  int64_t row, column, rows, columns;
};

ProductArgs args_of(const Factors& factors, const Part& part, const Tensor& out, bool adds) {
  const Tensor& right = factors.right;
  return {.left = input<float>(factors.left) + part.row * factors.left.stride(0),
          .left_stride = factors.left.stride(0),
          .right = input<float>(right) + part.column * right.stride(1),
          .right_stride_of_k = right.stride(0),
          .right_stride_of_column = right.stride(1),
          .out = output<float>(out) + part.row * out.stride(0) + part.column,
          .out_stride = out.stride(0),
          .rows = static_cast<int>(part.rows),
          .inner = static_cast<int>(factors.inner),
          .columns = static_cast<int>(part.columns),
          .adds = adds,
          .ahead = {}};
}

void multiply_part(const Factors& factors, const Part& part, const Tensor& out, bool adds) {
  const auto& kernels = row_kernel_table().layers;
  const ProductArgs whole = args_of(factors, part, out, adds);
  const int64_t most = std::min<int64_t>(factors.inner, kMostInner);
  const std::unique_ptr<float[]> packed(new float[most * kMostTileColumns]);
  if (!factors.is_left_transposed()) {
    return kernels.multiply(whole, packed.get());
  }
  const std::unique_ptr<float[]> left(new float[kRowsOfBlock * most]);
  for (int64_t row = 0; row < part.rows; row += kRowsOfBlock) {
    for (int64_t k = 0; k < factors.inner; k += most) {
      ProductArgs args = whole;
      args.rows = static_cast<int>(std::min(kRowsOfBlock, part.rows - row));
      args.inner = static_cast<int>(std::min(most, factors.inner - k));
      const int64_t stride_of_k = factors.left.stride(1);
      kernels.pack_rows(whole.left + row + k * stride_of_k, stride_of_k, args.rows, args.inner,
                        left.get());
      args.left = left.get();
      args.left_stride = args.inner;
      args.right += k * args.right_stride_of_k;
      args.out += row * args.out_stride;
      args.adds = adds || k > 0;
      // The next block of left, if it is as large as this one.
      const bool is_last = factors.inner - k < 2 * args.inner;
      const int64_t next_row = row + (is_last ? kRowsOfBlock : 0), next_k = is_last ? 0 : k + most;
      const bool is_whole = part.rows - next_row >= kRowsOfBlock;
      args.ahead = {whole.left + next_row + next_k * stride_of_k, stride_of_k,
                    is_whole ? static_cast<int>(kRowsOfBlock) / 16 : 0};
      kernels.multiply(args, packed.get());
    }
  }
}

// Elements of a row, or those of a column, are neighbours.
void check_factor(const Checks& checks, const Tensor& factor, const char* argument) {
  checks.that(factor.dim() == 2, argument, "two dimensions", ShapeOf{factor});
  checks.that(factor.scalar_type() == ScalarType::Float, argument, ScalarType::Float,
              factor.scalar_type());
  const bool is_dense = factor.stride(0) == 1 || factor.stride(1) == 1 || factor.numel() <= 1;
  checks.that(is_dense, argument, "rows or columns of stride 1", StridesOf{factor});
  checks.same_device(factor, argument);
}

void multiply_(const Tensor& left, const Tensor& right, Tensor out, bool adds) {
  const Checks checks("multiply_", left, "left");
  check_factor(checks, left, "left");
  check_factor(checks, right, "right");
  const int64_t rows = left.size(0), inner = left.size(1), columns = right.size(1);
  checks.that(inner > 0, "left", "at least one column", ShapeOf{left});
  checks.that(right.size(0) == inner, "right", "as many rows as left has columns", ShapeOf{right});
  checks.that(out.dim() == 2 && out.size(0) == rows && out.size(1) == columns, "out",
              Sizes{rows, columns}, ShapeOf{out});
  checks.that(out.scalar_type() == ScalarType::Float, "out", ScalarType::Float, out.scalar_type());
  checks.rows(out, "out", true);
  checks.same_device(out, "out");
  const Factors factors = {left, right, rows, inner, columns};
  if (rows == 0 || columns == 0) return;

  // The longer side is cut into whole tiles, of which each thread has a run.
  const bool cuts_rows = rows >= columns;
  const int64_t unit = cuts_rows ? kRowsOfBlock : kMostTileColumns;
  const int64_t length = cuts_rows ? rows : columns;
  const int64_t num_units = (length + unit - 1) / unit;
  for_rows(
      num_units, unit * (cuts_rows ? columns : rows) * inner / 16, [&](int64_t begin, int64_t end) {
        const int64_t first = begin * unit, count = std::min(end * unit, length) - first;
        const Part part = cuts_rows ? Part{first, 0, count, columns} : Part{0, first, rows, count};
        multiply_part(factors, part, out, adds);
      });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(megatron_rl, CPU, m) { m.impl("multiply_", TORCH_BOX(&multiply_)); }

}  // namespace megatron_rl

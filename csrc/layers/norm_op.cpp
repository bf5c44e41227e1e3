#include <tuple>

#include "../common/tensors.h"
#include "../cpu/row_kernels.h"

namespace megatron_rl {
namespace {

// Rows whose gradients of the weight are added up by themselves, so that the order of a sum does
// not depend on the number of threads.
constexpr int64_t kBlock = 256;

int64_t width_of(const Checks& checks, const Tensor& x, const Tensor& weight) {
  checks.that(x.dim() > 0 && x.size(x.dim() - 1) > 0, "x", "shape [..., H]", ShapeOf{x});
  const int64_t size = x.size(x.dim() - 1);
  checks.dense(x, "x", ScalarType::Float, Sizes(x.sizes().begin(), x.sizes().end()));
  checks.dense(weight, "weight", ScalarType::Float, {size});
  return size;
}

std::tuple<Tensor, Tensor> rms_norm(const Tensor& x, const Tensor& weight, double eps) {
  const Checks checks("rms_norm", x, "x");
  const int64_t size = width_of(checks, x, weight), rows = x.numel() / size;
  Tensor normed = new_tensor(x, Sizes(x.sizes().begin(), x.sizes().end()), ScalarType::Float);
  Tensor inverse = new_tensor(x, {rows}, ScalarType::Float);
  const auto& kernels = row_kernel_table().layers;
  for_rows(rows, 2 * size, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      output<float>(inverse)[row] =
          kernels.norm(input<float>(x) + row * size, input<float>(weight), static_cast<float>(eps),
                       static_cast<int>(size), output<float>(normed) + row * size);
    }
  });
  return {normed, inverse};
}

std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& grad, const Tensor& x,
                                             const Tensor& weight, const Tensor& inverse) {
  const Checks checks("rms_norm_backward", x, "x");
  const int64_t size = width_of(checks, x, weight), rows = x.numel() / size;
  const Sizes shape(x.sizes().begin(), x.sizes().end());
  checks.dense(grad, "grad", ScalarType::Float, shape);
  checks.dense(inverse, "inverse", ScalarType::Float, {rows});
  Tensor grad_x = new_tensor(x, shape, ScalarType::Float);
  Tensor grad_weight = new_tensor(x, {size}, ScalarType::Float);
  const int64_t blocks = (rows + kBlock - 1) / kBlock;
  std::vector<float> sums(blocks * size, 0.f);
  const auto& kernels = row_kernel_table().layers;
  for_rows(blocks, 4 * size * kBlock, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin * kBlock; row < std::min(rows, end * kBlock); ++row) {
      const int64_t at = row * size;
      kernels.norm_backward(input<float>(grad) + at, input<float>(x) + at, input<float>(weight),
                            input<float>(inverse)[row], static_cast<int>(size),
                            output<float>(grad_x) + at, sums.data() + row / kBlock * size);
    }
  });
  for (int64_t column = 0; column < size; ++column) {
    float total = 0.f;
    for (int64_t block = 0; block < blocks; ++block) total += sums[block * size + column];
    output<float>(grad_weight)[column] = total;
  }
  return {grad_x, grad_weight};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(megatron_rl, CPU, m) {
  m.impl("rms_norm", TORCH_BOX(&rms_norm));
  m.impl("rms_norm_backward", TORCH_BOX(&rms_norm_backward));
}

}  // namespace megatron_rl

#include "../common/tensors.h"
#include "../cpu/row_kernels.h"

namespace megatron_rl {
namespace {

// x [..., 2 * size]: gates, and behind them what they let through.
int64_t half_of(const Checks& checks, const Tensor& x) {
  const bool is_even = x.dim() > 0 && x.size(x.dim() - 1) % 2 == 0;
  checks.that(is_even, "x", "an even last dimension", ShapeOf{x});
  checks.dense(x, "x", ScalarType::Float, Sizes(x.sizes().begin(), x.sizes().end()));
  return x.size(x.dim() - 1) / 2;
}

int64_t rows_of(const Tensor& x, int64_t size) { return size == 0 ? 0 : x.numel() / size; }

Sizes with_last(const Tensor& x, int64_t size) {
  Sizes shape(x.sizes().begin(), x.sizes().end());
  shape.back() = size;
  return shape;
}

Tensor swiglu(const Tensor& x) {
  const Checks checks("swiglu", x, "x");
  const int64_t size = half_of(checks, x);
  Tensor out = new_tensor(x, with_last(x, size), ScalarType::Float);
  const auto& kernels = row_kernel_table().layers;
  for_rows(rows_of(x, 2 * size), 8 * size, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const float* gate = input<float>(x) + row * 2 * size;
      kernels.swiglu(gate, gate + size, static_cast<int>(size), output<float>(out) + row * size);
    }
  });
  return out;
}

Tensor swiglu_backward(const Tensor& grad, const Tensor& x) {
  const Checks checks("swiglu_backward", x, "x");
  const int64_t size = half_of(checks, x);
  checks.dense(grad, "grad", ScalarType::Float, with_last(x, size));
  Tensor out = new_tensor(x, with_last(x, 2 * size), ScalarType::Float);
  const auto& kernels = row_kernel_table().layers;
  for_rows(rows_of(x, 2 * size), 8 * size, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const float* gate = input<float>(x) + row * 2 * size;
      float* target = output<float>(out) + row * 2 * size;
      kernels.swiglu_backward(input<float>(grad) + row * size, gate, gate + size,
                              static_cast<int>(size), target, target + size);
    }
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(megatron_rl, CPU, m) {
  m.impl("swiglu", TORCH_BOX(&swiglu));
  m.impl("swiglu_backward", TORCH_BOX(&swiglu_backward));
}

}  // namespace megatron_rl

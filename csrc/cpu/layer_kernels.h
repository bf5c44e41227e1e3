// What layers of the policy do to a row of float32 on a CPU, compiled once per instruction set.
#pragma once

#include <cstdint>

namespace megatron_rl {

constexpr int kMostTileColumns = 48;  // of multiply, on any instruction set

struct LayerKernels {
  // A head [2 * half] whose halves turn together: each product and each sum is rounded.
  void (*turn)(const float* head, const float* cos, const float* sin, float sign, int half,
               float* out);

  // silu(gate) * up, [size] each.
  void (*swiglu)(const float* gate, const float* up, int size, float* out);
  void (*swiglu_backward)(const float* grad, const float* gate, const float* up, int size,
                          float* grad_gate, float* grad_up);

  // row * weight / rms(row), [size] each; gives 1 / rms.
  float (*norm)(const float* row, const float* weight, float eps, int size, float* out);
  // The gradient of the weight is added to grad_weight.
  void (*norm_backward)(const float* grad, const float* row, const float* weight, float inverse,
                        int size, float* grad_row, float* grad_weight);

  // Attention of one query [size] to count keys and values [count, size]. scores: [count], room.
  void (*attend)(const float* query, const float* keys, const float* values, int64_t count,
                 int size, float scale, float* scores, float* out);

  // out [rows, columns] = left [rows, inner] times weight [columns, inner], transposed; for few
  // rows. packed: [inner * kMostTileColumns], room.
  void (*multiply)(const float* left, int rows, const float* weight, int columns, int inner,
                   float* packed, float* out, int64_t out_stride);
};

}  // namespace megatron_rl

// What layers of the policy do to a row of float32 on a CPU, compiled once per instruction set.
#pragma once

#include <cstdint>

namespace megatron_rl {

constexpr int kMostTileColumns = 48;  // of multiply, on any instruction set

struct Ahead {  // what is fetched meanwhile: `lines` cache lines for each k
  const float* from;
  int64_t stride_of_k;
  int lines;
};

struct ProductArgs {
  const float* left;  // [rows, inner], contiguous in inner
  int64_t left_stride;
  const float* right;  // [inner, columns], contiguous in one of them
  int64_t right_stride_of_k, right_stride_of_column;
  float* out;  // [rows, columns], contiguous in columns
  int64_t out_stride;
  int rows, inner, columns;
  bool adds;    // to what is in out
  Ahead ahead;  // in the last panel of columns
};

// A sum is taken in blocks of so many products: its rounding grows by their number, and a block's
// part of both factors stays in a cache. What a wide result has taken so far comes from memory
// again.
constexpr int kMostInner = 768;

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

  // out = left times right. packed: [min(inner, kMostInner) * kMostTileColumns], room.
  void (*multiply)(const ProductArgs& args, float* packed);
  // packed[row * inner + k] of rows whose elements of one k are neighbours.
  void (*pack_rows)(const float* from, int64_t stride_of_k, int rows, int inner, float* packed);
};

}  // namespace megatron_rl

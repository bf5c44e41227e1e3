// The loops of LayerKernels over Vec16. Included by one file per instruction set; all names are
// local to it.
#pragma once

#include <cmath>
#include <cstring>

#include "layer_kernels.h"
#include "product_impl.h"
#include "vec16.h"

namespace megatron_rl {
namespace {

void turn_head(const float* head, const float* cos, const float* sin, float sign, int half,
               float* out) {
  const Vec16 signs = Vec16::all(sign);
  for (int i = 0; i < half; i += kLanes) {
    const int count = half - i;
    const Vec16 first = load_some(head + i, count), second = load_some(head + half + i, count);
    const Vec16 c = load_some(cos + i, count), s = load_some(sin + i, count);
    store_some(first * c - signs * (second * s), out + i, count);
    store_some(second * c + signs * (first * s), out + half + i, count);
  }
}

// The exponent is held where exp2 is exact to rounding on every instruction set.
MRL_INLINE Vec16 sigmoid(Vec16 x) {
  const Vec16 bounded = max(Vec16::all(-126.f), x * Vec16::all(static_cast<float>(kLog2E)));
  const Vec16 exponent = max(Vec16::all(-126.f), Vec16::all(0.f) - bounded);
  return Vec16::all(1.f) / (Vec16::all(1.f) + exp2(exponent));
}

void swiglu_of_row(const float* gate, const float* up, int size, float* out) {
  for (int i = 0; i < size; i += kLanes) {
    const Vec16 x = load_some(gate + i, size - i);
    store_some(x * sigmoid(x) * load_some(up + i, size - i), out + i, size - i);
  }
}

void swiglu_backward_of_row(const float* grad, const float* gate, const float* up, int size,
                            float* grad_gate, float* grad_up) {
  const Vec16 one = Vec16::all(1.f);
  for (int i = 0; i < size; i += kLanes) {
    const int count = size - i;
    const Vec16 g = load_some(grad + i, count), x = load_some(gate + i, count);
    const Vec16 share = sigmoid(x);
    const Vec16 slope = share * fma(x, one - share, one);
    store_some(g * load_some(up + i, count) * slope, grad_gate + i, count);
    store_some(g * (x * share), grad_up + i, count);
  }
}

float norm_row(const float* row, const float* weight, float eps, int size, float* out) {
  Vec16 squares = Vec16::all(0.f);
  for (int i = 0; i < size; i += kLanes) {
    const Vec16 x = load_some(row + i, size - i);
    squares = fma(x, x, squares);
  }
  const float inverse = 1.f / std::sqrt(sum(squares) / static_cast<float>(size) + eps);
  const Vec16 scale = Vec16::all(inverse);
  for (int i = 0; i < size; i += kLanes) {
    const Vec16 normed = load_some(row + i, size - i) * scale;
    store_some(normed * load_some(weight + i, size - i), out + i, size - i);
  }
  return inverse;
}

void norm_backward_of_row(const float* grad, const float* row, const float* weight, float inverse,
                          int size, float* grad_row, float* grad_weight) {
  const Vec16 scale = Vec16::all(inverse);
  Vec16 along = Vec16::all(0.f);  // of the normed row, in the direction of the gradient
  for (int i = 0; i < size; i += kLanes) {
    const int count = size - i;
    const Vec16 g = load_some(grad + i, count), normed = load_some(row + i, count) * scale;
    store_some(fma(g, normed, load_some(grad_weight + i, count)), grad_weight + i, count);
    along = fma(g * load_some(weight + i, count), normed, along);
  }
  const Vec16 mean = Vec16::all(sum(along) / static_cast<float>(size));
  for (int i = 0; i < size; i += kLanes) {
    const int count = size - i;
    const Vec16 normed = load_some(row + i, count) * scale;
    const Vec16 g = load_some(grad + i, count) * load_some(weight + i, count);
    store_some(scale * (g - mean * normed), grad_row + i, count);
  }
}

MRL_INLINE float dot(const float* a, const float* b, int size) {
  Vec16 total = Vec16::all(0.f);
  for (int i = 0; i < size; i += kLanes) {
    total = fma(load_some(a + i, size - i), load_some(b + i, size - i), total);
  }
  return sum(total);
}

// Scores become weights, which are left without the division by their sum, which is given back.
MRL_INLINE float weights_of(float* scores, int64_t count, float scale) {
  float most = scores[0];
  for (int64_t t = 1; t < count; ++t) most = scores[t] > most ? scores[t] : most;
  const Vec16 scales = Vec16::all(scale * static_cast<float>(kLog2E)), max_score = Vec16::all(most);
  Vec16 total = Vec16::all(0.f);
  for (int64_t t = 0; t < count; t += kLanes) {
    const int left = count - t < kLanes ? static_cast<int>(count - t) : kLanes;
    const Vec16 exponent = (load_some(scores + t, left) - max_score) * scales;
    const Vec16 weight = exp2(max(Vec16::all(kExp2Floor), exponent));
    store_some(weight, scores + t, left);
    total = total + load_some(scores + t, left);  // without what stands behind the last one
  }
  return sum(total);
}

void attend_to_keys(const float* query, const float* keys, const float* values, int64_t count,
                    int size, float scale, float* scores, float* out) {
  for (int64_t t = 0; t < count; ++t) scores[t] = dot(query, keys + t * size, size);
  const Vec16 share = Vec16::all(1.f / weights_of(scores, count, scale));
  for (int i = 0; i < size; i += kLanes) {
    Vec16 even = Vec16::all(0.f), odd = even;  // two chains, since each waits for its last sum
    int64_t t = 0;
    for (; t + 1 < count; t += 2) {
      const float* value = values + t * size + i;
      even = fma(Vec16::all(scores[t]), load_some(value, size - i), even);
      odd = fma(Vec16::all(scores[t + 1]), load_some(value + size, size - i), odd);
    }
    if (t < count) {
      even = fma(Vec16::all(scores[t]), load_some(values + t * size + i, size - i), even);
    }
    store_some((even + odd) * share, out + i, size - i);
  }
}

constexpr LayerKernels kLayerKernels = {turn_head,
                                        swiglu_of_row,
                                        swiglu_backward_of_row,
                                        norm_row,
                                        norm_backward_of_row,
                                        attend_to_keys,
                                        multiply,
                                        pack_rows};

}  // namespace
}  // namespace megatron_rl

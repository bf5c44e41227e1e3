// Reductions over what ranks have written, always in the order of the ranks. No torch.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "../common/logit_types.h"

namespace megatron_rl {

enum class Reduction : int64_t { kSum = 0, kMax = 1, kMin = 2 };

template <typename value_t>
struct Reduced {  // the type in which values are added
  using type = std::conditional_t<std::is_same_v<value_t, Bf16> || std::is_same_v<value_t, Fp16>,
                                  float, value_t>;
  static type of(value_t value) {
    if constexpr (std::is_same_v<type, value_t>) {
      return value;
    } else {
      return widen(value);
    }
  }
  static value_t back(type value) {
    if constexpr (std::is_same_v<type, value_t>) {
      return value;
    } else {
      return Narrow<value_t>::from(value);
    }
  }
};

template <Reduction reduction, typename T>
T joined(T a, T b) {
  if constexpr (reduction == Reduction::kSum) return a + b;
  if constexpr (reduction == Reduction::kMax) return a != a || a >= b ? a : b;  // a NaN stays
  return a != a || a <= b ? a : b;
}

template <Reduction reduction, typename value_t>
void reduce_values(value_t* out, const std::vector<const value_t*>& inputs, int64_t count) {
  using R = Reduced<value_t>;
  using acc_t = typename R::type;
  if (inputs.size() == 2) {
    const value_t *a = inputs[0], *b = inputs[1];
    for (int64_t i = 0; i < count; ++i) {
      out[i] = R::back(joined<reduction>(R::of(a[i]), R::of(b[i])));
    }
    return;
  }
  constexpr int64_t kBlock = 512;
  acc_t sums[kBlock];
  for (int64_t start = 0; start < count; start += kBlock) {
    const int64_t n = std::min(kBlock, count - start);
    for (int64_t i = 0; i < n; ++i) sums[i] = R::of(inputs[0][start + i]);
    for (size_t rank = 1; rank < inputs.size(); ++rank) {
      const value_t* input = inputs[rank] + start;
      for (int64_t i = 0; i < n; ++i) sums[i] = joined<reduction>(sums[i], R::of(input[i]));
    }
    for (int64_t i = 0; i < n; ++i) out[start + i] = R::back(sums[i]);
  }
}

// out [count] from as many of each input. It may be one of the inputs.
template <typename value_t>
void reduce_values(Reduction reduction, value_t* out, const std::vector<const value_t*>& inputs,
                   int64_t count) {
  switch (reduction) {
    case Reduction::kSum:
      return reduce_values<Reduction::kSum>(out, inputs, count);
    case Reduction::kMax:
      return reduce_values<Reduction::kMax>(out, inputs, count);
    case Reduction::kMin:
      return reduce_values<Reduction::kMin>(out, inputs, count);
  }
}

}  // namespace megatron_rl

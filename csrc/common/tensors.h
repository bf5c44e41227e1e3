// What every op does with its tensors, through libtorch's stable ABI: it checks them, takes their
// pointers, chooses code by their type, and shares rows out over threads.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "logit_types.h"

namespace megatron_rl {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Sizes = std::vector<int64_t>;

template <typename T>
struct ScalarTypeOf;
template <>
struct ScalarTypeOf<float> {
  static constexpr ScalarType value = ScalarType::Float;
};
template <>
struct ScalarTypeOf<double> {
  static constexpr ScalarType value = ScalarType::Double;
};
template <>
struct ScalarTypeOf<int64_t> {
  static constexpr ScalarType value = ScalarType::Long;
};

inline std::string name_of(ScalarType type) {
  switch (type) {
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Bool:
      return "bool";
    default:
      return "scalar type " + std::to_string(static_cast<int>(type));
  }
}

template <typename Range>
std::string text_of(const Range& values) {
  std::ostringstream text;
  text << "[";
  for (size_t i = 0; i < values.size(); ++i) text << (i > 0 ? ", " : "") << values[i];
  text << "]";
  return text.str();
}

inline std::string device_of(const Tensor& tensor) {
  if (tensor.is_cpu()) return "cpu";
  return (tensor.is_cuda() ? "cuda:" : "device ") + std::to_string(tensor.get_device_index());
}

struct ShapeOf {
  const Tensor& tensor;
};
struct StridesOf {
  const Tensor& tensor;
};

// What a message says of a value.
inline std::string words(const std::string& text) { return text; }
inline std::string words(ScalarType type) { return name_of(type); }
inline std::string words(const Sizes& shape) { return "shape " + text_of(shape); }
inline std::string words(ShapeOf of) { return "shape " + text_of(of.tensor.sizes()); }
inline std::string words(StridesOf of) { return "strides " + text_of(of.tensor.strides()); }

// Checks of one op's arguments; the message names op, argument, expected and actual. Words are put
// together only for an error: a step of a small model calls ops more often than that can be paid.
class Checks {
 public:
  Checks(const char* op, const Tensor& anchor, const char* anchor_name)
      : op_(op), anchor_name_(anchor_name), device_(device_of(anchor)) {}

  [[noreturn]] void fail(const char* argument, const std::string& expected,
                         const std::string& actual) const {
    throw std::runtime_error(std::string(op_) + ": " + argument + ": expected " + expected +
                             ", got " + actual);
  }

  template <typename Expected, typename Actual>
  void that(bool is_right, const char* argument, const Expected& expected,
            const Actual& actual) const {
    if (!is_right) fail(argument, words(expected), words(actual));
  }

  // A contiguous tensor of this type and shape on the anchor's device.
  void dense(const Tensor& tensor, const char* argument, ScalarType type,
             const Sizes& shape) const {
    const auto sizes = tensor.sizes();
    const bool same = std::equal(sizes.begin(), sizes.end(), shape.begin(), shape.end());
    that(same, argument, shape, ShapeOf{tensor});
    that(tensor.scalar_type() == type, argument, type, tensor.scalar_type());
    that(tensor.is_contiguous(), argument, "a contiguous tensor", StridesOf{tensor});
    same_device(tensor, argument);
  }

  void same_device(const Tensor& tensor, const char* argument) const {
    const std::string actual = device_of(tensor);
    if (actual == device_) return;
    fail(argument, "the device of " + std::string(anchor_name_) + ", " + device_, actual);
  }

  // Logits [T, V] whose rows are contiguous; rows of a tensor to be written do not overlap.
  void rows(const Tensor& logits, const char* argument, bool is_written) const {
    that(logits.dim() == 2, argument, "shape [T, V]", ShapeOf{logits});
    const bool is_empty = logits.numel() == 0;
    that(is_empty || logits.size(1) == 1 || logits.stride(1) == 1, argument, "columns of stride 1",
         StridesOf{logits});
    that(!is_written || is_empty || logits.size(0) == 1 || logits.stride(0) >= logits.size(1),
         argument, "rows that do not overlap", StridesOf{logits});
    that(logits.size(1) <= (int64_t(1) << 30), argument, "at most 2^30 columns", ShapeOf{logits});
  }

 private:
  const char* op_;
  const char* anchor_name_;
  std::string device_;
};

template <typename T>
const T* input(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <typename T>
T* output(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

inline Tensor new_tensor(const Tensor& like, const Sizes& shape, ScalarType type) {
  return torch::stable::new_empty(like, shape, type);
}

// Calls fn(logit_t{}) with the type that the tensor's elements have.
template <typename Fn>
void with_logit_type(const Checks& checks, const char* argument, const Tensor& tensor, Fn fn) {
  switch (tensor.scalar_type()) {
    case ScalarType::BFloat16:
      return fn(Bf16{});
    case ScalarType::Half:
      return fn(Fp16{});
    case ScalarType::Float:
      return fn(float{});
    case ScalarType::Double:
      if (tensor.is_cpu()) return fn(double{});
      break;
    default:
      break;
  }
  checks.fail(
      argument,
      tensor.is_cpu() ? "bfloat16, float16, float32 or float64" : "bfloat16, float16 or float32",
      name_of(tensor.scalar_type()));
}

// Rows are independent, so threads share them; a small job stays on one.
template <typename Fn>
void for_rows(int64_t num_rows, int64_t row_cost, Fn fn) {
  constexpr int64_t kWorthAThread = 32768;
  const int64_t grain = std::max<int64_t>(1, kWorthAThread / std::max<int64_t>(1, row_cost));
  torch::stable::parallel_for(0, num_rows, grain, fn);
}

}  // namespace megatron_rl

#include "../common/tensors.h"
#include "../cpu/row_kernels.h"

namespace megatron_rl {
namespace {

// [T, heads, size] float32 on a CPU, whose entries of a head are neighbours.
void check_heads(const Checks& checks, const Tensor& heads, const char* argument) {
  checks.that(heads.dim() == 3, argument, "shape [T, heads, d]", ShapeOf{heads});
  checks.that(heads.scalar_type() == ScalarType::Float, argument, "float32",
              name_of(heads.scalar_type()));
  checks.that(heads.numel() == 0 || heads.size(2) == 1 || heads.stride(2) == 1, argument,
              "entries of stride 1", StridesOf{heads});
  checks.same_device(heads, argument);
}

const float* head_of(const Tensor& heads, int64_t row, int64_t head) {
  return input<float>(heads) + row * heads.stride(0) + head * heads.stride(1);
}

Tensor turn(const Tensor& heads, const Tensor& cos, const Tensor& sin, int64_t sign) {
  const Checks checks("turn", heads, "heads");
  check_heads(checks, heads, "heads");
  const int64_t rows = heads.size(0), num_heads = heads.size(1), size = heads.size(2);
  checks.that(size % 2 == 0, "heads", "an even number of entries", std::to_string(size));
  checks.dense(cos, "cos", ScalarType::Float, {rows, 1, size / 2});
  checks.dense(sin, "sin", ScalarType::Float, {rows, 1, size / 2});
  checks.that(sign == 1 || sign == -1, "sign", "1 or -1", std::to_string(sign));
  Tensor out = new_tensor(heads, {rows, num_heads, size}, ScalarType::Float);
  const auto& kernels = row_kernel_table().layers;
  const int half = static_cast<int>(size / 2);
  for_rows(rows, num_heads * size, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const float* cosines = input<float>(cos) + row * half;
      const float* sines = input<float>(sin) + row * half;
      float* target = output<float>(out) + row * num_heads * size;
      for (int64_t head = 0; head < num_heads; ++head) {
        kernels.turn(head_of(heads, row, head), cosines, sines, static_cast<float>(sign), half,
                     target + head * size);
      }
    }
  });
  return out;
}

// Where sequence `slot` of a cache [slots, groups, tokens, d] has its keys or values of a group.
float* of_slot(const Tensor& cache, int64_t slot, int64_t group) {
  return output<float>(cache) + (slot * cache.size(1) + group) * cache.size(2) * cache.size(3);
}

void check_cache(const Checks& checks, const Tensor& cache, const char* argument, int64_t rows,
                 const Tensor& key) {
  checks.that(cache.dim() == 4 && cache.size(0) >= rows, argument,
              "shape [at least as many slots as there are rows, groups, tokens, d]",
              ShapeOf{cache});
  checks.dense(cache, argument, ScalarType::Float,
               {cache.size(0), key.size(1), cache.size(2), key.size(2)});
}

// Row i is the next token of the sequence in slot i: its key and value are kept at its position,
// and its query attends to all that is kept up to it, or to the newest `window` of that; 0: to all.
Tensor attend_next(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& keys,
                   const Tensor& values, const Tensor& positions, double scale, int64_t window) {
  const Checks checks("attend_next_", query, "query");
  check_heads(checks, query, "query");
  check_heads(checks, key, "key");
  check_heads(checks, value, "value");
  const int64_t rows = query.size(0), heads = query.size(1), size = query.size(2);
  const int64_t groups = key.size(1);
  const Sizes of_a_row = {rows, groups, size};
  for (const auto& [tensor, name] : {std::pair{&key, "key"}, std::pair{&value, "value"}}) {
    const auto sizes = tensor->sizes();
    checks.that(std::equal(sizes.begin(), sizes.end(), of_a_row.begin()), name, of_a_row,
                ShapeOf{*tensor});
  }
  checks.that(groups > 0 && heads % groups == 0, "query", "a multiple of the key's heads",
              std::to_string(heads));
  check_cache(checks, keys, "keys", rows, key);
  check_cache(checks, values, "values", rows, value);
  checks.dense(positions, "positions", ScalarType::Long, {rows});
  checks.that(window >= 0, "window", "at least 0", std::to_string(window));
  const int64_t* places = input<int64_t>(positions);
  const int64_t room = std::min(keys.size(2), values.size(2));
  int64_t longest = 0;
  for (int64_t row = 0; row < rows; ++row) {
    if (places[row] < 0 || places[row] >= room) {
      checks.fail("positions", "0 up to " + std::to_string(room - 1), std::to_string(places[row]));
    }
    longest = std::max(longest, places[row] + 1);
  }
  Tensor out = new_tensor(query, {rows, heads * size}, ScalarType::Float);
  const auto& kernels = row_kernel_table().layers;
  for_rows(rows, 2 * heads * size * longest, [&](int64_t begin, int64_t end) {
    std::vector<float> scores(longest);
    for (int64_t row = begin; row < end; ++row) {
      const int64_t place = places[row];
      const int64_t first = window > 0 ? std::max<int64_t>(0, place + 1 - window) : 0;
      for (int64_t group = 0; group < groups; ++group) {
        float* own_keys = of_slot(keys, row, group);
        float* own_values = of_slot(values, row, group);
        std::copy_n(head_of(key, row, group), size, own_keys + place * size);
        std::copy_n(head_of(value, row, group), size, own_values + place * size);
        for (int64_t head = group * (heads / groups); head < (group + 1) * (heads / groups);
             ++head) {
          kernels.attend(head_of(query, row, head), own_keys + first * size,
                         own_values + first * size, place + 1 - first, static_cast<int>(size),
                         static_cast<float>(scale), scores.data(),
                         output<float>(out) + (row * heads + head) * size);
        }
      }
    }
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(megatron_rl, CPU, m) {
  m.impl("turn", TORCH_BOX(&turn));
  m.impl("attend_next_", TORCH_BOX(&attend_next));
}

}  // namespace megatron_rl

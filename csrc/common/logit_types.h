// 16-bit floats as bit patterns, so that CPU code needs no compiler support for them. No torch.
#pragma once

#include <cstdint>
#include <cstring>

#include "host_device.h"

namespace megatron_rl {

struct Bf16 {
  uint16_t bits;
};

struct Fp16 {
  uint16_t bits;
};

// The type in which a softmax over logits of this type is computed.
template <typename logit_t>
struct ComputeType {
  using type = float;
};
template <>
struct ComputeType<double> {
  using type = double;
};
template <typename logit_t>
using compute_t = typename ComputeType<logit_t>::type;

namespace bits {

MRL_HOST_DEVICE float as_float(uint32_t word) {
  float value;
  std::memcpy(&value, &word, sizeof(value));
  return value;
}

MRL_HOST_DEVICE uint32_t as_word(float value) {
  uint32_t word;
  std::memcpy(&word, &value, sizeof(word));
  return word;
}

}  // namespace bits

MRL_HOST_DEVICE float widen(Bf16 x) { return bits::as_float(static_cast<uint32_t>(x.bits) << 16); }

MRL_HOST_DEVICE float widen(Fp16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7fffu) << 13;
  if (magnitude >= 0x0f800000u) {  // exponent all ones: inf or nan
    return bits::as_float(sign | magnitude | 0x7f800000u);
  }
  // The exponent bias of float is larger by 112; the product also makes subnormals right.
  return bits::as_float(sign | bits::as_word(bits::as_float(magnitude) * 0x1p112f));
}

MRL_HOST_DEVICE float widen(float x) { return x; }
MRL_HOST_DEVICE double widen(double x) { return x; }

// Narrowing rounds to nearest, ties to even.
template <typename logit_t>
struct Narrow;

template <>
struct Narrow<Bf16> {
  static MRL_HOST_DEVICE Bf16 from(float x) {
    const uint32_t word = bits::as_word(x);
    if ((word & 0x7fffffffu) > 0x7f800000u) return {0x7fc0u};  // nan
    return {static_cast<uint16_t>((word + 0x7fffu + ((word >> 16) & 1u)) >> 16)};
  }
};

template <>
struct Narrow<Fp16> {
  static MRL_HOST_DEVICE Fp16 from(float x) {
    const uint32_t word = bits::as_word(x);
    const uint32_t sign = (word >> 16) & 0x8000u;
    const uint32_t magnitude = word & 0x7fffffffu;
    uint32_t half;
    if (magnitude > 0x7f800000u) {  // nan
      half = 0x7e00u;
    } else if (magnitude >= 0x477ff000u) {  // rounds to 65536 or more
      half = 0x7c00u;
    } else if (magnitude < 0x38800000u) {  // subnormal: let an addition round in the right place
      half = bits::as_word(bits::as_float(magnitude) + 0.5f) - 0x3f000000u;
    } else {
      half = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    }
    return {static_cast<uint16_t>(sign | half)};
  }
};

template <>
struct Narrow<float> {
  static MRL_HOST_DEVICE float from(float x) { return x; }
};

template <>
struct Narrow<double> {
  static MRL_HOST_DEVICE double from(double x) { return x; }
};

}  // namespace megatron_rl

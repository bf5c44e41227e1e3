// Macros and functions by which one source is device code under nvcc and plain C++ elsewhere. No
// torch.
#pragma once

#include <cmath>
#include <cstdint>

// Always inlined on the host too: a copy compiled for one instruction set must not be linked into
// another one's code.
#if defined(__CUDACC__)
#define MRL_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define MRL_HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace megatron_rl {

constexpr double kLog2E = 1.4426950408889634074;
constexpr double kLn2 = 0.69314718055994530942;

// Stands for -inf where a product follows: exp() of it is exactly 0 in float64, and 0 times it is
// 0, while 0 times -inf would be NaN.
constexpr double kLogZero = -1e4;

template <typename acc_t>
MRL_HOST_DEVICE acc_t negative_infinity() {
  return static_cast<acc_t>(-INFINITY);
}

// The larger of a value and a lower bound; a NaN value stays NaN.
template <typename acc_t>
MRL_HOST_DEVICE acc_t at_least(acc_t x, acc_t bound) {
  return x < bound ? bound : x;
}

template <typename acc_t>
MRL_HOST_DEVICE acc_t clamp(acc_t x, acc_t low, acc_t high) {
  return x < low ? low : (x > high ? high : x);
}

template <typename acc_t>
MRL_HOST_DEVICE acc_t larger(acc_t a, acc_t b) {
  return a > b ? a : b;
}

// The larger of two values; NaN if either is.
template <typename acc_t>
MRL_HOST_DEVICE acc_t larger_or_nan(acc_t a, acc_t b) {
  return (b > a || b != b) ? b : a;
}

template <typename acc_t>
MRL_HOST_DEVICE acc_t smaller_or_nan(acc_t a, acc_t b) {
  return (b < a || b != b) ? b : a;
}

}  // namespace megatron_rl

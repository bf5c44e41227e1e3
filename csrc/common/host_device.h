// What lets one source of arithmetic be device code under nvcc and plain C++ elsewhere. No torch.
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

// exp() of this is 0 in float64, and 0 times it is 0: stands for -inf where a product follows.
constexpr double kLogZero = -1e4;

template <typename acc_t>
MRL_HOST_DEVICE acc_t negative_infinity() {
  return static_cast<acc_t>(-INFINITY);
}

// Lower bound that lets NaN through.
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

// Of two values, the larger; NaN if either is.
template <typename acc_t>
MRL_HOST_DEVICE acc_t larger_or_nan(acc_t a, acc_t b) {
  return (b > a || b != b) ? b : a;
}

template <typename acc_t>
MRL_HOST_DEVICE acc_t smaller_or_nan(acc_t a, acc_t b) {
  return (b < a || b != b) ? b : a;
}

}  // namespace megatron_rl

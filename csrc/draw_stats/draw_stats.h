// Gumbel noise of tokens, and the record of a row from which one is drawn. No torch.
#pragma once

#include "../common/host_device.h"

namespace megatron_rl {

// The noise of a row: a function of the request's seed, the token's place in its response and its
// id, by Philox4x32-10 (Salmon et al. 2011). ops/philox.py has the same.
struct RowNoise {
  uint32_t key0, key1;  // low and high half of the seed
  uint32_t place;
  int64_t vocab_start;  // global id of column 0
};

constexpr int kPhiloxRounds = 10;
constexpr uint32_t kPhiloxFactor0 = 0xD2511F53u, kPhiloxFactor1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxWeyl0 = 0x9E3779B9u, kPhiloxWeyl1 = 0xBB67AE85u;

// One round; counters [4] and keys change in place.
MRL_HOST_DEVICE void philox_round(uint32_t& c0, uint32_t& c1, uint32_t& c2, uint32_t& c3,
                                  uint32_t key0, uint32_t key1) {
  const uint64_t product0 = static_cast<uint64_t>(kPhiloxFactor0) * c0;
  const uint64_t product1 = static_cast<uint64_t>(kPhiloxFactor1) * c2;
  c0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ key0;
  c1 = static_cast<uint32_t>(product1);
  c2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ key1;
  c3 = static_cast<uint32_t>(product0);
}

// Words of the tokens 4 * counter to 4 * counter + 3.
MRL_HOST_DEVICE void philox(uint32_t counter, const RowNoise& noise, uint32_t* words) {
  uint32_t c0 = counter, c1 = noise.place, c2 = 0, c3 = 0;
  uint32_t key0 = noise.key0, key1 = noise.key1;
  for (int round = 0; round < kPhiloxRounds; ++round) {
    philox_round(c0, c1, c2, c3, key0, key1);
    key0 += kPhiloxWeyl0;
    key1 += kPhiloxWeyl1;
  }
  words[0] = c0;
  words[1] = c1;
  words[2] = c2;
  words[3] = c3;
}

// -log of an exponential variable -log(1 - u): the largest noise has the smallest u, where numbers
// are finest.
MRL_HOST_DEVICE double gumbel_of(uint32_t word) {
  const double uniform = (static_cast<double>(word) + 0.5) * 0x1p-32;
  return -std::log(-std::log1p(-uniform));
}

// The exponential variable of gumbel_of is at most 22.9, so no noise is less than this.
constexpr float kLeastNoise = -3.2f;

// With E = -log(1 - u), a token beats the best score where z - log(E) > best, so only where
// u < E < exp(z - best). More than what rounding takes from that bound:
constexpr float kGenerous = 1.001f;
constexpr float kGenerousUniform = 0x1p-31f;

template <typename acc_t>
struct Winner {
  acc_t score;  // z + noise
  acc_t z;
  int64_t column;  // -1: there is none
};

// z being scaled logits.
struct DrawRecord {
  double max;    // of z; -inf in a shard without any token
  double sum;    // of exp(z - max)
  double score;  // of the winner
  double z;      // of the winner
  double token;  // its global id
};

template <typename logit_t>
struct DrawArgs {
  const logit_t* logits;       // [T, V], contiguous in V
  int64_t row_stride;          // elements from one row to the next
  int64_t num_rows;            // T
  int num_valid;               // the first columns of V, which are vocabulary and not padding
  int64_t vocab_start;         // global id of column 0
  const int64_t* seeds;        // [T]
  const int64_t* places;       // [T]
  const double* temperatures;  // [T]; 0 is greedy
  DrawRecord* records;         // [T]

  MRL_HOST_DEVICE RowNoise noise_of(int64_t row) const {
    const uint64_t seed = static_cast<uint64_t>(seeds[row]);
    return {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32),
            static_cast<uint32_t>(places[row]), vocab_start};
  }

  template <typename acc_t>
  MRL_HOST_DEVICE void write(int64_t row, acc_t max, acc_t sum, const Winner<acc_t>& best) const {
    const double token = best.column < 0 ? 0.0 : static_cast<double>(best.column + vocab_start);
    records[row] = {max, sum, best.score, best.z, token};
  }
};

}  // namespace megatron_rl

// The loss of one token, its gradients and what it adds to the metrics. The definition that this
// equals is megatron_rl/objectives/token_loss.py; each kind has a file in that folder.
#pragma once

#include "../common/host_device.h"

namespace megatron_rl {

// These four are in the order of megatron_rl/ops/loss_spec.py.
enum LossKind : int { kLikelihood, kClippedRatio, kCispo, kSapo, kNumLossKinds };
enum KlEstimator : int { kK1, kK2, kK3, kNumKlEstimators };

enum Sum : int {
  kTokens,
  kClipLow,
  kClipHigh,
  kDualClip,
  kRatioTokens,
  kRatio,
  kKlOldK1,
  kKlOldK3,
  kEntropyTokens,
  kEntropy,
  kRefTokens,
  kKlRefK1,
  kKlRefK3,
  kRolloutTokens,
  kGap,
  kAbsGap,
  kGapK3,
  kCorrectedTokens,
  kCorrection,
  kCorrectionBounded,
  kLoss,
  kNumSums
};

enum Extremum : int { kMaxRatio, kMaxAbsGap, kNumExtrema };

constexpr double kMaxLogRatio = 20.0;

template <typename acc_t>
struct LossSpec {
  int kind;
  int kl_estimator;
  acc_t low;        // eps_low; tau_negative of sapo
  acc_t high;       // eps_high; tau_positive of sapo
  acc_t dual_clip;  // inf: none
  acc_t kl_coef;
  acc_t entropy_coef;
  acc_t correction_low;
  acc_t correction_high;  // negative: no correction
  bool correction_masks;  // outside of its bounds; else it is cut to them
  bool has_old;
  bool has_ref;
  bool has_rollout;
  bool has_entropy;
};

template <typename acc_t>
struct Token {
  acc_t logprob;
  acc_t entropy;
  acc_t old_logprob;
  acc_t ref_logprob;
  acc_t rollout_logprob;
  acc_t advantage;
  acc_t weight;
};

template <typename acc_t>
struct TokenTerms {
  acc_t logprob_grad;
  acc_t entropy_grad;
  acc_t sums[kNumSums];
  acc_t extrema[kNumExtrema];
};

// exp(d) - 1 - d with d clamped; near 0, where the difference would cancel, its Taylor series.
template <typename acc_t>
MRL_HOST_DEVICE acc_t k3(acc_t d) {
  d = clamp(d, acc_t(-kMaxLogRatio), acc_t(kMaxLogRatio));
  if (std::fabs(d) < acc_t(0.03)) {
    acc_t series = acc_t(1.0 / 40320);
    series = series * d + acc_t(1.0 / 5040);
    series = series * d + acc_t(1.0 / 720);
    series = series * d + acc_t(1.0 / 120);
    series = series * d + acc_t(1.0 / 24);
    series = series * d + acc_t(1.0 / 6);
    series = series * d + acc_t(1.0 / 2);
    return d * d * series;
  }
  return std::expm1(d) - d;
}

template <typename acc_t>
MRL_HOST_DEVICE bool is_within_bound(acc_t log_ratio) {
  return std::fabs(log_ratio) <= acc_t(kMaxLogRatio);
}

template <typename acc_t>
MRL_HOST_DEVICE acc_t bounded_exp(acc_t log_ratio) {
  return std::exp(clamp(log_ratio, acc_t(-kMaxLogRatio), acc_t(kMaxLogRatio)));
}

template <typename acc_t>
struct ValueAndGradient {
  acc_t value;
  acc_t gradient;  // with respect to the log-probability
};

// -min(s * A, clip(s) * A), at most -dual_clip * A where A < 0, by cases.
template <typename acc_t>
MRL_HOST_DEVICE ValueAndGradient<acc_t> clipped_ratio_term(acc_t log_ratio, acc_t ratio,
                                                           acc_t advantage,
                                                           const LossSpec<acc_t>& spec,
                                                           TokenTerms<acc_t>& terms) {
  const bool high = advantage > 0 && ratio > 1 + spec.high;
  const bool low = advantage < 0 && ratio < 1 - spec.low;
  const bool dual = advantage < 0 && ratio > spec.dual_clip;
  terms.sums[kClipHigh] = high;
  terms.sums[kClipLow] = low;
  terms.sums[kDualClip] = dual;
  acc_t bounded = ratio;
  if (high) bounded = 1 + spec.high;
  if (low) bounded = 1 - spec.low;
  if (dual) bounded = spec.dual_clip;
  const bool moves = !(high || low || dual) && is_within_bound(log_ratio);
  return {-bounded * advantage, moves ? -ratio * advantage : acc_t(0)};
}

// -w * A * logprob, w being the ratio between bounds, without a gradient of its own.
template <typename acc_t>
MRL_HOST_DEVICE ValueAndGradient<acc_t> cispo_term(const Token<acc_t>& token, acc_t ratio,
                                                   const LossSpec<acc_t>& spec,
                                                   TokenTerms<acc_t>& terms) {
  terms.sums[kClipHigh] = ratio > 1 + spec.high;
  terms.sums[kClipLow] = ratio < 1 - spec.low;
  const acc_t weight = clamp(ratio, 1 - spec.low, 1 + spec.high);
  return {-weight * token.advantage * token.logprob, -weight * token.advantage};
}

// -4 / tau * sigmoid(tau * (s - 1)) * A; tau by the sign of A.
template <typename acc_t>
MRL_HOST_DEVICE ValueAndGradient<acc_t> sapo_term(acc_t log_ratio, acc_t ratio, acc_t advantage,
                                                  const LossSpec<acc_t>& spec) {
  const acc_t tau = advantage > 0 ? spec.high : spec.low;
  const acc_t gate = 1 / (1 + std::exp(-tau * (ratio - 1)));
  const acc_t slope = 4 * gate * (1 - gate) * ratio;
  return {-4 / tau * gate * advantage, is_within_bound(log_ratio) ? -slope * advantage : acc_t(0)};
}

template <typename acc_t>
MRL_HOST_DEVICE ValueAndGradient<acc_t> kl_term(acc_t log_ratio, int estimator) {
  if (estimator == kK1) return {log_ratio, acc_t(1)};
  if (estimator == kK2) return {log_ratio * log_ratio / 2, log_ratio};
  return {k3(-log_ratio), is_within_bound(log_ratio) ? -std::expm1(-log_ratio) : acc_t(0)};
}

// exp(old - rollout) between bounds, by which the token's own term is weighed; it has no gradient.
template <typename acc_t>
MRL_HOST_DEVICE acc_t correction_of(acc_t log_ratio, const LossSpec<acc_t>& spec,
                                    TokenTerms<acc_t>& terms) {
  const acc_t ratio = bounded_exp(log_ratio);
  acc_t weight = clamp(ratio, spec.correction_low, spec.correction_high);
  const bool is_outside = weight != ratio;
  if (is_outside && spec.correction_masks) weight = 0;
  terms.sums[kCorrectedTokens] = 1;
  terms.sums[kCorrection] = weight;
  terms.sums[kCorrectionBounded] = is_outside;
  return weight;
}

// Of a token whose weight is not 0.
template <typename acc_t>
MRL_HOST_DEVICE TokenTerms<acc_t> token_terms(const Token<acc_t>& token,
                                              const LossSpec<acc_t>& spec) {
  TokenTerms<acc_t> terms = {};
  const acc_t old = spec.has_old ? token.old_logprob : token.logprob;
  const acc_t log_ratio = token.logprob - old;
  const acc_t ratio = bounded_exp(log_ratio);

  ValueAndGradient<acc_t> loss = {-token.advantage * token.logprob, -token.advantage};
  if (spec.kind == kClippedRatio) {
    loss = clipped_ratio_term(log_ratio, ratio, token.advantage, spec, terms);
  } else if (spec.kind == kCispo) {
    loss = cispo_term(token, ratio, spec, terms);
  } else if (spec.kind == kSapo) {
    loss = sapo_term(log_ratio, ratio, token.advantage, spec);
  }
  if (spec.correction_high >= 0) {
    const acc_t correction = correction_of(old - token.rollout_logprob, spec, terms);
    loss.value *= correction;
    loss.gradient *= correction;
  }
  const acc_t to_ref = token.logprob - token.ref_logprob;
  if (spec.kl_coef != 0) {
    const ValueAndGradient<acc_t> kl = kl_term(to_ref, spec.kl_estimator);
    loss.value += spec.kl_coef * kl.value;
    loss.gradient += spec.kl_coef * kl.gradient;
  }
  if (spec.entropy_coef != 0) loss.value -= spec.entropy_coef * token.entropy;

  terms.logprob_grad = token.weight * loss.gradient;
  terms.entropy_grad = -token.weight * spec.entropy_coef;
  terms.sums[kTokens] = 1;
  terms.sums[kLoss] = token.weight * loss.value;
  if (spec.kind != kLikelihood || spec.has_old) {
    terms.sums[kRatioTokens] = 1;
    terms.sums[kRatio] = ratio;
    terms.sums[kKlOldK1] = old - token.logprob;
    terms.sums[kKlOldK3] = k3(log_ratio);
    terms.extrema[kMaxRatio] = ratio;
  }
  if (spec.has_entropy) {
    terms.sums[kEntropyTokens] = 1;
    terms.sums[kEntropy] = token.entropy;
  }
  if (spec.has_ref) {
    terms.sums[kRefTokens] = 1;
    terms.sums[kKlRefK1] = to_ref;
    terms.sums[kKlRefK3] = k3(-to_ref);
  }
  if (spec.has_rollout) {
    const acc_t gap = old - token.rollout_logprob;
    terms.sums[kRolloutTokens] = 1;
    terms.sums[kGap] = gap;
    terms.sums[kAbsGap] = std::fabs(gap);
    terms.sums[kGapK3] = k3(gap);
    terms.extrema[kMaxAbsGap] = std::fabs(gap);
  }
  return terms;
}

}  // namespace megatron_rl

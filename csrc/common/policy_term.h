// The policy surrogate of one token and its derivative by the log-prob: what entropy_kernels/losses/surrogate.py does
// with whole tensors (docs/losses.md). Host + device.
#pragma once

#include <cmath>

#include "common/host_device.h"
#include "common/radix_select.h"

namespace entropy_kernels {

// Infinite where a clip is not there.
template <class T>
struct PolicyClips {
  T low, high;  // of the ratio, about 1
  T dual;
};

// What becomes of a selected token: nothing; value and slope 0; slope 0; a penalty is added.
enum class Selected : int { kUnchanged, kDropped, kDetached, kPenalised };
enum class Penalty : int { kK1, kAbs, kK2, kK3 };  // the estimators of losses/kl.py

template <class T>
struct PolicyBranch {
  T log_ratio, advantage;  // 0 where masked
  T ratio, value;          // of the surrogate, after the clips
  bool clipped, clipped_lower;
  bool nonfinite;  // a valid token with an input that is not finite
};

template <class T>
EK_HOST_DEVICE PolicyBranch<T> policy_branch(T logprob, T old_logprob, T advantage, bool valid,
                                             const PolicyClips<T>& clips) {
  if (!valid) {
    return {0, 0, 0, 0, false, false, false};
  }
  PolicyBranch<T> b;
  b.log_ratio = logprob - old_logprob;
  b.advantage = advantage;
  // a difference is finite only if both sides are
  b.nonfinite = !(std::fabs(b.log_ratio) < kInfinity<T> && std::fabs(advantage) < kInfinity<T>);
  b.ratio = std::exp(b.log_ratio);
  const T gain = -advantage;
  b.value = advantage == 0 ? gain : gain * b.ratio;  // an advantage of 0 gives 0, also where the ratio overflows
  const T clamped = b.ratio < clips.low ? clips.low : b.ratio > clips.high ? clips.high : b.ratio;
  const T held = gain * clamped;
  b.clipped = held > b.value;
  b.value = b.clipped ? held : b.value;
  const T bound = gain * clips.dual;
  b.clipped_lower = advantage < 0 && b.value > bound;
  b.value = b.clipped_lower ? bound : b.value;
  return b;
}

template <class T>
struct PolicyTerm {
  T value;
  T slope;  // derivative by logprob
};

// The term of the loss. Tokens that a clip holds, or that are dropped, keep a value but no slope; what is not finite
// shows in both, dropped or not.
template <class T>
EK_HOST_DEVICE PolicyTerm<T> policy_term(const PolicyBranch<T>& b, bool valid, Selected selected) {
  if (b.nonfinite) {
    return {kNaN<T>, kNaN<T>};
  }
  const bool dropped = selected == Selected::kDropped || selected == Selected::kDetached;
  const bool moves = valid && !(b.clipped || b.clipped_lower || b.advantage == 0 || dropped);
  if (moves) {
    const T moving = -b.advantage * b.ratio;
    return {moving, moving};
  }
  return {selected == Selected::kDropped ? T(0) : b.value, 0};
}

// Estimate of the divergence from the old policy; `square_slope`: the slope of k2 whatever the value.
template <class T>
EK_HOST_DEVICE PolicyTerm<T> penalty_term(T log_ratio, Penalty penalty, bool square_slope) {
  PolicyTerm<T> term = {log_ratio, 1};
  if (penalty == Penalty::kAbs) {
    term = {std::fabs(log_ratio), T(log_ratio > 0) - T(log_ratio < 0)};
  } else if (penalty == Penalty::kK2) {
    term = {T(0.5) * log_ratio * log_ratio, log_ratio};
  } else if (penalty == Penalty::kK3) {
    const T limit = 20;
    const T reverse = -log_ratio < -limit ? -limit : -log_ratio > limit ? limit : -log_ratio;
    const T e = std::exp(reverse), value = e - reverse - 1;
    const bool inside = std::fabs(log_ratio) <= limit && value <= 10;  // it is never below 0 by more than rounding
    term = {value > 10 ? T(10) : value, inside ? 1 - e : T(0)};
  }
  if (square_slope) {
    term.slope = log_ratio;
  }
  return term;
}

// Both, for a token that is selected as `selected`.
template <class T>
EK_HOST_DEVICE PolicyTerm<T> penalised_term(const PolicyBranch<T>& branch, bool valid, Selected selected,
                                            Penalty penalty, bool square_slope, T coefficient) {
  PolicyTerm<T> term = policy_term(branch, valid, selected);
  if (selected == Selected::kPenalised) {
    const PolicyTerm<T> added = penalty_term(branch.log_ratio, penalty, square_slope);
    term.value += coefficient * added.value;
    term.slope += coefficient * added.slope;
  }
  return term;
}

// What is summed up over the valid tokens, and the maxima behind the sums: together the totals. Their order is that of
// the operator's output; entropy_kernels/ops/policy_loss.py names them in Python.
enum PolicySum : int {
  kTermSum, kClippedSum, kClippedLowerSum, kLogRatioSum, kAbsoluteLogRatioSum, kRatioSum, kCovarianceSum,
  kInBandSum, kSelectedSum, kNonfiniteSum, kTokenSum, kPolicySums
};
enum PolicyMaximum : int { kRatioMaximum, kCovarianceMaximum, kPolicyMaxima };
constexpr int kPolicyTotals = int{kPolicySums} + int{kPolicyMaxima};

// Sums of zeros and ones.
EK_HOST_DEVICE constexpr bool is_count(int sum) {
  return sum == kClippedSum || sum == kClippedLowerSum || sum >= kInBandSum;
}

template <class T, class Sum>
EK_HOST_DEVICE void add_to_sums(Sum (&sums)[kPolicySums], const PolicyBranch<T>& branch, const PolicyTerm<T>& term,
                                float covariance, bool valid, bool candidate, bool selected) {
  sums[kTermSum] += term.value;
  sums[kClippedSum] += branch.clipped;
  sums[kClippedLowerSum] += branch.clipped_lower;
  sums[kLogRatioSum] += branch.log_ratio;
  sums[kAbsoluteLogRatioSum] += std::fabs(branch.log_ratio);
  sums[kRatioSum] += branch.ratio;
  sums[kCovarianceSum] += covariance;
  sums[kInBandSum] += candidate;
  sums[kSelectedSum] += selected;
  sums[kNonfiniteSum] += valid && !(std::fabs(term.value) < kInfinity<T>);
  sums[kTokenSum] += valid;
}

// Maxima are compared as ordered keys, 0 standing for none; NaN is above everything, as in torch's amax.
EK_HOST_DEVICE uint32_t larger_key(uint32_t key, float value) {
  const uint32_t other = value == value ? ordered_key(value) : ~0u;
  return other > key ? other : key;
}
EK_HOST_DEVICE double maximum_of_key(uint32_t key) { return key == 0 ? 0.0 : static_cast<double>(key_value(key)); }

// The metrics made from the totals: means in the order of the sums from kTermSum, which gives the op's mean, to
// kSelectedSum (of old - new for the log-ratio), the number of non-finite tokens, the maxima, and 1 / the number of valid
// tokens (1 without any).
constexpr int kPolicyMetrics = kPolicyTotals;

EK_HOST_DEVICE double policy_metric(const double* totals, int index) {
  const double weight = 1 / (totals[kTokenSum] > 0 ? totals[kTokenSum] : 1);
  if (index < kNonfiniteSum) {
    return (index == kLogRatioSum ? 0 - totals[index] : totals[index]) * weight;
  }
  return index == kNonfiniteSum ? totals[index] : index < kPolicyTotals - 1 ? totals[index + 1] : weight;
}

}  // namespace entropy_kernels

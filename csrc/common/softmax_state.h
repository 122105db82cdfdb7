// The state of a softmax row over any part of the vocabulary, its merge, and what a finished state yields.
//
// z are the logits after softcap, T the temperature, x = (z - m) / T <= 0 their distances from the largest one:
//   m   max z                 untempered, so that a bf16 maximum is exact
//   s   Σ e^x                 s2  Σ e^2x
//   w   Σ -x e^x   >= 0       w2  Σ -x e^2x   >= 0
//   x_y the target's z, -inf if the target lies elsewhere
// Lanes of a vector, blocks of columns, parts of a row, and ranks of a vocabulary-parallel group all merge by the same
// rule: rescale both sides to the larger maximum, then add. docs/math.md derives every line.
#pragma once

#include <cmath>

#include "host_device.h"

namespace entropy_kernels {

template <typename T>
struct SoftmaxState {
  T m, s, w, x_y, s2, w2;

  // The neutral element of merge: a part without columns, or with nothing but -inf in it.
  static EK_HOST_DEVICE SoftmaxState identity() {
    return {-kInfinity<T>, 0, 0, -kInfinity<T>, 0, 0};
  }
  // What is written for a row that is ignored.
  static EK_HOST_DEVICE SoftmaxState ignored() { return {0, 1, 0, 0, 1, 0}; }
};

// One value per row each, in the order of their bits in `want`: STATISTICS of entropy_kernels/_rows.py. A new one is a
// name here, a line of the table and one of `finalize`.
enum Statistic { kLogprob, kEntropy, kCollision, kVocabCovariance, kPMax, kMeanLogit, kStatistics };

struct StatisticTraits {
  const char* name;
  bool second_order;  // needs s2 and w2
  bool differentiable;
};

inline constexpr StatisticTraits kStatisticTraits[kStatistics] = {
    {"logprob", false, true},
    {"entropy", false, true},
    {"collision", true, true},
    {"vocab_covariance", true, false},
    {"p_max", false, false},
    {"mean_logit", false, false},
};

// As bits of `want`: device code may use a constant's value, not an element of the table.
constexpr int bits_with(bool StatisticTraits::*flag) {
  int bits = 0;
  for (int i = 0; i < kStatistics; ++i) bits |= kStatisticTraits[i].*flag ? 1 << i : 0;
  return bits;
}
inline constexpr int kSecondOrder = bits_with(&StatisticTraits::second_order);
inline constexpr int kDifferentiable = bits_with(&StatisticTraits::differentiable);

// Rows of a state tensor: m, s, w, x_y, and for statistics of second order s2, w2.
inline constexpr int kFirstOrderFields = 4, kSecondOrderFields = 6;

// The statistics of a row, or their gradients.
template <typename T>
struct TokenStats {
  T values[kStatistics];

  EK_HOST_DEVICE T& operator[](int i) { return values[i]; }
  EK_HOST_DEVICE T operator[](int i) const { return values[i]; }

  static EK_HOST_DEVICE TokenStats all(T value) {
    TokenStats stats;
    for (T& one : stats.values) one = value;
    return stats;
  }
  EK_HOST_DEVICE bool all_zero() const {
    bool zero = true;
    for (const T one : values) zero = zero && one == 0;
    return zero;
  }
};

template <typename T>
EK_HOST_DEVICE bool is_nan(T value) {
  return value != value;
}

// The larger of two; NaN if either is (unlike fmax).
template <typename T>
EK_HOST_DEVICE T max_or_nan(T a, T b) {
  return (a > b || is_nan(a)) ? a : b;
}

// Restates the sums for a maximum that is larger by delta >= 0, with scale = e^-delta. Any unit of delta will do, so long
// as w and w2 have it too (device code counts in bits).
template <typename T>
EK_HOST_DEVICE void rescale(SoftmaxState<T>& state, T delta, T scale) {
  // e^-delta underflows long before delta overflows, and 0 * inf would be NaN; what is NaN already stays NaN.
  const T shift = scale == 0 ? T(0) : delta;
  state.w = scale * (state.w + shift * state.s);
  state.w2 = scale * scale * (state.w2 + shift * state.s2);
  state.s *= scale;
  state.s2 *= scale * scale;
}

// Restates the sums for the maximum m >= state.m.
template <typename T>
EK_HOST_DEVICE void raise_maximum(SoftmaxState<T>& state, T m, T temperature) {
  // A side that saw nothing but -inf is all zeros: there is nothing to rescale, and its delta would be inf - inf.
  if (state.m != -kInfinity<T>) {
    const T delta = (m - state.m) / temperature;
    rescale(state, delta, std::exp(-delta));
  }
  state.m = m;
}

template <typename T>
EK_HOST_DEVICE SoftmaxState<T> merge(SoftmaxState<T> a, SoftmaxState<T> b, T temperature) {
  const T m = max_or_nan(a.m, b.m);
  raise_maximum(a, m, temperature);
  raise_maximum(b, m, temperature);
  return {m, a.s + b.s, a.w + b.w, max_or_nan(a.x_y, b.x_y), a.s2 + b.s2, a.w2 + b.w2};
}

// Entropy is L + w/s: both terms are >= 0, so nothing cancels as the distribution collapses.
template <typename T>
EK_HOST_DEVICE TokenStats<T> finalize(const SoftmaxState<T>& state, T temperature) {
  const T log_s = std::log(state.s);
  const T logprob = (state.x_y - state.m) / temperature - log_s;
  const T entropy = log_s + state.w / state.s;
  const T square = state.s * state.s;
  const T collision = state.s2 / square;
  const T q = -(state.w2 + log_s * state.s2) / square;  // Σ p² log p
  const T p_y = std::exp(logprob);
  const T own = p_y == 0 ? T(0) : p_y * (logprob + entropy);  // 0 * -inf is a target that cannot occur
  TokenStats<T> stats;
  stats[kLogprob] = logprob;
  stats[kEntropy] = entropy;
  stats[kCollision] = collision;
  stats[kVocabCovariance] = own - (q + entropy * collision);
  stats[kPMax] = state.s / state.s / state.s;  // NaN, as the others, of a row of nothing but -inf
  stats[kMeanLogit] = state.m - temperature * (state.w / state.s);
  return stats;
}

// The gradient with respect to the logits after softcap, without the target's own term g_logprob / T:
//   dz_j = e_j (constant + linear x_j + quadratic e_j),   x_j = (z_j - m) / T,   e_j = e^{x_j}.
// log p_j + H is x_j + w/s, so the terms need neither the logarithm of s nor a difference of large numbers.
template <typename T>
struct GradientCoefficients {
  T constant, linear, quadratic;
};

template <typename T>
EK_HOST_DEVICE GradientCoefficients<T> gradient_coefficients(const SoftmaxState<T>& state, T temperature,
                                                             const TokenStats<T>& grads) {
  const T inv_s = T(1) / state.s;
  const T scale = inv_s / temperature;  // p_j / T = scale * e_j
  T constant = grads[kLogprob] + grads[kEntropy] * state.w * inv_s;
  T quadratic = 0;
  if (grads[kCollision] != 0) {  // without it the state may have no s2
    constant += 2 * grads[kCollision] * (state.s2 * inv_s * inv_s);
    quadratic = 2 * grads[kCollision] * inv_s * scale;
  }
  return {-constant * scale, -grads[kEntropy] * scale, quadratic};
}

}  // namespace entropy_kernels

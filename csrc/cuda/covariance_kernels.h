// Token covariance in one launch: extremes and count, fixed-point sums, product of the deviations.
#pragma once

#include <cstdint>
#include <type_traits>

#include "common/fixed_point.h"
#include "common/selection_steps.h"
#include "cuda/block_group.h"

namespace entropy_kernels::cuda {

template <class T>
struct CovarianceArguments {
  TokenPairs<T> pairs;
  int chunk;  // tokens per block
  float* covariance;
  uint64_t* exchange;  // Grid only: kGroupSlots words
};

// Writes the covariance of the block's tokens.
template <class T, class Group>
EK_HOST_DEVICE void covariance_block(Group& group, const CovarianceArguments<T>& a) {
  enum Slot { kLogprob, kAdvantages, kCount, kLogprobSum, kAdvantagesSum };
  struct Token {
    T logprob, advantage;
    bool counts;
  };
  const TokenPairs<T>& pairs = a.pairs;
  const TokenShare share(group.thread.block(), a.chunk, pairs.tokens);
  const auto load = [&](int i) {
    const int64_t position = share.begin + i;
    return Token{pairs.logprob[position], pairs.advantages[position], pairs.counts(position)};
  };
  const uint64_t* totals = group.shared.totals;

  using Unsigned = std::make_unsigned_t<typename Magnitude<T>::Bits>;
  typename Magnitude<T>::Bits largest_logprob = 0, largest_advantage = 0;
  uint32_t counted = 0;
  for_tokens(group, share.tokens, load, [&](int, const Token& token) {
    const auto logprob = Magnitude<T>::of(token.logprob, token.counts);
    const auto advantage = Magnitude<T>::of(token.advantage, token.counts);
    largest_logprob = logprob > largest_logprob ? logprob : largest_logprob;
    largest_advantage = advantage > largest_advantage ? advantage : largest_advantage;
    counted += token.counts;
  });
  group.add_maximum(kLogprob, static_cast<Unsigned>(largest_logprob));
  group.add_maximum(kAdvantages, static_cast<Unsigned>(largest_advantage));
  group.add_sum(kCount, counted);
  group.combine_slots(kLogprob, 2, 1);
  const double logprob = Magnitude<T>::value(static_cast<typename Magnitude<T>::Bits>(totals[kLogprob]));
  const double advantage = Magnitude<T>::value(static_cast<typename Magnitude<T>::Bits>(totals[kAdvantages]));
  const double count = static_cast<double>(static_cast<int64_t>(totals[kCount]));

  const double logprob_scale = power_of_two(fixed_point_exponent(logprob, count));
  const double advantage_scale = power_of_two(fixed_point_exponent(advantage, count));
  int64_t logprob_sum = 0, advantage_sum = 0;
  for_tokens(group, share.tokens, load, [&](int, const Token& token) {
    logprob_sum = wrapping_sum(logprob_sum, to_fixed_point(value_if(token.logprob, token.counts), logprob_scale));
    advantage_sum = wrapping_sum(advantage_sum, to_fixed_point(value_if(token.advantage, token.counts), advantage_scale));
  });
  group.add_sum(kLogprobSum, static_cast<uint64_t>(logprob_sum));
  group.add_sum(kAdvantagesSum, static_cast<uint64_t>(advantage_sum));
  group.combine_slots(kLogprobSum, 0, 2);
  const double logprob_mean = fixed_point_mean(static_cast<int64_t>(totals[kLogprobSum]), logprob, count);
  const double advantage_mean = fixed_point_mean(static_cast<int64_t>(totals[kAdvantagesSum]), advantage, count);

  for_tokens(group, share.tokens, load, [&](int i, const Token& token) {
    if (i < share.tokens) {
      a.covariance[share.begin + i] =
          deviation_product(token.logprob, token.advantage, token.counts, logprob_mean, advantage_mean);
    }
  });
}

}  // namespace entropy_kernels::cuda

// Token covariance in one launch: extremes and count, fixed-point sums, product of the deviations.
#pragma once

#include <cstdint>
#include <type_traits>

#include "common/fixed_point.h"
#include "common/selection_steps.h"
#include "cuda/block_sums.h"

namespace entropy_kernels::cuda {

template <class T>
struct CovarianceArguments {
  TokenPairs<T> pairs;
  int chunk;  // tokens per block
  int kept;   // quads per block in registers and shared memory
  float* covariance;
  uint64_t* exchange;  // GridSums only: kSumSlots words for each block
};

// A thread's quads of pairs, kept in shared memory.
template <class T, int kFirst>
class PairKeep {
 public:
  struct Held {
    Quad<T> logprob, advantage;
    Quad<uint8_t> counts;
  };
  static constexpr int kBytes = sizeof(Quad<T>) * 2 + kQuad;

  EK_HOST_DEVICE explicit PairKeep(KeptMemory kept) : memory_(kept) {}
  EK_HOST_DEVICE int quads() const { return memory_.quads; }
  EK_HOST_DEVICE void put(int quad, const Held& held) const {
    pairs()[quad - kFirst] = held.logprob;
    pairs()[room() + quad - kFirst] = held.advantage;
    counts()[quad - kFirst] = held.counts;
  }
  EK_HOST_DEVICE Held get(int quad) const {
    return {pairs()[quad - kFirst], pairs()[room() + quad - kFirst], counts()[quad - kFirst]};
  }

 private:
  EK_HOST_DEVICE int room() const { return memory_.quads - kFirst; }
  EK_HOST_DEVICE Quad<T>* pairs() const { return reinterpret_cast<Quad<T>*>(memory_.memory); }
  EK_HOST_DEVICE Quad<uint8_t>* counts() const { return reinterpret_cast<Quad<uint8_t>*>(pairs() + 2 * room()); }

  KeptMemory memory_;
};

// Writes the covariance of the block's tokens.
template <class T, class Sums>
EK_HOST_DEVICE void covariance_block(Sums& sums, const CovarianceArguments<T>& a, unsigned char* memory) {
  enum Slot { kLogprob, kAdvantages, kCount, kLogprobSum, kAdvantagesSum };
  using Keep = PairKeep<T, kHeldQuads * Sums::kThreads>;
  using Tokens = typename Keep::Held;
  const TokenPairs<T>& pairs = a.pairs;
  const TokenShare share(sums.thread.block(), a.chunk, pairs.tokens);
  const bool vectors = Quad<T>::at(pairs.logprob) && Quad<T>::at(pairs.advantages) && Quad<uint8_t>::at(pairs.mask) &&
                       Quad<float>::at(a.covariance);
  ThreadQuads<Keep, kHeldQuads, Sums> quads(sums, Keep({memory, a.kept}), share.tokens, vectors);
  const auto load = [&](int quad, bool vector) {
    const int64_t at = share.begin + quad * kQuad;
    const int left = share.tokens - quad * kQuad;
    return Tokens{read_quad(pairs.logprob, at, left, vector), read_quad(pairs.advantages, at, left, vector),
                  read_mask(pairs.mask, at, left, vector, 1)};
  };
  const auto make = [](int, const Tokens& tokens) { return tokens; };
  const uint64_t* totals = sums.shared.totals;

  using Unsigned = std::make_unsigned_t<typename Magnitude<T>::Bits>;
  typename Magnitude<T>::Bits largest_logprob = 0, largest_advantage = 0;
  uint32_t counted = 0;
  quads.take(load, make, [&](int quad, const Tokens& tokens) {
#pragma unroll
    for (int j = 0; j < kQuad; ++j) {
      const bool counts = tokens.counts[j] && quad * kQuad + j < share.tokens;
      const auto logprob = Magnitude<T>::of(tokens.logprob.value[j], counts);
      const auto advantage = Magnitude<T>::of(tokens.advantage.value[j], counts);
      largest_logprob = logprob > largest_logprob ? logprob : largest_logprob;
      largest_advantage = advantage > largest_advantage ? advantage : largest_advantage;
      counted += counts;
    }
  });
  sums.add_maximum(kLogprob, static_cast<Unsigned>(largest_logprob));
  sums.add_maximum(kAdvantages, static_cast<Unsigned>(largest_advantage));
  sums.add_sum(kCount, counted);
  sums.combine_slots(kLogprob, 2, 1);
  const double logprob = Magnitude<T>::value(static_cast<typename Magnitude<T>::Bits>(totals[kLogprob]));
  const double advantage = Magnitude<T>::value(static_cast<typename Magnitude<T>::Bits>(totals[kAdvantages]));
  const double count = static_cast<double>(static_cast<int64_t>(totals[kCount]));

  const double logprob_scale = power_of_two(fixed_point_exponent(logprob, count));
  const double advantage_scale = power_of_two(fixed_point_exponent(advantage, count));
  int64_t logprob_sum = 0, advantage_sum = 0;
  quads.each(load, make, [&](int, const Tokens& tokens) {  // beyond the last token lie zeros
#pragma unroll
    for (int j = 0; j < kQuad; ++j) {
      const bool counts = tokens.counts[j];
      const T logprob_j = value_if(tokens.logprob.value[j], counts);
      const T advantage_j = value_if(tokens.advantage.value[j], counts);
      logprob_sum = wrapping_sum(logprob_sum, to_fixed_point(logprob_j, logprob_scale));
      advantage_sum = wrapping_sum(advantage_sum, to_fixed_point(advantage_j, advantage_scale));
    }
  });
  sums.add_sum(kLogprobSum, static_cast<uint64_t>(logprob_sum));
  sums.add_sum(kAdvantagesSum, static_cast<uint64_t>(advantage_sum));
  sums.combine_slots(kLogprobSum, 0, 2);
  const double logprob_mean = fixed_point_mean(static_cast<int64_t>(totals[kLogprobSum]), logprob, count);
  const double advantage_mean = fixed_point_mean(static_cast<int64_t>(totals[kAdvantagesSum]), advantage, count);

  quads.each(load, make, [&](int quad, const Tokens& tokens) {
    Quad<float> covariance;
#pragma unroll
    for (int j = 0; j < kQuad; ++j) {
      covariance.value[j] = deviation_product(tokens.logprob.value[j], tokens.advantage.value[j], tokens.counts[j],
                                              logprob_mean, advantage_mean);
    }
    write_quad(a.covariance, share.begin + quad * kQuad, share.tokens - quad * kQuad, quads.whole(quad), covariance);
  });
}

}  // namespace entropy_kernels::cuda

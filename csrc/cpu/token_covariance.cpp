// Cov_i = (lp_i - mean lp)(A_i - mean A) over the tokens that count. Three passes: extremes and count, fixed-point
// sums, covariance; each is an op of its own for batches spread over ranks, where a reduction lies in between.
#include <algorithm>
#include <mutex>

#include "common/fixed_point.h"
#include "cpu/parallel.h"
#include "cpu/selection.h"

namespace entropy_kernels::cpu {

// +inf stands for any value that is not finite.
template <class T>
void covariance_extremes(const TokenPairs<T>& pairs, double* out) {
  std::mutex lock;
  out[0] = out[1] = out[2] = 0;
  over_tokens(pairs.tokens, [&, pairs](int64_t begin, int64_t end) {
    typename Magnitude<T>::Bits largest_logprob = 0, largest_advantage = 0;
    int64_t count = 0;
    for (int64_t i = begin; i < end; ++i) {
      const bool counts = pairs.counts(i);
      largest_logprob = std::max(largest_logprob, Magnitude<T>::of(pairs.logprob[i], counts));
      largest_advantage = std::max(largest_advantage, Magnitude<T>::of(pairs.advantages[i], counts));
      count += counts;
    }
    const std::lock_guard<std::mutex> guard(lock);
    out[0] = std::max(out[0], Magnitude<T>::value(largest_logprob));
    out[1] = std::max(out[1], Magnitude<T>::value(largest_advantage));
    out[2] += static_cast<double>(count);
  });
}

template <class T>
void covariance_sums(const TokenPairs<T>& pairs, const double* scales, int64_t* out) {
  std::mutex lock;
  out[0] = out[1] = 0;
  over_tokens(pairs.tokens, [&, pairs](int64_t begin, int64_t end) {
    const double logprob_scale = scales[0], advantage_scale = scales[1];
    int64_t logprob = 0, advantages = 0;
    for (int64_t i = begin; i < end; ++i) {
      const bool counts = pairs.counts(i);
      logprob = wrapping_sum(logprob, to_fixed_point(value_if(pairs.logprob[i], counts), logprob_scale));
      advantages = wrapping_sum(advantages, to_fixed_point(value_if(pairs.advantages[i], counts), advantage_scale));
    }
    const std::lock_guard<std::mutex> guard(lock);
    out[0] = wrapping_sum(out[0], logprob);
    out[1] = wrapping_sum(out[1], advantages);
  });
}

template <class T>
void token_covariance(const TokenPairs<T>& pairs, float* out) {
  double extremes[3];
  covariance_extremes(pairs, extremes);
  const double count = extremes[2];
  const double scales[] = {power_of_two(fixed_point_exponent(extremes[0], count)),
                           power_of_two(fixed_point_exponent(extremes[1], count))};
  int64_t sums[2];
  covariance_sums(pairs, scales, sums);
  const double logprob_mean = fixed_point_mean(sums[0], extremes[0], count);
  const double advantages_mean = fixed_point_mean(sums[1], extremes[1], count);
  over_tokens(pairs.tokens, [=](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      out[i] = deviation_product(pairs.logprob[i], pairs.advantages[i], pairs.counts(i), logprob_mean, advantages_mean);
    }
  });
}

template void token_covariance(const TokenPairs<float>&, float*);
template void token_covariance(const TokenPairs<double>&, float*);
template void covariance_extremes(const TokenPairs<float>&, double*);
template void covariance_extremes(const TokenPairs<double>&, double*);
template void covariance_sums(const TokenPairs<float>&, const double*, int64_t*);
template void covariance_sums(const TokenPairs<double>&, const double*, int64_t*);

}  // namespace entropy_kernels::cpu

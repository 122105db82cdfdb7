// Cov_i = (lp_i - mean lp)(A_i - mean A) over the tokens that count. Three passes: extremes and count, fixed-point
// sums, covariance; each is an op of its own for batches spread over ranks, where a reduction lies in between.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <mutex>
#include <optional>

#include "common/fixed_point.h"
#include "cpu/selection_view.h"
#include "selection_arguments.h"

namespace entropy_kernels::cpu {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kGrain = 32768;

// Largest magnitudes and number of the tokens that count; +inf stands for any non-finite value.
struct Extremes {
  double logprob = 0.0;
  double advantages = 0.0;
  double count = 0.0;
};

struct Means {
  double logprob;
  double advantages;
};

template <class T>
Extremes extremes(const T* logprob, const T* advantages, const uint8_t* mask, int64_t tokens) {
  Extremes all;
  std::mutex lock;
  torch::stable::parallel_for(0, tokens, kGrain, [&](int64_t begin, int64_t end) {
    typename Magnitude<T>::Bits largest_logprob = 0, largest_advantage = 0;
    int64_t count = 0;
    for (int64_t i = begin; i < end; ++i) {
      const bool valid = !mask || mask[i];
      largest_logprob = std::max(largest_logprob, Magnitude<T>::of(logprob[i], valid));
      largest_advantage = std::max(largest_advantage, Magnitude<T>::of(advantages[i], valid));
      count += valid;
    }
    const std::lock_guard<std::mutex> guard(lock);
    all.logprob = std::max(all.logprob, Magnitude<T>::value(largest_logprob));
    all.advantages = std::max(all.advantages, Magnitude<T>::value(largest_advantage));
    all.count += static_cast<double>(count);
  });
  return all;
}

struct Sums {
  int64_t logprob = 0;
  int64_t advantages = 0;
};

template <class T>
Sums fixed_point_sums(const T* logprob, const T* advantages, const uint8_t* mask, int64_t tokens,
                      double scale_logprob, double scale_advantages) {
  Sums all;
  std::mutex lock;
  torch::stable::parallel_for(0, tokens, kGrain, [&](int64_t begin, int64_t end) {
    Sums mine;
    for (int64_t i = begin; i < end; ++i) {
      const bool valid = !mask || mask[i];
      mine.logprob = wrapping_sum(mine.logprob, to_fixed_point(value_if(logprob[i], valid), scale_logprob));
      mine.advantages = wrapping_sum(mine.advantages, to_fixed_point(value_if(advantages[i], valid), scale_advantages));
    }
    const std::lock_guard<std::mutex> guard(lock);
    all.logprob = wrapping_sum(all.logprob, mine.logprob);
    all.advantages = wrapping_sum(all.advantages, mine.advantages);
  });
  return all;
}

template <class T>
void covariance(const T* logprob, const T* advantages, const uint8_t* mask, int64_t tokens, Means means, float* out) {
  torch::stable::parallel_for(0, tokens, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      out[i] = deviation_product(logprob[i], advantages[i], !mask || mask[i], means.logprob, means.advantages);
    }
  });
}

// Calls body with typed data pointers; both tensors have the dtype of logprob, float or double.
template <class Body>
auto with_type(const Tensor& logprob, const Tensor& advantages, const Body& body) {
  if (logprob.scalar_type() == ScalarType::Double) {
    return body(static_cast<const double*>(logprob.const_data_ptr()),
                static_cast<const double*>(advantages.const_data_ptr()));
  }
  return body(static_cast<const float*>(logprob.const_data_ptr()),
              static_cast<const float*>(advantages.const_data_ptr()));
}

// (N,) fp32; logprob and advantages are flat, both fp32 or both fp64.
Tensor token_covariance(const Tensor& logprob, const Tensor& advantages, std::optional<Tensor> mask) {
  check_covariance_arguments(logprob, advantages, mask);
  const uint8_t* valid = data_or_null<uint8_t>(mask);
  const int64_t tokens = logprob.numel();
  Tensor out = torch::stable::new_empty(logprob, logprob.sizes(), ScalarType::Float);
  with_type(logprob, advantages, [&](const auto* lp, const auto* adv) {
    const Extremes largest = extremes(lp, adv, valid, tokens);
    const Sums sums = fixed_point_sums(lp, adv, valid, tokens,
                                       power_of_two(fixed_point_exponent(largest.logprob, largest.count)),
                                       power_of_two(fixed_point_exponent(largest.advantages, largest.count)));
    const Means means{fixed_point_mean(sums.logprob, largest.logprob, largest.count),
                      fixed_point_mean(sums.advantages, largest.advantages, largest.count)};
    covariance(lp, adv, valid, tokens, means, static_cast<float*>(out.mutable_data_ptr()));
  });
  return out;
}

// (3,) float64: largest |logprob|, largest |advantage|, number of tokens that count
Tensor covariance_extremes(const Tensor& logprob, const Tensor& advantages, std::optional<Tensor> mask) {
  check_covariance_arguments(logprob, advantages, mask);
  Tensor out = torch::stable::new_empty(logprob, {3}, ScalarType::Double);
  const Extremes found = with_type(logprob, advantages, [&](const auto* lp, const auto* adv) {
    return extremes(lp, adv, data_or_null<uint8_t>(mask), logprob.numel());
  });
  auto* to = static_cast<double*>(out.mutable_data_ptr());
  to[0] = found.logprob;
  to[1] = found.advantages;
  to[2] = found.count;
  return out;
}

// (2,) int64 sums at the given scales, (2,) float64
Tensor covariance_sums(const Tensor& logprob, const Tensor& advantages, std::optional<Tensor> mask,
                       const Tensor& scales) {
  check_covariance_arguments(logprob, advantages, mask);
  check_pair("scales", scales, ScalarType::Double, logprob);
  Tensor out = torch::stable::new_empty(logprob, {2}, ScalarType::Long);
  const auto* scale = static_cast<const double*>(scales.const_data_ptr());
  const Sums sums = with_type(logprob, advantages, [&](const auto* lp, const auto* adv) {
    return fixed_point_sums(lp, adv, data_or_null<uint8_t>(mask), logprob.numel(), scale[0], scale[1]);
  });
  auto* to = static_cast<int64_t*>(out.mutable_data_ptr());
  to[0] = sums.logprob;
  to[1] = sums.advantages;
  return out;
}

// (N,) float32 from given means, (2,) float64
Tensor covariance_apply(const Tensor& logprob, const Tensor& advantages, std::optional<Tensor> mask,
                        const Tensor& means) {
  check_covariance_arguments(logprob, advantages, mask);
  check_pair("means", means, ScalarType::Double, logprob);
  Tensor out = torch::stable::new_empty(logprob, logprob.sizes(), ScalarType::Float);
  const auto* mean = static_cast<const double*>(means.const_data_ptr());
  with_type(logprob, advantages, [&](const auto* lp, const auto* adv) {
    covariance(lp, adv, data_or_null<uint8_t>(mask), logprob.numel(), {mean[0], mean[1]},
               static_cast<float*>(out.mutable_data_ptr()));
  });
  return out;
}

}  // namespace
}  // namespace entropy_kernels::cpu

STABLE_TORCH_LIBRARY_IMPL(entropy_kernels_native, CompositeExplicitAutograd, m) {
  m.impl("token_covariance", TORCH_BOX(&entropy_kernels::cpu::token_covariance));
  m.impl("covariance_extremes", TORCH_BOX(&entropy_kernels::cpu::covariance_extremes));
  m.impl("covariance_sums", TORCH_BOX(&entropy_kernels::cpu::covariance_sums));
  m.impl("covariance_apply", TORCH_BOX(&entropy_kernels::cpu::covariance_apply));
}

// The selection operators on NVIDIA GPUs: tensors, memory, the current stream. What happens on the device is in
// selection_kernels.h and covariance_kernels.h, what happens in the single steps in common/selection_steps.h.
#include "cuda/selection.h"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>

#include "cuda/tensors.h"
#include "selection_arguments.h"

namespace entropy_kernels::cuda {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using torch::stable::accelerator::DeviceGuard;

TokenIndex token_index_of(const std::optional<Tensor>& given, const Tensor& offset) {
  return {data<int64_t>(given), data<int64_t>(offset)};
}

// Calls body with typed data pointers; both tensors have the dtype of logprob, float or double.
template <class Body>
void with_type(const Tensor& logprob, const Tensor& advantages, const Body& body) {
  if (logprob.scalar_type() == ScalarType::Double) {
    body(data<double>(logprob), data<double>(advantages));
  } else {
    body(data<float>(logprob), data<float>(advantages));
  }
}

Tensor token_covariance(const Tensor& logprob, const Tensor& advantages, std::optional<Tensor> mask) {
  check_covariance_arguments(logprob, advantages, mask);
  Tensor out = torch::stable::new_empty(logprob, logprob.sizes(), ScalarType::Float);
  const int64_t tokens = logprob.numel();
  if (tokens == 0) {
    return out;
  }
  const DeviceGuard guard(logprob.get_device());
  const TeamPlan plan =
      plan_covariance(tokens, logprob.scalar_type() == ScalarType::Double, static_cast<int>(logprob.get_device()));
  const Tensor exchange = words(logprob, plan.cluster ? 0 : kTeamSlots);
  with_type(logprob, advantages, [&]<class T>(const T* lp, const T* adv) {
    launch_covariance(plan,
                      CovarianceArguments<T>{lp, adv, data<uint8_t>(mask), tokens, 0, mutable_data<float>(out),
                                             mutable_data<uint64_t>(exchange)},
                      current_stream(logprob));
  });
  return out;
}

// Fills in what the masks have in common, and launches.
Tensor select(SelectionArguments arguments, const Tensor& covariance, const std::optional<Tensor>& mask,
              const std::optional<Tensor>& exclude, const std::optional<Tensor>& token_index) {
  Tensor selected = torch::stable::new_empty(covariance, covariance.sizes(), ScalarType::Bool);
  const int64_t tokens = covariance.numel();
  if (tokens == 0) {
    return selected;
  }
  const DeviceGuard guard(covariance.get_device());
  const TeamPlan plan = plan_selection(tokens, static_cast<int>(covariance.get_device()));
  const int64_t key_words = key_store_bytes(plan.tokens()) / 8 + 1;
  const Tensor scratch = words(covariance, plan.cluster ? 0 : kSelectionExchange + key_words);
  arguments.covariance = data<float>(covariance);
  arguments.mask = data<uint8_t>(mask);
  arguments.exclude = data<uint8_t>(exclude);
  arguments.index = data<int64_t>(token_index);
  arguments.tokens = tokens;
  arguments.selected = mutable_data<uint8_t>(selected);
  if (!plan.cluster) {
    arguments.exchange = mutable_data<uint64_t>(scratch);
    arguments.keys = reinterpret_cast<uint32_t*>(arguments.exchange + kSelectionExchange);
    arguments.candidates = arguments.keys + plan.tokens();
  }
  launch_selection(plan, arguments, current_stream(covariance));
  return selected;
}

Tensor clip_cov_mask(const Tensor& covariance, std::optional<Tensor> mask, std::optional<Tensor> exclude,
                     std::optional<Tensor> token_index, const Tensor& seed, double ratio, int64_t k,
                     bool at_least_one, double low, double high, bool quantile, bool closed,
                     std::optional<Tensor> numbers) {
  check_selection(covariance, mask, exclude, token_index, ratio, k, numbers, 4);
  check_scalar("seed", seed, covariance);
  SelectionArguments arguments = {};
  arguments.count = {ratio, k, at_least_one};
  arguments.numbers = data<double>(numbers);
  set_band(arguments, data<int64_t>(seed), low, high, quantile, closed);
  return select(arguments, covariance, mask, exclude, token_index);
}

Tensor kl_cov_mask(const Tensor& covariance, std::optional<Tensor> mask, std::optional<Tensor> exclude,
                   std::optional<Tensor> token_index, double ratio, int64_t k, bool at_least_one,
                   std::optional<Tensor> numbers) {
  check_selection(covariance, mask, exclude, token_index, ratio, k, numbers, 2);
  SelectionArguments arguments = {};
  arguments.count = {ratio, k, at_least_one};
  arguments.numbers = data<double>(numbers);
  return select(arguments, covariance, mask, exclude, token_index);
}

// ---- the steps, for batches spread over ranks

template <class Step>
void run_step(const Tensor& like, const Step& step) {
  if (like.numel() > 0) {
    const DeviceGuard guard(like.get_device());
    launch_token_step(step, like.numel(), current_stream(like));
  }
}

// (rows, bins) int64
template <class Digit>
Tensor histogram(const Tensor& keys, const Tensor& state, const Digit& digit) {
  const DeviceGuard guard(keys.get_device());
  Tensor out = torch::stable::new_zeros(state, {state.size(0), kRadixBins}, ScalarType::Long);
  if (keys.numel() > 0) {
    launch_digit_step(digit, state.size(0), keys.numel(), mutable_data<int64_t>(out), current_stream(keys));
  }
  return out;
}

Tensor covariance_extremes(const Tensor& logprob, const Tensor& advantages, std::optional<Tensor> mask) {
  check_covariance_arguments(logprob, advantages, mask);
  const DeviceGuard guard(logprob.get_device());
  Tensor out = torch::stable::new_zeros(logprob, {3}, ScalarType::Double);
  if (logprob.numel() > 0) {
    with_type(logprob, advantages, [&](const auto* lp, const auto* adv) {
      launch_extremes(lp, adv, data<uint8_t>(mask), logprob.numel(), mutable_data<double>(out),
                      current_stream(logprob));
    });
  }
  return out;
}

Tensor covariance_sums(const Tensor& logprob, const Tensor& advantages, std::optional<Tensor> mask,
                       const Tensor& scales) {
  check_covariance_arguments(logprob, advantages, mask);
  check_pair("scales", scales, ScalarType::Double, logprob);
  const DeviceGuard guard(logprob.get_device());
  Tensor out = torch::stable::new_zeros(logprob, {2}, ScalarType::Long);
  if (logprob.numel() > 0) {
    with_type(logprob, advantages, [&](const auto* lp, const auto* adv) {
      launch_sums(lp, adv, data<uint8_t>(mask), data<double>(scales), logprob.numel(), mutable_data<int64_t>(out),
                  current_stream(logprob));
    });
  }
  return out;
}

Tensor covariance_apply(const Tensor& logprob, const Tensor& advantages, std::optional<Tensor> mask,
                        const Tensor& means) {
  check_covariance_arguments(logprob, advantages, mask);
  check_pair("means", means, ScalarType::Double, logprob);
  Tensor out = torch::stable::new_empty(logprob, logprob.sizes(), ScalarType::Float);
  with_type(logprob, advantages, [&]<class T>(const T* lp, const T* adv) {
    run_step(logprob,
             CovarianceStep<T>{lp, adv, data<uint8_t>(mask), data<double>(means), mutable_data<float>(out)});
  });
  return out;
}

Tensor selection_value_keys(const Tensor& covariance, std::optional<Tensor> mask, std::optional<Tensor> exclude) {
  check_masks(covariance, mask, exclude);
  Tensor out = torch::stable::new_empty(covariance, covariance.sizes(), ScalarType::Long);
  run_step(covariance, ValueKeyStep{data<float>(covariance), data<uint8_t>(mask), data<uint8_t>(exclude),
                                    mutable_data<int64_t>(out)});
  return out;
}

Tensor selection_random_keys(const Tensor& value_keys, const Tensor& band, std::optional<Tensor> token_index,
                             const Tensor& offset, const Tensor& seed) {
  check_keys("value_keys", value_keys, token_index, offset);
  check_pair("band", band, ScalarType::Long, value_keys);
  check_scalar("seed", seed, value_keys);
  Tensor out = torch::stable::new_empty(value_keys, value_keys.sizes(), ScalarType::Long);
  run_step(value_keys, RandomKeyStep{data<int64_t>(value_keys), data<int64_t>(band),
                                     token_index_of(token_index, offset), data<int64_t>(seed),
                                     mutable_data<int64_t>(out)});
  return out;
}

Tensor selection_key_histogram(const Tensor& keys, const Tensor& state, int64_t shift, int64_t bits) {
  check_key_digit(keys, state, shift, bits);
  return histogram(keys, state,
                   KeyDigitStep{data<int64_t>(keys), data<int64_t>(state), static_cast<int>(shift),
                                static_cast<int>(bits)});
}

Tensor selection_index_histogram(const Tensor& keys, std::optional<Tensor> token_index, const Tensor& offset,
                                 const Tensor& key_state, const Tensor& state, int64_t shift, int64_t bits,
                                 int64_t known) {
  check_index_digit(keys, token_index, offset, key_state, state, shift, bits, known);
  return histogram(keys, state,
                   IndexDigitStep{data<int64_t>(keys), token_index_of(token_index, offset), data<int64_t>(key_state),
                                  data<int64_t>(state), static_cast<int>(shift), static_cast<int>(bits),
                                  static_cast<int>(known)});
}

Tensor selection_mask(const Tensor& keys, std::optional<Tensor> token_index, const Tensor& offset,
                      const Tensor& threshold, const Tensor& last_index) {
  check_keys("keys", keys, token_index, offset);
  check_scalar("threshold", threshold, keys);
  check_scalar("last_index", last_index, keys);
  Tensor out = torch::stable::new_empty(keys, keys.sizes(), ScalarType::Bool);
  run_step(keys, MaskStep{data<int64_t>(keys), token_index_of(token_index, offset), data<int64_t>(threshold),
                          data<int64_t>(last_index), mutable_data<uint8_t>(out)});
  return out;
}

}  // namespace
}  // namespace entropy_kernels::cuda

STABLE_TORCH_LIBRARY_IMPL(entropy_kernels_native, CUDA, m) {
  using namespace entropy_kernels::cuda;
  m.impl("token_covariance", TORCH_BOX(&token_covariance));
  m.impl("clip_cov_mask", TORCH_BOX(&clip_cov_mask));
  m.impl("kl_cov_mask", TORCH_BOX(&kl_cov_mask));
  m.impl("covariance_extremes", TORCH_BOX(&covariance_extremes));
  m.impl("covariance_sums", TORCH_BOX(&covariance_sums));
  m.impl("covariance_apply", TORCH_BOX(&covariance_apply));
  m.impl("selection_value_keys", TORCH_BOX(&selection_value_keys));
  m.impl("selection_random_keys", TORCH_BOX(&selection_random_keys));
  m.impl("selection_key_histogram", TORCH_BOX(&selection_key_histogram));
  m.impl("selection_index_histogram", TORCH_BOX(&selection_index_histogram));
  m.impl("selection_mask", TORCH_BOX(&selection_mask));
}

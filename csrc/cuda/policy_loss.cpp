// The operator policy_loss on NVIDIA GPUs: tensors, memory, the current stream.
#include "cuda/policy_loss.h"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <tuple>

#include "cuda/tensors.h"

namespace entropy_kernels::cuda {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using torch::stable::accelerator::DeviceGuard;

// Inputs are fp32, flat and contiguous; a seed makes the selection Clip-Cov's. See registration.cpp.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> policy_loss(
    const Tensor& logprob, const Tensor& old_logprob, const Tensor& advantages, std::optional<Tensor> mask,
    std::optional<Tensor> given_covariance, std::optional<Tensor> given, std::optional<Tensor> token_index, std::optional<Tensor> seed,
    std::optional<Tensor> coefficient, double clip_low, double clip_high, double dual_clip, int64_t selected,
    bool select, bool exclude_clipped, int64_t penalty, bool square_slope, double ratio, int64_t k, bool at_least_one,
    double low, double high, bool quantile, bool closed) {
  const DeviceGuard guard(logprob.get_device());
  const int64_t tokens = logprob.numel();
  Tensor term = torch::stable::new_empty(logprob, logprob.sizes(), ScalarType::Float);
  Tensor slope = torch::stable::new_empty(logprob, logprob.sizes(), ScalarType::Float);
  Tensor covariance = torch::stable::new_empty(logprob, {given_covariance ? 0 : tokens}, ScalarType::Float);
  Tensor chosen = torch::stable::new_empty(logprob, {select ? tokens : 0}, ScalarType::Bool);
  // without a token no kernel is launched, and everything is 0: the weight too, which has no slope to weigh
  Tensor totals = tokens > 0 ? torch::stable::new_empty(logprob, {kPolicyTotals}, ScalarType::Double)
                             : torch::stable::new_zeros(logprob, {kPolicyTotals}, ScalarType::Double);
  Tensor mean = tokens > 0 ? torch::stable::new_empty(logprob, {}, ScalarType::Float)
                           : torch::stable::new_zeros(logprob, {}, ScalarType::Float);
  Tensor metrics = tokens > 0 ? torch::stable::new_empty(logprob, {kPolicyMetrics}, ScalarType::Float)
                              : torch::stable::new_zeros(logprob, {kPolicyMetrics}, ScalarType::Float);
  if (tokens == 0) {
    return {term, slope, covariance, chosen, totals, mean, metrics};
  }
  const TeamPlan plan = plan_policy_loss(tokens, static_cast<int>(logprob.get_device()));
  const int64_t key_words = key_store_bytes(plan.tokens()) / 8 + 1;
  const int64_t partial_words = int64_t{plan.blocks} * kPolicySums;
  const Tensor scratch = words(logprob, plan.cluster ? 0 : kSelectionExchange + partial_words + key_words);

  PolicyLossArguments a = {};
  a.old_logprob = data<float>(old_logprob);
  a.clips = {static_cast<float>(clip_low), static_cast<float>(clip_high), static_cast<float>(dual_clip)};
  a.selected = static_cast<Selected>(selected);
  a.select = select;
  a.exclude_clipped = exclude_clipped;
  a.given = data<uint8_t>(given);
  a.penalty = static_cast<Penalty>(penalty);
  a.square_slope = square_slope;
  a.coefficient = data<float>(coefficient);
  a.term = mutable_data<float>(term);
  a.slope = mutable_data<float>(slope);
  a.totals = mutable_data<double>(totals);
  a.mean = mutable_data<float>(mean);
  a.metrics = mutable_data<float>(metrics);
  a.covariance_given = given_covariance.has_value();
  // one that is given is only read
  float* values = given_covariance ? const_cast<float*>(data<float>(given_covariance)) : mutable_data<float>(covariance);
  a.covariance = {data<float>(logprob), data<float>(advantages), data<uint8_t>(mask), tokens, 0, values, nullptr};
  SelectionArguments& s = a.selection;
  s.covariance = a.covariance.covariance;
  s.mask = a.covariance.mask;
  s.index = data<int64_t>(token_index);
  s.tokens = tokens;
  s.count = {ratio, k, at_least_one};
  set_band(s, data<int64_t>(seed), low, high, quantile, closed);
  s.selected = select ? mutable_data<uint8_t>(chosen) : nullptr;
  s.exclude = exclude_clipped ? s.selected : nullptr;
  if (!plan.cluster) {
    a.covariance.exchange = s.exchange = mutable_data<uint64_t>(scratch);
    a.partials = reinterpret_cast<double*>(s.exchange + kSelectionExchange);
    s.keys = reinterpret_cast<uint32_t*>(s.exchange + kSelectionExchange + partial_words);
    s.candidates = s.keys + plan.tokens();
  }
  launch_policy_loss(plan, a, current_stream(logprob));
  return {term, slope, covariance, chosen, totals, mean, metrics};
}

}  // namespace
}  // namespace entropy_kernels::cuda

STABLE_TORCH_LIBRARY_IMPL(entropy_kernels_native, CUDA, m) {
  m.impl("policy_loss", TORCH_BOX(&entropy_kernels::cuda::policy_loss));
}

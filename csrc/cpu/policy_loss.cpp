// Covariance, selection, policy term, its derivative and the sums of the metrics. A token is looked at once after the
// selection; what is done with it stands in common/policy_term.h.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "common/policy_term.h"
#include "cpu/parallel.h"
#include "cpu/selection.h"
#include "cpu/selection_view.h"

namespace entropy_kernels::cpu {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kBlock = 4096;  // tokens of one partial sum: the sums do not depend on the number of threads
constexpr int64_t kTokenCost = 8;  // in the elements of parallel.h: an exp and a dozen branches

struct Batch {
  const float* logprob;
  const float* old_logprob;
  const float* advantages;
  const uint8_t* mask;  // null: all tokens count
  PolicyClips<float> clips;
  int64_t tokens;

  bool valid(int64_t i) const { return mask == nullptr || mask[i] != 0; }
  PolicyBranch<float> branch(int64_t i) const {
    return policy_branch(logprob[i], old_logprob[i], advantages[i], valid(i), clips);
  }
  // run(block, first token, last token + 1)
  template <class Run>
  void blocks(const Run& run) const {
    parallel_tasks((tokens + kBlock - 1) / kBlock, kBlock * kTokenCost, [&](int64_t block) {
      run(block, block * kBlock, std::min(tokens, (block + 1) * kBlock));
    });
  }
};

struct Totals {
  double sums[kPolicySums] = {};
  uint32_t maxima[kPolicyMaxima] = {};

  void merge(const Totals& other) {
    for (int i = 0; i < kPolicySums; ++i) sums[i] += other.sums[i];
    for (int i = 0; i < kPolicyMaxima; ++i) maxima[i] = std::max(maxima[i], other.maxima[i]);
  }
};

// See registration.cpp.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> policy_loss(
    const Tensor& logprob, const Tensor& old_logprob, const Tensor& advantages, std::optional<Tensor> mask,
    std::optional<Tensor> given_covariance, std::optional<Tensor> given, std::optional<Tensor> token_index,
    std::optional<Tensor> seed, std::optional<Tensor> coefficient, double clip_low, double clip_high, double dual_clip,
    int64_t selected_as, bool select, bool exclude_clipped, int64_t penalty_kind, bool square_slope, double ratio,
    int64_t k, bool at_least_one, double low, double high, bool quantile, bool closed) {
  const Batch batch = {static_cast<const float*>(logprob.const_data_ptr()),
                       static_cast<const float*>(old_logprob.const_data_ptr()),
                       static_cast<const float*>(advantages.const_data_ptr()),
                       data_or_null<uint8_t>(mask),
                       {static_cast<float>(clip_low), static_cast<float>(clip_high), static_cast<float>(dual_clip)},
                       logprob.numel()};
  const auto floats = [&](int64_t count) { return torch::stable::new_empty(logprob, {count}, ScalarType::Float); };
  const auto bytes = [&](int64_t count) { return torch::stable::new_empty(logprob, {count}, ScalarType::Bool); };
  const Tensor covariance = given_covariance ? *given_covariance : token_covariance(logprob, advantages, mask);
  const auto* values = static_cast<const float*>(covariance.const_data_ptr());

  Tensor chosen = bytes(select ? batch.tokens : 0);
  Band band = {1, 0};  // no covariance lies in it
  if (select) {
    std::optional<Tensor> exclude;
    if (exclude_clipped) {
      exclude = bytes(batch.tokens);
      auto* flags = static_cast<uint8_t*>(exclude->mutable_data_ptr());
      batch.blocks([&](int64_t, int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) flags[i] = batch.branch(i).clipped;
      });
    }
    const TokenView view = token_view(covariance, mask, exclude, token_index);
    const SelectionCount request = {ratio, k, at_least_one};
    auto* flags = static_cast<uint8_t*>(chosen.mutable_data_ptr());
    if (seed) {
      band = clip_cov_band(view, low, high, quantile, closed);
      select_at_random(view, band, request, *static_cast<const int64_t*>(seed->const_data_ptr()), flags);
    } else {
      select_largest(view, request, flags);
    }
  }

  Tensor term = floats(batch.tokens), slope = floats(batch.tokens);
  auto* terms = static_cast<float*>(term.mutable_data_ptr());
  auto* slopes = static_cast<float*>(slope.mutable_data_ptr());
  const uint8_t* selected = select ? static_cast<const uint8_t*>(chosen.const_data_ptr()) : data_or_null<uint8_t>(given);
  const auto kind = static_cast<Selected>(selected_as);
  const auto penalty = static_cast<Penalty>(penalty_kind);
  const float beta = coefficient ? *static_cast<const float*>(coefficient->const_data_ptr()) : 0.0f;
  std::vector<Totals> partial((batch.tokens + kBlock - 1) / kBlock);
  batch.blocks([&](int64_t block, int64_t begin, int64_t end) {
    Totals mine;
    for (int64_t i = begin; i < end; ++i) {
      const bool valid = batch.valid(i), acted_on = valid && selected != nullptr && selected[i] != 0;
      const PolicyBranch<float> branch = batch.branch(i);
      const PolicyTerm<float> result =
          penalised_term(branch, valid, acted_on ? kind : Selected::kUnchanged, penalty, square_slope, beta);
      terms[i] = result.value;
      slopes[i] = result.slope;
      const bool candidate =
          valid && values[i] >= band.low && values[i] <= band.high && !(exclude_clipped && branch.clipped);
      add_to_sums(mine.sums, branch, result, values[i], valid, candidate, acted_on);
      if (valid) {
        mine.maxima[kRatioMaximum] = larger_key(mine.maxima[kRatioMaximum], branch.ratio);
        mine.maxima[kCovarianceMaximum] = larger_key(mine.maxima[kCovarianceMaximum], values[i]);
      }
    }
    partial[block] = mine;
  });
  Totals all;
  for (const Totals& part : partial) all.merge(part);

  Tensor totals = torch::stable::new_empty(logprob, {kPolicyTotals}, ScalarType::Double);
  auto* total = static_cast<double*>(totals.mutable_data_ptr());
  std::copy_n(all.sums, int{kPolicySums}, total);
  std::transform(all.maxima, all.maxima + kPolicyMaxima, total + kPolicySums, maximum_of_key);
  Tensor mean = torch::stable::new_empty(logprob, {}, ScalarType::Float);
  *static_cast<float*>(mean.mutable_data_ptr()) = static_cast<float>(policy_metric(total, kTermSum));
  Tensor metrics = floats(kPolicyMetrics);
  for (int i = 0; i < kPolicyMetrics; ++i) {
    static_cast<float*>(metrics.mutable_data_ptr())[i] = static_cast<float>(policy_metric(total, i));
  }
  return {term, slope, given_covariance ? floats(0) : covariance, chosen, totals, mean, metrics};
}

}  // namespace
}  // namespace entropy_kernels::cpu

STABLE_TORCH_LIBRARY_IMPL(entropy_kernels_native, CPU, m) {
  m.impl("policy_loss", TORCH_BOX(&entropy_kernels::cpu::policy_loss));
}

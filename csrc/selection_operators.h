// The selection operators, once for both halves: arguments, outputs, registration. A Half says how it computes:
//   Half(tensor)                       on the tensor's device
//   select(selection, out)             the whole mask; at least one token, as everywhere below
//   select(view, budget, out)          the same, by a budget
//   covariance(pairs, out)             token_covariance
//   extremes(pairs, out)               into (3,) zeros: largest |logprob|, largest |advantage|, tokens that count
//   sums(pairs, scales, out)           into (2,) zeros: fixed-point sums
//   for_each_token(step, tokens)       step(token)
//   histogram(digit, rows, tokens, out)   into (rows, kRadixBins) zeros: what the weights of the tokens that have each
//                                         digit(row, token) >= 0 come to
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>

#include "common/selection.h"
#include "common/selection_steps.h"
#include "selection_arguments.h"

namespace entropy_kernels {

template <class Half>
struct SelectionOperators {
  using Tensor = torch::stable::Tensor;
  using Optional = std::optional<Tensor>;
  using ScalarType = torch::headeronly::ScalarType;

  static Tensor empty_as(const Tensor& like, ScalarType dtype) {
    return torch::stable::new_empty(like, like.sizes(), dtype);
  }

  // ---- masks over one process's batch

  static TokenView view_of(const Tensor& values, const Optional& mask, const Optional& exclude,
                           const Optional& token_index) {
    return {data<float>(values), data<uint8_t>(mask), data<uint8_t>(exclude), data<int64_t>(token_index),
            values.numel()};
  }

  // `numbers` of count and band, and the seed, if there is one: those on the CPU are read here.
  static Tensor select(const Tensor& covariance, const Optional& mask, const Optional& exclude,
                       const Optional& token_index, Count count, const Tensor* seed, Band band,
                       const Optional& numbers) {
    Tensor out = empty_as(covariance, ScalarType::Bool);
    count.numbers = data<double>(numbers);
    if (seed != nullptr) band.numbers = count.numbers;
    if (numbers.has_value() && numbers->is_cpu()) {
      count = count.read();
      band = band.read();
    }
    Seed given = {};
    if (seed != nullptr) given = seed->is_cpu() ? Seed{*data<int64_t>(*seed), nullptr} : Seed{0, data<int64_t>(*seed)};
    const TokenView view = view_of(covariance, mask, exclude, token_index);
    const Selection selection = {view, count, seed != nullptr, given, band};
    if (view.tokens > 0) Half(covariance).select(selection, mutable_data<uint8_t>(out));
    return out;
  }

  static void check(const Tensor& covariance, const Optional& mask, const Optional& exclude,
                    const Optional& token_index, const char* name = "covariance") {
    check_masks(name, covariance, mask, exclude);
    check_per_token("token_index", token_index, ScalarType::Long, covariance);
  }

  static Tensor clip_cov_mask(const Tensor& covariance, Optional mask, Optional exclude, Optional token_index,
                              const Tensor& seed, double ratio, int64_t k, bool at_least_one, double low, double high,
                              bool quantile, bool closed, Optional numbers) {
    check(covariance, mask, exclude, token_index);
    check_count(ratio, k, numbers, 4, covariance);
    check_given("seed", seed, ScalarType::Long, {}, covariance);
    return select(covariance, mask, exclude, token_index, {ratio, k, at_least_one, nullptr}, &seed,
                  {low, high, quantile, closed, nullptr}, numbers);
  }

  static Tensor kl_cov_mask(const Tensor& covariance, Optional mask, Optional exclude, Optional token_index,
                            double ratio, int64_t k, bool at_least_one, Optional numbers) {
    check(covariance, mask, exclude, token_index);
    check_count(ratio, k, numbers, 2, covariance);
    return select(covariance, mask, exclude, token_index, {ratio, k, at_least_one, nullptr}, nullptr, {}, numbers);
  }

  static Tensor budget_mask(const Tensor& score, Optional mask, Optional exclude, Optional token_index,
                            const Tensor& numbers) {
    check(score, mask, exclude, token_index, "score");
    check_given("numbers", numbers, ScalarType::Double, {3}, score);
    Tensor out = empty_as(score, ScalarType::Bool);
    const TokenView view = view_of(score, mask, exclude, token_index);
    Budget budget = {0, 0, 0, data<double>(numbers)};
    if (numbers.is_cpu()) budget = budget.read();
    if (view.tokens > 0) Half(score).select(view, budget, mutable_data<uint8_t>(out));
    return out;
  }

  // ---- covariance

  // Calls run(half, pairs) with the dtype of logprob, float or double, unless there are no tokens.
  template <class Run>
  static void with_pairs(const Tensor& logprob, const Tensor& advantages, const Optional& mask, const Run& run) {
    if (logprob.numel() == 0) return;
    const auto typed = [&]<class T>(T) {
      run(Half(logprob), TokenPairs<T>{data<T>(logprob), data<T>(advantages), data<uint8_t>(mask), logprob.numel()});
    };
    logprob.scalar_type() == ScalarType::Double ? typed(double{}) : typed(float{});
  }

  static Tensor token_covariance(const Tensor& logprob, const Tensor& advantages, Optional mask) {
    check_covariance_arguments(logprob, advantages, mask);
    Tensor out = empty_as(logprob, ScalarType::Float);
    with_pairs(logprob, advantages, mask,
               [&](Half half, const auto& pairs) { half.covariance(pairs, mutable_data<float>(out)); });
    return out;
  }

  // (3,) float64
  static Tensor covariance_extremes(const Tensor& logprob, const Tensor& advantages, Optional mask) {
    check_covariance_arguments(logprob, advantages, mask);
    Tensor out = torch::stable::new_zeros(logprob, {3}, ScalarType::Double);
    with_pairs(logprob, advantages, mask,
               [&](Half half, const auto& pairs) { half.extremes(pairs, mutable_data<double>(out)); });
    return out;
  }

  // (2,) int64 at the given scales, (2,) float64
  static Tensor covariance_sums(const Tensor& logprob, const Tensor& advantages, Optional mask, const Tensor& scales) {
    check_covariance_arguments(logprob, advantages, mask);
    check_pair("scales", scales, ScalarType::Double, logprob);
    Tensor out = torch::stable::new_zeros(logprob, {2}, ScalarType::Long);
    with_pairs(logprob, advantages, mask, [&](Half half, const auto& pairs) {
      half.sums(pairs, data<double>(scales), mutable_data<int64_t>(out));
    });
    return out;
  }

  // From given means, (2,) float64.
  static Tensor covariance_apply(const Tensor& logprob, const Tensor& advantages, Optional mask, const Tensor& means) {
    check_covariance_arguments(logprob, advantages, mask);
    check_pair("means", means, ScalarType::Double, logprob);
    Tensor out = empty_as(logprob, ScalarType::Float);
    with_pairs(logprob, advantages, mask, [&]<class T>(Half half, const TokenPairs<T>& pairs) {
      half.for_each_token(CovarianceStep<T>{pairs, data<double>(means), mutable_data<float>(out)}, pairs.tokens);
    });
    return out;
  }

  // ---- the steps, for batches spread over ranks

  static TokenIndex index_of(const Optional& given, const Tensor& offset) {
    return {data<int64_t>(given), data<int64_t>(offset)};
  }

  template <class Step>
  static void for_each_token(const Tensor& like, const Step& step) {
    if (like.numel() > 0) Half(like).for_each_token(step, like.numel());
  }

  // (rows, bins) int64
  template <class Digit>
  static Tensor histogram(const Tensor& keys, const Tensor& state, const Digit& digit) {
    Tensor out = torch::stable::new_zeros(state, {state.size(0), kRadixBins}, ScalarType::Long);
    if (keys.numel() > 0) Half(keys).histogram(digit, state.size(0), keys.numel(), mutable_data<int64_t>(out));
    return out;
  }

  static Tensor selection_value_keys(const Tensor& covariance, Optional mask, Optional exclude) {
    check_masks("covariance", covariance, mask, exclude);
    Tensor out = empty_as(covariance, ScalarType::Long);
    for_each_token(covariance, ValueKeyStep{data<float>(covariance), data<uint8_t>(mask), data<uint8_t>(exclude),
                                            mutable_data<int64_t>(out)});
    return out;
  }

  static Tensor selection_random_keys(const Tensor& value_keys, const Tensor& band, Optional token_index,
                                      const Tensor& offset, const Tensor& seed) {
    check_keys("value_keys", value_keys, token_index, offset);
    check_pair("band", band, ScalarType::Long, value_keys);
    check_scalar("seed", seed, value_keys);
    Tensor out = empty_as(value_keys, ScalarType::Long);
    for_each_token(value_keys,
                   RandomKeyStep{data<int64_t>(value_keys), data<int64_t>(band), index_of(token_index, offset),
                                 data<int64_t>(seed), mutable_data<int64_t>(out)});
    return out;
  }

  static KeyDigitStep key_digit(const Tensor& keys, const Tensor& state, int64_t shift, int64_t bits) {
    check_key_digit(keys, state, shift, bits);
    return {data<int64_t>(keys), data<int64_t>(state), static_cast<int>(shift), static_cast<int>(bits)};
  }

  static Tensor selection_key_histogram(const Tensor& keys, const Tensor& state, int64_t shift, int64_t bits) {
    return histogram(keys, state, key_digit(keys, state, shift, bits));
  }

  static Tensor selection_weight_histogram(const Tensor& keys, const Tensor& state, const Tensor& scale, int64_t shift,
                                           int64_t bits) {
    const KeyDigitStep digit = key_digit(keys, state, shift, bits);
    check_state("state", state, 1, keys);
    check_tensor("scale", scale, ScalarType::Double, {}, keys);
    return histogram(keys, state, WeightDigitStep{digit, data<double>(scale)});
  }

  static Tensor selection_index_histogram(const Tensor& keys, Optional token_index, const Tensor& offset,
                                          const Tensor& key_state, const Tensor& state, int64_t shift, int64_t bits,
                                          int64_t known) {
    check_index_digit(keys, token_index, offset, key_state, state, shift, bits, known);
    return histogram(keys, state,
                     IndexDigitStep{data<int64_t>(keys), index_of(token_index, offset), data<int64_t>(key_state),
                                    data<int64_t>(state), static_cast<int>(shift), static_cast<int>(bits),
                                    static_cast<int>(known)});
  }

  static Tensor selection_mask(const Tensor& keys, Optional token_index, const Tensor& offset, const Tensor& threshold,
                               const Tensor& last_index) {
    check_keys("keys", keys, token_index, offset);
    check_scalar("threshold", threshold, keys);
    check_scalar("last_index", last_index, keys);
    Tensor out = empty_as(keys, ScalarType::Bool);
    for_each_token(keys, MaskStep{data<int64_t>(keys), index_of(token_index, offset), data<int64_t>(threshold),
                                  data<int64_t>(last_index), mutable_data<uint8_t>(out)});
    return out;
  }

  template <class Library>
  static void implement(Library& m) {
    m.impl("token_covariance", TORCH_BOX(&token_covariance));
    m.impl("clip_cov_mask", TORCH_BOX(&clip_cov_mask));
    m.impl("kl_cov_mask", TORCH_BOX(&kl_cov_mask));
    m.impl("budget_mask", TORCH_BOX(&budget_mask));
    m.impl("covariance_extremes", TORCH_BOX(&covariance_extremes));
    m.impl("covariance_sums", TORCH_BOX(&covariance_sums));
    m.impl("covariance_apply", TORCH_BOX(&covariance_apply));
    m.impl("selection_value_keys", TORCH_BOX(&selection_value_keys));
    m.impl("selection_random_keys", TORCH_BOX(&selection_random_keys));
    m.impl("selection_key_histogram", TORCH_BOX(&selection_key_histogram));
    m.impl("selection_weight_histogram", TORCH_BOX(&selection_weight_histogram));
    m.impl("selection_index_histogram", TORCH_BOX(&selection_index_histogram));
    m.impl("selection_mask", TORCH_BOX(&selection_mask));
  }
};

}  // namespace entropy_kernels

// The steps of common/selection_steps.h over all tokens on torch's threads.
#include "common/selection_steps.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <mutex>
#include <optional>
#include <vector>

#include "cpu/selection_view.h"
#include "selection_arguments.h"

namespace entropy_kernels::cpu {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kGrain = 32768;

const int64_t* int64_data(const Tensor& tensor) { return static_cast<const int64_t*>(tensor.const_data_ptr()); }

TokenIndex token_index_of(const std::optional<Tensor>& given, const Tensor& offset) {
  return {data_or_null<int64_t>(given), int64_data(offset)};
}

template <class Step>
void for_each_token(int64_t tokens, const Step& step) {
  torch::stable::parallel_for(0, tokens, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      step(i);
    }
  });
}

Tensor selection_value_keys(const Tensor& covariance, std::optional<Tensor> mask, std::optional<Tensor> exclude) {
  check_masks(covariance, mask, exclude);
  Tensor out = torch::stable::new_empty(covariance, covariance.sizes(), ScalarType::Long);
  for_each_token(covariance.numel(),
                 ValueKeyStep{static_cast<const float*>(covariance.const_data_ptr()), data_or_null<uint8_t>(mask),
                              data_or_null<uint8_t>(exclude), static_cast<int64_t*>(out.mutable_data_ptr())});
  return out;
}

Tensor selection_random_keys(const Tensor& value_keys, const Tensor& band, std::optional<Tensor> token_index,
                             const Tensor& offset, const Tensor& seed) {
  check_keys("value_keys", value_keys, token_index, offset);
  check_pair("band", band, ScalarType::Long, value_keys);
  check_scalar("seed", seed, value_keys);
  Tensor out = torch::stable::new_empty(value_keys, value_keys.sizes(), ScalarType::Long);
  for_each_token(value_keys.numel(),
                 RandomKeyStep{int64_data(value_keys), int64_data(band), token_index_of(token_index, offset),
                               int64_data(seed), static_cast<int64_t*>(out.mutable_data_ptr())});
  return out;
}

// (rows, bins) int64: per row of `state`, how many tokens have each digit.
template <class Digit>
Tensor histogram(const Tensor& state, int64_t tokens, const Digit& digit) {
  const int64_t rows = state.size(0);
  Tensor out = torch::stable::new_zeros(state, {rows, kRadixBins}, ScalarType::Long);
  auto* bins = static_cast<int64_t*>(out.mutable_data_ptr());
  std::mutex lock;
  torch::stable::parallel_for(0, tokens, kGrain, [&](int64_t begin, int64_t end) {
    std::vector<int64_t> mine(static_cast<size_t>(rows * kRadixBins));
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t i = begin; i < end; ++i) {
        const int bin = digit(row, i);
        if (bin >= 0) {
          ++mine[row * kRadixBins + bin];
        }
      }
    }
    const std::lock_guard<std::mutex> guard(lock);
    for (size_t bin = 0; bin < mine.size(); ++bin) {
      bins[bin] += mine[bin];
    }
  });
  return out;
}

Tensor selection_key_histogram(const Tensor& keys, const Tensor& state, int64_t shift, int64_t bits) {
  check_key_digit(keys, state, shift, bits);
  return histogram(state, keys.numel(),
                   KeyDigitStep{int64_data(keys), int64_data(state), static_cast<int>(shift), static_cast<int>(bits)});
}

Tensor selection_index_histogram(const Tensor& keys, std::optional<Tensor> token_index, const Tensor& offset,
                                 const Tensor& key_state, const Tensor& state, int64_t shift, int64_t bits,
                                 int64_t known) {
  check_index_digit(keys, token_index, offset, key_state, state, shift, bits, known);
  return histogram(
      state, keys.numel(),
      IndexDigitStep{int64_data(keys), token_index_of(token_index, offset), int64_data(key_state), int64_data(state),
                     static_cast<int>(shift), static_cast<int>(bits), static_cast<int>(known)});
}

Tensor selection_mask(const Tensor& keys, std::optional<Tensor> token_index, const Tensor& offset,
                      const Tensor& threshold, const Tensor& last_index) {
  check_keys("keys", keys, token_index, offset);
  check_scalar("threshold", threshold, keys);
  check_scalar("last_index", last_index, keys);
  Tensor out = torch::stable::new_empty(keys, keys.sizes(), ScalarType::Bool);
  for_each_token(keys.numel(), MaskStep{int64_data(keys), token_index_of(token_index, offset), int64_data(threshold),
                                        int64_data(last_index), static_cast<uint8_t*>(out.mutable_data_ptr())});
  return out;
}

}  // namespace
}  // namespace entropy_kernels::cpu

STABLE_TORCH_LIBRARY_IMPL(entropy_kernels_native, CompositeExplicitAutograd, m) {
  m.impl("selection_value_keys", TORCH_BOX(&entropy_kernels::cpu::selection_value_keys));
  m.impl("selection_random_keys", TORCH_BOX(&entropy_kernels::cpu::selection_random_keys));
  m.impl("selection_key_histogram", TORCH_BOX(&entropy_kernels::cpu::selection_key_histogram));
  m.impl("selection_index_histogram", TORCH_BOX(&entropy_kernels::cpu::selection_index_histogram));
  m.impl("selection_mask", TORCH_BOX(&entropy_kernels::cpu::selection_mask));
}

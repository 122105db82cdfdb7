// The single steps of selection, for batches spread over ranks: their histograms are added between the rounds.
// Keys are int64 here: 0 .. 2^32 - 1, or -1 for a token that is no candidate.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <mutex>
#include <optional>
#include <vector>

#include "common/philox.h"
#include "common/radix_select.h"
#include "cpu/selection_view.h"

namespace entropy_kernels::cpu {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kGrain = 32768;
constexpr int kStateColumns = 3;  // prefix, need, equal: see entropy_kernels/backends/radix_select.py

const int64_t* int64_data(const Tensor& tensor) { return static_cast<const int64_t*>(tensor.const_data_ptr()); }

// Ordered covariances of the candidates.
Tensor selection_value_keys(const Tensor& covariance, std::optional<Tensor> mask, std::optional<Tensor> exclude) {
  const TokenView view = token_view(covariance, mask, exclude, std::nullopt);
  Tensor out = torch::stable::new_empty(covariance, covariance.sizes(), ScalarType::Long);
  auto* keys = static_cast<int64_t*>(out.mutable_data_ptr());
  torch::stable::parallel_for(0, view.tokens, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const bool candidate =
          (!view.mask || view.mask[i]) && !(view.exclude && view.exclude[i]) && !std::isnan(view.covariance[i]);
      keys[i] = candidate ? static_cast<int64_t>(ordered_key(view.covariance[i])) : -1;
    }
  });
  return out;
}

// Random keys of the candidates whose ordered covariance lies in band = (lowest, highest), both inclusive.
Tensor selection_random_keys(const Tensor& value_keys, const Tensor& band, std::optional<Tensor> token_index,
                             const Tensor& offset, const Tensor& seed) {
  const int64_t* values = int64_data(value_keys);
  const int64_t* index = data_or_null<int64_t>(token_index);
  const int64_t low = int64_data(band)[0], high = int64_data(band)[1], first = *int64_data(offset);
  const auto seed_bits = static_cast<uint64_t>(*int64_data(seed));
  Tensor out = torch::stable::new_empty(value_keys, value_keys.sizes(), ScalarType::Long);
  auto* keys = static_cast<int64_t*>(out.mutable_data_ptr());
  torch::stable::parallel_for(0, value_keys.numel(), kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const bool candidate = values[i] >= 0 && values[i] >= low && values[i] <= high;
      const int64_t token = index ? index[i] : first + i;
      keys[i] = candidate ? static_cast<int64_t>(token_key(static_cast<uint64_t>(token), seed_bits)) : -1;
    }
  });
  return out;
}

// (rows, bins) int64: per row of `state`, the digits of what `matches` lets through.
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
        digit(row, i, mine.data() + row * kRadixBins);
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
  const int64_t *key = int64_data(keys), *prefix = int64_data(state);
  return histogram(state, keys.numel(), [=](int64_t row, int64_t i, int64_t* bins) {
    // -1 >> anything is -1, which is no prefix
    if (key[i] >> (shift + bits) == prefix[row * kStateColumns]) {
      ++bins[radix_digit(static_cast<uint64_t>(key[i]), static_cast<int>(shift), static_cast<int>(bits))];
    }
  });
}

// Of the tokens whose key is key_state's prefix: digits of their token index, reversed so that the lowest is largest.
Tensor selection_index_histogram(const Tensor& keys, std::optional<Tensor> token_index, const Tensor& offset,
                                 const Tensor& key_state, const Tensor& state, int64_t shift, int64_t bits,
                                 int64_t known) {
  const int64_t* key = int64_data(keys);
  const int64_t* index = data_or_null<int64_t>(token_index);
  const int64_t first = *int64_data(offset), wanted = *int64_data(key_state);
  const auto prefix = static_cast<uint64_t>(*int64_data(state));
  const uint64_t known_mask = (1ull << known) - 1;
  const int above = known ? static_cast<int>(shift + bits) : 0;  // a shift by 64 would be undefined
  return histogram(state, keys.numel(), [=](int64_t, int64_t i, int64_t* bins) {
    const uint64_t tie = tie_key(index ? index[i] : first + i);
    if (key[i] == wanted && ((tie >> above) & known_mask) == prefix) {
      ++bins[radix_digit(tie, static_cast<int>(shift), static_cast<int>(bits))];
    }
  });
}

// Tokens whose key is above the threshold, or equal to it with a token index up to last_index.
Tensor selection_mask(const Tensor& keys, std::optional<Tensor> token_index, const Tensor& offset,
                      const Tensor& threshold, const Tensor& last_index) {
  const int64_t* key = int64_data(keys);
  const int64_t* index = data_or_null<int64_t>(token_index);
  const int64_t first = *int64_data(offset), bound = *int64_data(threshold), last = *int64_data(last_index);
  Tensor out = torch::stable::new_empty(keys, keys.sizes(), ScalarType::Bool);
  auto* selected = static_cast<uint8_t*>(out.mutable_data_ptr());
  torch::stable::parallel_for(0, keys.numel(), kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      selected[i] = key[i] > bound || (key[i] == bound && (index ? index[i] : first + i) <= last);
    }
  });
  return out;
}

}  // namespace
}  // namespace entropy_kernels::cpu

STABLE_TORCH_LIBRARY_IMPL(entropy_kernels_native, CPU, m) {
  m.impl("selection_value_keys", TORCH_BOX(&entropy_kernels::cpu::selection_value_keys));
  m.impl("selection_random_keys", TORCH_BOX(&entropy_kernels::cpu::selection_random_keys));
  m.impl("selection_key_histogram", TORCH_BOX(&entropy_kernels::cpu::selection_key_histogram));
  m.impl("selection_index_histogram", TORCH_BOX(&entropy_kernels::cpu::selection_index_histogram));
  m.impl("selection_mask", TORCH_BOX(&entropy_kernels::cpu::selection_mask));
}

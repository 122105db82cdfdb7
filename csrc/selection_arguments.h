// What the CPU and the CUDA half check of the arguments of the selection operators. All tensors are contiguous: kernels
// read bare memory.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <vector>

#include "arguments.h"
#include "common/selection_steps.h"

namespace entropy_kernels {

// The tokens, of any shape, whose device the other arguments have to be on.
inline void check_tokens(const char* name, const torch::stable::Tensor& tokens,
                         std::initializer_list<torch::headeronly::ScalarType> dtypes) {
  check_dtype(name, tokens, dtypes);
  check_memory(name, tokens, tokens);
  check_contiguous(name, tokens);
}

inline void check_tensor(const char* name, const torch::stable::Tensor& tensor, torch::headeronly::ScalarType dtype,
                         const std::vector<std::int64_t>& shape, const torch::stable::Tensor& tokens) {
  check_dtype(name, tensor, {dtype});
  check_memory(name, tensor, tokens);
  check_shape(name, tensor, shape);
  check_contiguous(name, tensor);
}

inline std::vector<std::int64_t> shape_as(const torch::stable::Tensor& tensor) {
  const auto sizes = tensor.sizes();
  return {sizes.begin(), sizes.end()};
}

// One for each of the tokens, or none.
inline void check_per_token(const char* name, const std::optional<torch::stable::Tensor>& tensor,
                            torch::headeronly::ScalarType dtype, const torch::stable::Tensor& tokens) {
  if (tensor.has_value()) check_tensor(name, *tensor, dtype, shape_as(tokens), tokens);
}

inline void check_covariance_arguments(const torch::stable::Tensor& logprob, const torch::stable::Tensor& advantages,
                                       const std::optional<torch::stable::Tensor>& mask) {
  using torch::headeronly::ScalarType;
  check_tokens("logprob", logprob, {ScalarType::Float, ScalarType::Double});
  check_per_token("advantages", advantages, logprob.scalar_type(), logprob);
  check_per_token("mask", mask, ScalarType::Bool, logprob);
}

// Two numbers that a reduction lies before.
inline void check_pair(const char* name, const torch::stable::Tensor& pair, torch::headeronly::ScalarType dtype,
                       const torch::stable::Tensor& tokens) {
  check_tensor(name, pair, dtype, {2}, tokens);
}

inline void check_masks(const char* name, const torch::stable::Tensor& values,
                        const std::optional<torch::stable::Tensor>& mask,
                        const std::optional<torch::stable::Tensor>& exclude) {
  using torch::headeronly::ScalarType;
  check_tokens(name, values, {ScalarType::Float});
  check_per_token("mask", mask, ScalarType::Bool, values);
  check_per_token("exclude", exclude, ScalarType::Bool, values);
}

// Numbers of a selection, where the tokens are or on the CPU.
inline void check_given(const char* name, const torch::stable::Tensor& tensor, torch::headeronly::ScalarType dtype,
                        const std::vector<std::int64_t>& shape, const torch::stable::Tensor& tokens) {
  check_dtype(name, tensor, {dtype});
  check_numbers(name, tensor, tokens);
  check_shape(name, tensor, shape);
  check_contiguous(name, tensor);
}

// `fields`: how many numbers a selection has in memory, if it has them there; else k >= 0, or -1 and the ratio.
inline void check_count(double ratio, std::int64_t k, const std::optional<torch::stable::Tensor>& numbers,
                        std::int64_t fields, const torch::stable::Tensor& covariance) {
  if (numbers.has_value()) {
    check_given("numbers", *numbers, torch::headeronly::ScalarType::Double, {fields}, covariance);
    return;
  }
  STD_TORCH_CHECK(k >= -1, "k: expected >= 0, or -1 for none, got ", k);
  STD_TORCH_CHECK(k >= 0 || (ratio >= 0 && ratio <= 1), "ratio: expected a share in [0, 1] where k is not given, got ",
                  ratio);
}

// ---- the steps, for batches spread over ranks

inline void check_keys(const char* name, const torch::stable::Tensor& keys,
                       const std::optional<torch::stable::Tensor>& token_index, const torch::stable::Tensor& offset) {
  using torch::headeronly::ScalarType;
  check_tokens(name, keys, {ScalarType::Long});
  check_per_token("token_index", token_index, ScalarType::Long, keys);
  check_tensor("offset", offset, ScalarType::Long, {}, keys);
}

inline void check_scalar(const char* name, const torch::stable::Tensor& tensor, const torch::stable::Tensor& keys) {
  check_tensor(name, tensor, torch::headeronly::ScalarType::Long, {}, keys);
}

// (rows, 3); `rows` -1: any number.
inline void check_state(const char* name, const torch::stable::Tensor& state, std::int64_t rows,
                        const torch::stable::Tensor& keys) {
  check_defined(name, state);
  if (rows < 0 && state.dim() == 2) rows = state.size(0);
  check_tensor(name, state, torch::headeronly::ScalarType::Long, {rows, kStateColumns}, keys);
}

// The digit [shift, shift + bits) of a number of `width` bits, with `known` bits above it.
inline void check_digit(std::int64_t shift, std::int64_t bits, std::int64_t known, std::int64_t width) {
  STD_TORCH_CHECK(bits >= 1 && bits <= kRadixBits, "bits: expected 1 to ", kRadixBits, ", got ", bits);
  STD_TORCH_CHECK(shift >= 0 && shift <= width - bits, "shift: expected 0 to ", width - bits, " for ", bits,
                  " bits, got ", shift);
  STD_TORCH_CHECK(known >= 0 && known <= width - bits - shift, "known: expected 0 to ", width - bits - shift,
                  " bits above the digit, got ", known);
}

inline void check_key_digit(const torch::stable::Tensor& keys, const torch::stable::Tensor& state, std::int64_t shift,
                            std::int64_t bits) {
  check_tokens("keys", keys, {torch::headeronly::ScalarType::Long});
  check_state("state", state, -1, keys);
  check_digit(shift, bits, 0, 32);
}

inline void check_index_digit(const torch::stable::Tensor& keys,
                              const std::optional<torch::stable::Tensor>& token_index,
                              const torch::stable::Tensor& offset, const torch::stable::Tensor& key_state,
                              const torch::stable::Tensor& state, std::int64_t shift, std::int64_t bits,
                              std::int64_t known) {
  check_keys("keys", keys, token_index, offset);
  check_state("key_state", key_state, 1, keys);
  check_state("state", state, 1, keys);
  check_digit(shift, bits, known, 64);
}

}  // namespace entropy_kernels

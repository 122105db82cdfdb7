// What the CPU and the CUDA half check of the arguments of token_stats.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <limits>
#include <optional>

#include "arguments.h"
#include "common/element.h"

namespace entropy_kernels {

enum Want : std::int64_t { kLogprob = 1, kEntropy = 2, kCollision = 4, kVocabCovariance = 8 };

// Of logits whose dtype has been checked.
inline Element element_of(const torch::stable::Tensor& logits) {
  using torch::headeronly::ScalarType;
  switch (logits.scalar_type()) {
    case ScalarType::BFloat16:
      return Element::kBFloat16;
    case ScalarType::Half:
      return Element::kFloat16;
    case ScalarType::Double:
      return Element::kFloat64;
    default:
      return Element::kFloat32;
  }
}

// Dtype of statistics, state, temperature and upstream gradients.
inline torch::headeronly::ScalarType result_of(const torch::stable::Tensor& logits) {
  using torch::headeronly::ScalarType;
  return logits.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// A tensor of the result's dtype, where the logits are.
inline void check_result(const char* name, const torch::stable::Tensor& tensor, const torch::stable::Tensor& logits) {
  check_defined(name, tensor);
  STD_TORCH_CHECK(tensor.scalar_type() == result_of(logits), name, ": expected a tensor of dtype ",
                  torch::headeronly::toString(result_of(logits)), " for these logits, got ", dtype_of(tensor));
  check_memory(name, tensor, logits);
}

inline void check_logits(const torch::stable::Tensor& logits) {
  using torch::headeronly::ScalarType;
  check_defined("logits", logits);
  STD_TORCH_CHECK(logits.dim() == 3, "logits: expected shape (B, L, V), got ", shape_of(logits));
  check_dtype("logits", logits, {ScalarType::BFloat16, ScalarType::Half, ScalarType::Float, ScalarType::Double});
  check_memory("logits", logits, logits);
  std::int64_t rows = 0;
  STD_TORCH_CHECK(!__builtin_mul_overflow(logits.size(0), logits.size(1), &rows),
                  "logits: expected fewer than 2^63 rows, got shape ", shape_of(logits));
}

inline void check_arguments(const torch::stable::Tensor& logits, const torch::stable::Tensor& target,
                            const torch::stable::Tensor& temperature, double softcap, std::int64_t vocab_start,
                            std::int64_t vocab_size) {
  using torch::headeronly::ScalarType;
  check_logits(logits);
  const std::int64_t rows = logits.size(0) * logits.size(1);
  check_dtype("target", target, {ScalarType::Int, ScalarType::Long});
  check_memory("target", target, logits);
  STD_TORCH_CHECK(target.is_contiguous() && target.numel() == rows, "target: expected a contiguous tensor of ", rows,
                  " elements for logits of shape ", shape_of(logits), ", got shape ", shape_of(target));
  check_result("temperature", temperature, logits);
  STD_TORCH_CHECK(temperature.is_contiguous() && (temperature.numel() == 1 || temperature.numel() == rows),
                  "temperature: expected a contiguous tensor of 1 or ", rows, " elements, got shape ",
                  shape_of(temperature));
  const bool wide = result_of(logits) == ScalarType::Double;
  const double most = wide ? std::numeric_limits<double>::max() : std::numeric_limits<float>::max();
  STD_TORCH_CHECK(softcap >= 0 && softcap <= most, "softcap: expected a number > 0 and at most ", most,
                  ", or 0 for none, got ", softcap);
  STD_TORCH_CHECK(vocab_start >= 0, "vocab_start: expected >= 0, got ", vocab_start);
  STD_TORCH_CHECK(vocab_size >= 0, "vocab_size: expected >= 0, got ", vocab_size);
}

inline void check_want(std::int64_t want) {
  STD_TORCH_CHECK(want >= 0 && want < 16, "want: expected a bitmask in [0, 16), got ", want);
}

inline void check_upstream(const char* name, const std::optional<torch::stable::Tensor>& grad,
                           const torch::stable::Tensor& logits) {
  if (!grad.has_value()) return;
  check_result(name, *grad, logits);
  check_shape(name, *grad, {logits.size(0) * logits.size(1)});
}

// The output of the backward pass shares no memory with what is read meanwhile, but it may be the logits.
inline void check_apart(const char* name, const std::optional<torch::stable::Tensor>& input,
                        const torch::stable::Tensor& dlogits) {
  STD_TORCH_CHECK(!input.has_value() || !overlap(*input, dlogits),
                  "dlogits: expected memory of its own, or the logits themselves, got some of ", name, "'s");
}

// The backward pass's own: the state, which needs its second moments if a gradient comes from them, upstream gradients,
// and the output.
inline void check_backward(const std::optional<torch::stable::Tensor>& grad_logprob,
                           const std::optional<torch::stable::Tensor>& grad_entropy,
                           const std::optional<torch::stable::Tensor>& grad_collision,
                           const torch::stable::Tensor& logits, const torch::stable::Tensor& target,
                           const torch::stable::Tensor& temperature, const torch::stable::Tensor& state,
                           const torch::stable::Tensor& dlogits) {
  check_upstream("grad_logprob", grad_logprob, logits);
  check_upstream("grad_entropy", grad_entropy, logits);
  check_upstream("grad_collision", grad_collision, logits);
  const bool second_moments = grad_collision.has_value();
  const std::int64_t rows = logits.size(0) * logits.size(1), fields = second_moments ? 6 : 4;
  check_result("state", state, logits);
  STD_TORCH_CHECK(state.dim() == 2 && state.size(0) >= fields && state.size(1) == rows, "state: expected at least ",
                  fields, " rows of ", rows, " elements, got shape ", shape_of(state));
  check_dtype("dlogits", dlogits, {logits.scalar_type()});
  check_memory("dlogits", dlogits, logits);
  check_shape("dlogits", dlogits, {logits.size(0), logits.size(1), logits.size(2)});
  STD_TORCH_CHECK(!overlaps_itself(dlogits),
                  "dlogits: expected elements that do not share memory, got a view that overlaps itself, of shape ",
                  shape_of(dlogits));
  bool in_place = dlogits.const_data_ptr() == logits.const_data_ptr();
  for (std::int64_t i = 0; in_place && i < 3; ++i) {
    in_place = logits.size(i) <= 1 || logits.stride(i) == dlogits.stride(i);
  }
  if (!in_place) check_apart("logits", logits, dlogits);
  check_apart("grad_logprob", grad_logprob, dlogits);
  check_apart("grad_entropy", grad_entropy, dlogits);
  check_apart("grad_collision", grad_collision, dlogits);
  check_apart("target", target, dlogits);
  check_apart("temperature", temperature, dlogits);
  check_apart("state", state, dlogits);
}

}  // namespace entropy_kernels

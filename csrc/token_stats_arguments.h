// What the CPU and the CUDA half check of the arguments of token_stats.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <bit>
#include <cstdint>
#include <limits>

#include "arguments.h"
#include "common/element.h"
#include "common/row_options.h"
#include "common/row_tensors.h"

namespace entropy_kernels {

// Rows of a tensor of the statistics in `want`, and of the state that those in `bits` need.
inline std::int64_t statistics_in(std::int64_t want) { return std::popcount(static_cast<std::uint64_t>(want)); }
inline std::int64_t state_rows(std::int64_t bits) { return bits & kSecondOrder ? kSecondOrderFields : kFirstOrderFields; }

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

// A tensor of the result's dtype.
inline void check_result_dtype(const char* name, const torch::stable::Tensor& tensor,
                               const torch::stable::Tensor& logits) {
  check_defined(name, tensor);
  STD_TORCH_CHECK(tensor.scalar_type() == result_of(logits), name, ": expected a tensor of dtype ",
                  torch::headeronly::toString(result_of(logits)), " for these logits, got ", dtype_of(tensor));
}

// The same, where the logits are.
inline void check_result(const char* name, const torch::stable::Tensor& tensor, const torch::stable::Tensor& logits) {
  check_result_dtype(name, tensor, logits);
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
                            const torch::stable::Tensor& temperature, const RowOptions& options, std::int64_t want) {
  using torch::headeronly::ScalarType;
  check_logits(logits);
  const std::int64_t rows = logits.size(0) * logits.size(1);
  check_dtype("target", target, {ScalarType::Int, ScalarType::Long});
  check_memory("target", target, logits);
  STD_TORCH_CHECK(target.is_contiguous() && target.numel() == rows, "target: expected a contiguous tensor of ", rows,
                  " elements for logits of shape ", shape_of(logits), ", got shape ", shape_of(target));
  check_result_dtype("temperature", temperature, logits);
  temperature.dim() == 0 ? check_numbers("temperature", temperature, logits)
                         : check_memory("temperature", temperature, logits);
  STD_TORCH_CHECK(temperature.is_contiguous() && (temperature.numel() == 1 || temperature.numel() == rows),
                  "temperature: expected a contiguous tensor of 1 or ", rows, " elements, got shape ",
                  shape_of(temperature));
  const bool wide = result_of(logits) == ScalarType::Double;
  const double most = wide ? std::numeric_limits<double>::max() : std::numeric_limits<float>::max();
  STD_TORCH_CHECK(options.softcap >= 0 && options.softcap <= most, "softcap: expected a number > 0 and at most ", most,
                  ", or 0 for none, got ", options.softcap);
  STD_TORCH_CHECK(options.vocab_start >= 0, "vocab_start: expected >= 0, got ", options.vocab_start);
  STD_TORCH_CHECK(options.vocab_size >= 0, "vocab_size: expected >= 0, got ", options.vocab_size);
  STD_TORCH_CHECK(want >= 0 && want < 1 << kStatistics, "want: expected a bitmask in [0, ", 1 << kStatistics,
                  "), got ", want);
}

// The output of the backward pass shares no memory with what is read meanwhile, but it may be the logits.
inline void check_apart(const char* name, const torch::stable::Tensor& input, const torch::stable::Tensor& dlogits) {
  STD_TORCH_CHECK(!overlap(input, dlogits),
                  "dlogits: expected memory of its own, or the logits themselves, got some of ", name, "'s");
}

// The backward pass's own: upstream gradients, the state, which needs its second moments if one of them comes from there,
// and the output.
inline void check_backward(const torch::stable::Tensor& grad_stats, const torch::stable::Tensor& logits,
                           const torch::stable::Tensor& target, const torch::stable::Tensor& temperature,
                           const torch::stable::Tensor& state, std::int64_t want,
                           const torch::stable::Tensor& dlogits) {
  const std::int64_t rows = logits.size(0) * logits.size(1), fields = state_rows(want & kDifferentiable);
  check_result("grad_stats", grad_stats, logits);
  check_shape("grad_stats", grad_stats, {statistics_in(want), rows});
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
  check_apart("grad_stats", grad_stats, dlogits);
  check_apart("target", target, dlogits);
  check_apart("temperature", temperature, dlogits);
  check_apart("state", state, dlogits);
}

// ---- checked tensors as the threads see them

inline Labels labels_of(const torch::stable::Tensor& target) {
  return {target.const_data_ptr(), target.scalar_type() == torch::headeronly::ScalarType::Long};
}

template <typename T>
RowOutputs<T> outputs_of(const torch::stable::Tensor& stats, const torch::stable::Tensor& state, std::int64_t want) {
  return {static_cast<T*>(stats.mutable_data_ptr()), static_cast<T*>(state.mutable_data_ptr()), state.size(1), want};
}

template <typename T>
StateInput<T> state_of(const torch::stable::Tensor& state) {
  return {static_cast<const T*>(state.const_data_ptr()), state.stride(0), state.stride(1)};
}

template <typename T>
Upstream<T> upstream_of(const torch::stable::Tensor& grad_stats, std::int64_t want) {
  return {static_cast<const T*>(grad_stats.const_data_ptr()), grad_stats.stride(0), grad_stats.stride(1), want};
}

}  // namespace entropy_kernels

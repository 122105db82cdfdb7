// What the CPU and the CUDA half check of the arguments of token_stats: errors name the argument, what was expected, and
// what came.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <string>

#include "common/element.h"

namespace entropy_kernels {

enum Want : std::int64_t { kLogprob = 1, kEntropy = 2, kCollision = 4, kVocabCovariance = 8 };

inline std::string shape_of(const torch::stable::Tensor& tensor) {
  std::string text = "(";
  for (std::int64_t i = 0; i < tensor.dim(); ++i) text += (i ? ", " : "") + std::to_string(tensor.size(i));
  return text + ")";
}

inline const char* dtype_of(const torch::stable::Tensor& tensor) {
  return torch::headeronly::toString(tensor.scalar_type());
}

inline const char* device_of(const torch::stable::Tensor& tensor) { return tensor.is_cuda() ? "CUDA" : "CPU"; }

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

inline bool same_device(const torch::stable::Tensor& a, const torch::stable::Tensor& b) {
  return a.is_cuda() == b.is_cuda() && a.get_device() == b.get_device();
}

// A tensor of the result's dtype, where the logits are.
inline void check_result(const char* name, const torch::stable::Tensor& tensor, const torch::stable::Tensor& logits) {
  STD_TORCH_CHECK(tensor.scalar_type() == result_of(logits) && same_device(tensor, logits), name, ": expected a ",
                  device_of(logits), " tensor of dtype ", torch::headeronly::toString(result_of(logits)),
                  " for these logits, got ", dtype_of(tensor));
}

inline void check_logits(const torch::stable::Tensor& logits) {
  using torch::headeronly::ScalarType;
  const ScalarType dtype = logits.scalar_type();
  STD_TORCH_CHECK(logits.dim() == 3, "logits: expected shape (B, L, V), got ", shape_of(logits));
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half ||
                      dtype == ScalarType::Double,
                  "logits: expected dtype BFloat16, Half, Float or Double, got ", dtype_of(logits));
}

inline void check_arguments(const torch::stable::Tensor& logits, const torch::stable::Tensor& target,
                            const torch::stable::Tensor& temperature, double softcap) {
  using torch::headeronly::ScalarType;
  check_logits(logits);
  const std::int64_t rows = logits.size(0) * logits.size(1);
  STD_TORCH_CHECK(target.scalar_type() == ScalarType::Long || target.scalar_type() == ScalarType::Int,
                  "target: expected dtype Int or Long, got ", dtype_of(target));
  STD_TORCH_CHECK(same_device(target, logits) && target.is_contiguous() && target.numel() == rows,
                  "target: expected a contiguous ", device_of(logits), " tensor of ", rows,
                  " elements for logits of shape ", shape_of(logits), ", got shape ", shape_of(target));
  check_result("temperature", temperature, logits);
  STD_TORCH_CHECK(temperature.is_contiguous() && (temperature.numel() == 1 || temperature.numel() == rows),
                  "temperature: expected a contiguous tensor of 1 or ", rows, " elements, got shape ",
                  shape_of(temperature));
  STD_TORCH_CHECK(softcap >= 0, "softcap: expected a number > 0, or 0 for none, got ", softcap);
}

inline void check_want(std::int64_t want) {
  STD_TORCH_CHECK(want >= 0 && want < 16, "want: expected a bitmask in [0, 16), got ", want);
}

inline void check_upstream(const char* name, const std::optional<torch::stable::Tensor>& grad,
                           const torch::stable::Tensor& logits) {
  if (!grad.has_value()) return;
  const std::int64_t rows = logits.size(0) * logits.size(1);
  check_result(name, *grad, logits);
  STD_TORCH_CHECK(grad->dim() == 1 && grad->size(0) == rows, name, ": expected shape (", rows, ",), got ",
                  shape_of(*grad));
}

// The backward pass's own: the state, which needs its second moments if a gradient comes from them, and the output.
inline void check_backward(const torch::stable::Tensor& logits, const torch::stable::Tensor& state, bool second_moments,
                           const torch::stable::Tensor& dlogits) {
  const std::int64_t rows = logits.size(0) * logits.size(1), fields = second_moments ? 6 : 4;
  check_result("state", state, logits);
  STD_TORCH_CHECK(state.dim() == 2 && state.size(0) >= fields && state.size(1) == rows, "state: expected at least ",
                  fields, " rows of ", rows, " elements, got shape ", shape_of(state));
  STD_TORCH_CHECK(dlogits.dim() == 3 && shape_of(dlogits) == shape_of(logits), "dlogits: expected shape ",
                  shape_of(logits), ", got ", shape_of(dlogits));
  STD_TORCH_CHECK(dlogits.scalar_type() == logits.scalar_type() && same_device(dlogits, logits),
                  "dlogits: expected a ", device_of(logits), " tensor of dtype ", dtype_of(logits), ", got ",
                  dtype_of(dlogits));
}

}  // namespace entropy_kernels

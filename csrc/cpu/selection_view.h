// From tensors, as entropy_kernels/ops/selection.py prepares them (flat, contiguous), to what the scan reads.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "common/radix_select.h"
#include "cpu/selection_scan.h"

namespace entropy_kernels::cpu {

template <class T>
const T* data_or_null(const std::optional<torch::stable::Tensor>& tensor) {
  return tensor ? static_cast<const T*>(tensor->const_data_ptr()) : nullptr;
}

inline TokenView token_view(const torch::stable::Tensor& covariance, const std::optional<torch::stable::Tensor>& mask,
                            const std::optional<torch::stable::Tensor>& exclude,
                            const std::optional<torch::stable::Tensor>& token_index) {
  return {static_cast<const float*>(covariance.const_data_ptr()), data_or_null<uint8_t>(mask),
          data_or_null<uint8_t>(exclude), data_or_null<int64_t>(token_index), covariance.numel(), &scan_kernels()};
}

// Ordered keys of the bounds -> values that both belong to the band. The key next to an infinity's is a NaN: nothing
// lies above +inf or below -inf. The key below +0's would be that of -0, which equals it: one further down.
inline Band inclusive_band(uint32_t low, uint32_t high, bool closed) {
  if (closed) {
    return {key_value(low), key_value(high)};
  }
  constexpr uint32_t kZero = 0x80000000u;
  return {key_value(low + 1), key_value(high == kZero ? kZero - 2 : high - 1)};
}

}  // namespace entropy_kernels::cpu

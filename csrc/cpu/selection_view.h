// From tensors that selection_arguments.h has checked to what the scan reads.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "common/radix_select.h"
#include "common/selection.h"
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

// The band as values. The key next to an infinity's is a NaN: nothing lies above +inf or below -inf. The key below +0's
// would be that of -0, which equals it: one further down.
inline Band value_band(KeyBand keys) {
  constexpr uint32_t kMinusZero = 0x7fffffffu;
  return {key_value(keys.low), key_value(keys.high == kMinusZero ? kMinusZero - 1 : keys.high)};
}

}  // namespace entropy_kernels::cpu

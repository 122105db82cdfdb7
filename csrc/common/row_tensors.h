// The tensors of one value or a few per row as the threads see them: plain numbers. Host + device.
#pragma once

#include <cstdint>

#include "host_device.h"
#include "softmax_state.h"

namespace entropy_kernels {

// (N,), int32 or int64.
struct Labels {
  const void* data;
  bool wide;

  EK_HOST_DEVICE std::int64_t operator[](std::int64_t row) const {
    return wide ? static_cast<const std::int64_t*>(data)[row] : static_cast<const std::int32_t*>(data)[row];
  }
};

// What the forward pass writes of a row.
template <typename T>
struct RowOutputs {
  T* stats;  // (S, N): the statistics in `want`, in the order of their bits
  T* state;  // (K, N)
  std::int64_t rows;
  std::int64_t want;

  EK_HOST_DEVICE bool second_order() const { return (want & kSecondOrder) != 0; }

  template <typename From>
  EK_HOST_DEVICE void write(std::int64_t row, const SoftmaxState<From>& of, const TokenStats<From>& values,
                            bool second_order) const {
    const From fields[kSecondOrderFields] = {of.m, of.s, of.w, of.x_y, of.s2, of.w2};
#pragma unroll
    for (int k = 0; k < kSecondOrderFields; ++k) {
      if (k < kFirstOrderFields || second_order) state[k * rows + row] = static_cast<T>(fields[k]);
    }
    std::int64_t to = row;
#pragma unroll
    for (int i = 0; i < kStatistics; ++i) {
      if (!(want >> i & 1)) continue;
      stats[to] = static_cast<T>(values[i]);
      to += rows;
    }
  }
};

// The state (K, N) that the backward pass reads, of any strides.
template <typename T>
struct StateInput {
  const T* data;
  std::int64_t field_stride, row_stride;

  // As far as gradients need it: without w2.
  template <typename To>
  EK_HOST_DEVICE SoftmaxState<To> at(std::int64_t row, bool second_order) const {
    const auto field = [&](int k) { return static_cast<To>(data[k * field_stride + row * row_stride]); };
    return {field(0), field(1), field(2), field(3), second_order ? field(4) : 0, 0};
  }
};

// Upstream gradients (S, N) of the statistics in `want`, of any strides.
template <typename T>
struct Upstream {
  const T* data;
  std::int64_t statistic_stride, row_stride;
  std::int64_t want;

  // 0 for what is not wanted and for what has no gradient, which is not read.
  template <typename To>
  EK_HOST_DEVICE TokenStats<To> at(std::int64_t row) const {
    TokenStats<To> grads = {};
    std::int64_t from = row * row_stride;
#pragma unroll
    for (int i = 0; i < kStatistics; ++i) {
      if (!(want >> i & 1)) continue;
      if (kDifferentiable >> i & 1) grads[i] = static_cast<To>(data[from]);
      from += statistic_stride;
    }
    return grads;
  }
  EK_HOST_DEVICE bool second_order() const { return (want & kDifferentiable & kSecondOrder) != 0; }
};

}  // namespace entropy_kernels

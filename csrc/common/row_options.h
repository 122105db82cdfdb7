// How the kernels read a row, from the operators' boundary to the device: RowOptions of entropy_kernels/_rows.py, in its
// order. Host + device.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace entropy_kernels {

struct RowOptions {
  double softcap;  // 0: none
  std::int64_t ignore_index;
  std::int64_t vocab_start;  // global id of the row's first column
  std::int64_t vocab_size;   // ids at or beyond it count as -inf

  // Columns that are read, of `width`: those with a global id below vocab_size.
  EK_HOST_DEVICE std::int64_t columns(std::int64_t width) const {
    const std::int64_t left = vocab_size - vocab_start;
    return left < 0 ? 0 : left < width ? left : width;
  }
  // The label's column among so many, or -1 if it lies elsewhere.
  EK_HOST_DEVICE std::int64_t label_column(std::int64_t label, std::int64_t columns) const {
    // compared first: far labels must not overflow the difference
    return label != ignore_index && label >= vocab_start && label - vocab_start < columns ? label - vocab_start : -1;
  }
  EK_HOST_DEVICE bool is_valid(std::int64_t label) const { return label >= 0 && label < vocab_size; }
};

}  // namespace entropy_kernels

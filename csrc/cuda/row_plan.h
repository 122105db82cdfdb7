// How the forward pass of token_stats cuts rows, free of CUDA.
#pragma once

#include <cstdint>

#include "switches.h"

namespace entropy_kernels::cuda {

// Parts of each row: up to `most`, as many as make `enough` blocks and leave each part `least` of the row's bytes.
inline int forward_parts(std::int64_t rows, std::int64_t bytes, std::int64_t enough, int most, std::int64_t least) {
  if (row_invariant.get() != 0) return 1;
  int parts = 1;
  while (rows * parts < enough && 2 * parts <= most && 2 * parts * least <= bytes) parts *= 2;
  return parts;
}

// Whether the 16-byte vectors of a row are read as such, and only what lies beside them by elements; strides in elements.
// Where rows are misaligned, which elements those are depends on the row's address: a row that is to have the same bits
// everywhere is read by elements then, as rows with a column stride are.
inline bool reads_vectors(std::intptr_t address, std::int64_t batch_stride, std::int64_t length_stride,
                          std::int64_t column_stride, int element_size) {
  const bool aligned =
      address % 16 == 0 && batch_stride * element_size % 16 == 0 && length_stride * element_size % 16 == 0;
  return column_stride == 1 && (aligned || row_invariant.get() == 0);
}

}  // namespace entropy_kernels::cuda

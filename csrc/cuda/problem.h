// The arguments of the token_stats kernels, and how threads divide a row. Host + device.
#pragma once

#include <cstdint>

#include "arithmetic.h"

namespace entropy_kernels::cuda {

constexpr int kWarp = 32;
constexpr int kMaxThreads = 256;
constexpr int kMaxWarps = kMaxThreads / kWarp;
constexpr int kVectors = 4;                                   // 16-byte loads that a thread has in flight per tile
constexpr int kTileBytes = kMaxThreads * kVectors * 16;       // what a full block reads at a time
constexpr int kSingles = 8;                                   // the same for loads of one element
constexpr int kMaxParts = kWarp;                              // one warp merges the parts of a row

// Rows of a (B, L, V) tensor, by strides in elements. 64 bits before a stride is multiplied: rows * V may exceed 2^31.
struct Rows {
  void* data;
  std::int64_t batch_stride, length_stride, column_stride;

  template <class Storage>
  EK_HOST_DEVICE Storage* at(int row, int length) const {
    const std::int64_t b = row < length ? 0 : row / length, l = row - b * length;  // a division takes its time
    return static_cast<Storage*>(data) + (b * batch_stride + l * length_stride);
  }
};

// What forward and backward share. T is the dtype of statistics, state, temperature and upstream gradients.
template <typename T>
struct Problem {
  Rows logits;
  int rows, length;
  int vocab;
  int columns;  // those with a global id below vocab_size; the rest count as -inf and are not read
  const void* target;
  bool wide_target;
  const T* temperature;
  int temperature_stride;  // 0: one for all rows
  T softcap;               // 0: none
  std::int64_t ignore_index, vocab_start, vocab_size;

  EK_HOST_DEVICE std::int64_t label(int row) const {
    return wide_target ? static_cast<const std::int64_t*>(target)[row] : static_cast<const std::int32_t*>(target)[row];
  }
  // The label's column here, or -1 if it lies elsewhere.
  EK_HOST_DEVICE int label_column(std::int64_t label) const {
    // compared first: far labels must not overflow the difference
    const bool here = label != ignore_index && label >= vocab_start && label - vocab_start < columns;
    return here ? static_cast<int>(label - vocab_start) : -1;
  }
  EK_HOST_DEVICE T temperature_of(int row) const {
    return temperature[static_cast<std::int64_t>(row) * temperature_stride];
  }
};

template <typename T>
struct ForwardArguments {
  Problem<T> problem;
  T *logprob, *entropy, *collision, *vocab_covariance;  // (N,), null where not wanted
  T* state;                                             // (K, N)
  int parts;
  bool vectors;                  // reads_vectors (row_plan.h)
  SoftmaxState<T>* part_states;  // (N, parts); null where parts are merged through shared memory
  unsigned* counters;            // (N,), 0
};

// An upstream gradient (N,) of any stride, or nothing, which reads as 0.
template <typename T>
struct Upstream {
  const T* data;
  std::int64_t stride;

  EK_HOST_DEVICE T at(int row) const { return data == nullptr ? T(0) : data[row * stride]; }
};

template <typename T>
struct BackwardArguments {
  Problem<T> problem;
  Upstream<T> grad_logprob, grad_entropy, grad_collision;
  const T* state;
  std::int64_t field_stride, row_stride;  // of the state
  Rows dlogits;                           // may be the logits
  int parts;
  bool vectors;   // every row of logits and dlogits is contiguous, both equally misaligned
  bool reversed;  // the first blocks have the last row
};

// A row cut into whole 16-byte vectors and, before and behind them, single elements. Strided rows have only singles.
template <class E>
struct RowCut {
  int head, vectors, singles;

  EK_HOST_DEVICE RowCut(const typename E::Storage* row, int columns, bool contiguous) {
    const auto misaligned = static_cast<int>(reinterpret_cast<std::uintptr_t>(row) & 15) / int(sizeof(*row));
    const int until_aligned = (E::kPerVector - misaligned) % E::kPerVector;
    head = contiguous && until_aligned < columns ? until_aligned : columns;
    vectors = (columns - head) / E::kPerVector;
    singles = columns - vectors * E::kPerVector;
  }
  EK_HOST_DEVICE int column(int single) const { return single < head ? single : single + vectors * E::kPerVector; }
  // Column of the first element of a vector.
  EK_HOST_DEVICE int vector_column(int vector) const { return head + vector * E::kPerVector; }
};

// A contiguous share of `count` things for one of `parts` blocks.
struct Share {
  int begin, end;

  EK_HOST_DEVICE Share(int count, int part, int parts) {
    const int each = (count + parts - 1) / parts;
    begin = part * each < count ? part * each : count;
    end = begin + each < count ? begin + each : count;
  }
};

}  // namespace entropy_kernels::cuda

// The arguments of the token_stats kernels, and how threads divide a row. Host + device.
#pragma once

#include <cstdint>

#include "../common/row_options.h"
#include "../common/row_tensors.h"
#include "arithmetic.h"

namespace entropy_kernels::cuda {

constexpr int kWarp = 32;
constexpr int kMaxThreads = 256;
constexpr int kMaxWarps = kMaxThreads / kWarp;
constexpr int kVectors = 4;                                   // 16-byte loads that a thread has in flight per tile
constexpr int kTileBytes = kMaxThreads * kVectors * 16;       // what a full block reads at a time
constexpr int kBulkThreads = 128;                             // of a block that reads by bulk copies
constexpr int kBackwardThreads = 64;                          // at most
constexpr int kLineVectors = 128 / 16;                        // of a cache line
constexpr int kTailElements = 8;                              // the same for loads of one element
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
  int columns;  // those that are read
  Labels labels;
  const T* temperature;    // null: a number, the same for all rows
  int temperature_stride;  // 0: one for all rows
  T temperature_number;
  RowOptions options;

  EK_HOST_DEVICE T softcap() const { return static_cast<T>(options.softcap); }
  EK_HOST_DEVICE T temperature_of(int row) const {
    return temperature == nullptr ? temperature_number : temperature[static_cast<std::int64_t>(row) * temperature_stride];
  }
  // The label's column here, or -1 if it lies elsewhere.
  EK_HOST_DEVICE int label_column(std::int64_t label) const {
    return static_cast<int>(options.label_column(label, columns));
  }
};

template <typename T>
struct ForwardArguments {
  Problem<T> problem;
  RowOutputs<T> outputs;
  int parts;
  bool vectors;                  // reads_vectors (row_plan.h)
  SoftmaxState<T>* part_states;  // (N, parts); null where parts are merged through shared memory
  unsigned* counters;            // (N,), 0
};

template <typename T>
struct BackwardArguments {
  Problem<T> problem;
  Upstream<T> upstream;
  StateInput<T> state;
  Rows dlogits;   // may be the logits
  int parts;
  bool vectors;   // every row of logits and dlogits is contiguous, both equally misaligned
  bool reversed;  // the first blocks have the last row
};

// A row cut into whole 16-byte vectors and tail elements, before and behind them. Strided rows have only these.
template <class E>
struct RowCut {
  int head, vectors, tail_elements;

  EK_HOST_DEVICE RowCut(const typename E::Storage* row, int columns, bool contiguous) {
    const auto misaligned = static_cast<int>(reinterpret_cast<std::uintptr_t>(row) & 15) / int(sizeof(*row));
    const int until_aligned = (E::kPerVector - misaligned) % E::kPerVector;
    head = contiguous && until_aligned < columns ? until_aligned : columns;
    vectors = (columns - head) / E::kPerVector;
    tail_elements = columns - vectors * E::kPerVector;
  }
  // Column of a tail element.
  EK_HOST_DEVICE int column(int element) const { return element < head ? element : element + vectors * E::kPerVector; }
  // Column of the first element of a vector.
  EK_HOST_DEVICE int vector_column(int vector) const { return head + vector * E::kPerVector; }
};

// A contiguous share of `count` vectors for one of `parts` blocks: a multiple of `unit`, so that where rows begin on whole
// cache lines shares do too. Half a sector written is a sector read.
struct Share {
  int begin, end;

  EK_HOST_DEVICE Share(int count, int part, int parts, int unit = kLineVectors) {
    const int each = ((count + parts - 1) / parts + unit - 1) / unit * unit;
    begin = part * each < count ? part * each : count;
    end = begin + each < count ? begin + each : count;
  }
};

}  // namespace entropy_kernels::cuda

// The inner loops of selection over a chunk of tokens: which are candidates, their random keys, which keys are large.
// AVX-512, AVX2 or portable, chosen at run time; all give the same integers.
#pragma once

#include <cstdint>

#include "common/selection.h"

namespace entropy_kernels::cpu {

// A chunk is what one scan call sees; its positions fit in 32 bits and its buffers in the first-level cache.
constexpr int64_t kChunk = 2048;
// Vector loops store whole vectors: buffers of positions and keys are this much longer than a chunk.
constexpr int64_t kChunkSlack = 32;

// Both ends belong to the range; NaN never does, nor does anything if low > high.
struct Range {
  float low;
  float high;
};

struct ChunkCount {
  int64_t valid;       // tokens that count
  int64_t candidates;  // positions written
};

// Of which tokens that count scores are summed.
enum class Summed { kNone, kFinite, kCandidates };  // those are finite, above 0 and not excluded

struct ScoreTotals {
  int64_t valid;    // tokens that count
  int32_t largest;  // bits of the largest finite magnitude among them
  int64_t sum;      // of the scores times the scale, rounded (fixed_point.h); modulo 2^64
};
constexpr int32_t kInfinityBits = 0x7f800000;

struct KeyCount {
  int64_t above;
  int64_t equal;
};

struct ScanKernels {
  // Positions (relative to begin, ascending) of the tokens of [begin, end) that count, are not excluded and lie in
  // the range; end - begin <= kChunk.
  ChunkCount (*candidates)(const TokenView& view, int64_t begin, int64_t end, Range range, uint32_t* positions);
  // Random keys of `count` such positions.
  void (*random_keys)(const TokenView& view, int64_t begin, const uint32_t* positions, int64_t count, uint64_t seed,
                      uint32_t* keys);
  // Moves the keys above the threshold, and their positions, to the front.
  KeyCount (*compress_above)(uint32_t threshold, uint32_t* keys, uint32_t* positions, int64_t count);
  // Of the tokens of [begin, end).
  ScoreTotals (*totals)(const TokenView& view, int64_t begin, int64_t end, Summed summed, double scale);
};

// For the instruction set of capability.h; throws where that does.
const ScanKernels& scan_kernels();

namespace avx512 {
const ScanKernels& kernels();
}

}  // namespace entropy_kernels::cpu

// Clip-Cov and KL-Cov masks over one process's batch. Both are "the n largest of 32-bit keys among the candidates":
// random keys for Clip-Cov, covariances in their order for KL-Cov. A threshold that is very likely just below the
// n-th largest key is guessed from a sample; one pass over the tokens counts them and keeps the few keys above it, and
// the exact selection is made among those. A wrong guess costs a second pass, never the result.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <mutex>
#include <optional>
#include <utility>
#include <vector>

#include "common/radix_select.h"
#include "common/selection.h"
#include "cpu/selection_scan.h"
#include "cpu/selection_view.h"
#include "selection_arguments.h"

namespace entropy_kernels::cpu {
namespace {

using torch::stable::Tensor;

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr Band kAllValues{-kInfinity, kInfinity};  // everything but NaN
constexpr int64_t kChunksPerTask = 16;
constexpr int64_t kSampleSize = 4096;

// Keys of KL-Cov and of quantiles: the covariance itself.
struct ValueKeys {
  static constexpr uint32_t kLowest = 0x007fffffu;  // ordered_key(-inf)

  Band above(Band, uint32_t threshold) const { return {key_value(threshold), kInfinity}; }
  void operator()(const TokenView& view, int64_t begin, const uint32_t* positions, int64_t count,
                  uint32_t* keys) const {
    for (int64_t i = 0; i < count; ++i) {
      keys[i] = ordered_key(view.covariance[begin + positions[i]]);
    }
  }
};

// Keys of Clip-Cov.
struct RandomKeys {
  static constexpr uint32_t kLowest = 0;
  uint64_t seed;

  Band above(Band band, uint32_t) const { return band; }
  void operator()(const TokenView& view, int64_t begin, const uint32_t* positions, int64_t count,
                  uint32_t* keys) const {
    view.scan->random_keys(view, begin, positions, count, seed, keys);
  }
};

// What one pass leaves of the candidates: those above the threshold, and where those equal to it are.
struct Collected {
  std::vector<uint32_t> keys;
  std::vector<int64_t> positions;
  std::vector<int64_t> equal_chunks;  // first token of each chunk that has any
  int64_t equal = 0;
  int64_t valid = 0;

  int64_t above() const { return static_cast<int64_t>(keys.size()); }

  void merge(Collected&& other) {
    keys.insert(keys.end(), other.keys.begin(), other.keys.end());
    positions.insert(positions.end(), other.positions.begin(), other.positions.end());
    equal_chunks.insert(equal_chunks.end(), other.equal_chunks.begin(), other.equal_chunks.end());
    equal += other.equal;
    valid += other.valid;
  }
};

// Positions and keys of one chunk's candidates.
struct Chunk {
  uint32_t positions[kChunk + kChunkSlack];
  uint32_t keys[kChunk + kChunkSlack];

  template <class Keys>
  ChunkCount fill(const TokenView& view, Band band, const Keys& key_source, int64_t begin) {
    const int64_t end = std::min(begin + kChunk, view.tokens);
    const ChunkCount count = view.scan->candidates(view, begin, end, band, positions);
    key_source(view, begin, positions, count.candidates, keys);
    return count;
  }
};

// Runs body(begin of chunk, private Collected) for all chunks on torch's threads and merges what they collected.
template <class Body>
Collected over_chunks(int64_t tokens, const Body& body) {
  Collected all;
  std::mutex lock;
  torch::stable::parallel_for(0, (tokens + kChunk - 1) / kChunk, kChunksPerTask, [&](int64_t first, int64_t last) {
    Collected mine;
    for (int64_t chunk = first; chunk < last; ++chunk) {
      body(chunk * kChunk, mine);
    }
    const std::lock_guard<std::mutex> guard(lock);
    all.merge(std::move(mine));
  });
  return all;
}

// One pass. `selected`, unless null, is zeroed on the way, so that its bytes are written once.
template <class Keys>
Collected collect(const TokenView& view, Band band, const Keys& key_source, uint32_t threshold, uint8_t* selected) {
  band = key_source.above(band, threshold);
  return over_chunks(view.tokens, [&](int64_t begin, Collected& mine) {
    Chunk chunk;
    const ChunkCount count = chunk.fill(view, band, key_source, begin);
    mine.valid += count.valid;
    const KeyCount found = view.scan->compress_above(threshold, chunk.keys, chunk.positions, count.candidates);
    mine.keys.insert(mine.keys.end(), chunk.keys, chunk.keys + found.above);
    for (int64_t i = 0; i < found.above; ++i) {
      mine.positions.push_back(begin + chunk.positions[i]);
    }
    if (found.equal) {
      mine.equal += found.equal;
      mine.equal_chunks.push_back(begin);
    }
    if (selected) {
      std::memset(selected + begin, 0, static_cast<size_t>(std::min(kChunk, view.tokens - begin)));
    }
  });
}

// Of the tokens added, the `count` with the lowest index; holds at most twice as many.
class LowestIndices {
 public:
  LowestIndices(const TokenView& view, int64_t count) : index_(view.index), count_(count) {}

  // No token from this position on can still be among them: by default, order of position is order of index.
  bool complete_before(int64_t position) const { return !index_ && position > bound_.first; }

  void add(int64_t position) {
    const Entry entry{index_ ? index_[position] : position, position};
    if (entry < bound_) {
      entries_.push_back(entry);
      if (static_cast<int64_t>(entries_.size()) >= 2 * count_ + kChunkSlack) {
        shrink();
      }
    }
  }

  void merge(const LowestIndices& other) {
    for (const Entry& entry : other.entries_) {
      add(entry.second);
    }
  }

  void mark(uint8_t* selected) {
    shrink();
    for (const Entry& entry : entries_) {
      selected[entry.second] = 1;
    }
  }

 private:
  using Entry = std::pair<int64_t, int64_t>;  // index, position

  void shrink() {
    if (static_cast<int64_t>(entries_.size()) >= count_) {
      std::nth_element(entries_.begin(), entries_.begin() + (count_ - 1), entries_.end());
      entries_.resize(count_);
      bound_ = entries_.back();
    }
  }

  const int64_t* index_;
  int64_t count_;
  std::vector<Entry> entries_;
  Entry bound_{std::numeric_limits<int64_t>::max(), std::numeric_limits<int64_t>::max()};
};

// Marks, of the candidates whose key is the threshold, the `count` with the lowest token index.
template <class Keys>
void mark_equal(const TokenView& view, Band band, const Keys& key_source, uint32_t threshold, Collected& collected,
                int64_t count, uint8_t* selected) {
  band = key_source.above(band, threshold);
  std::vector<int64_t>& chunks = collected.equal_chunks;
  std::sort(chunks.begin(), chunks.end());
  LowestIndices all(view, count);
  std::mutex lock;
  torch::stable::parallel_for(
      0, static_cast<int64_t>(chunks.size()), kChunksPerTask, [&](int64_t first, int64_t last) {
        LowestIndices mine(view, count);
        Chunk chunk;
        for (int64_t c = first; c < last && !mine.complete_before(chunks[c]); ++c) {
          const ChunkCount found = chunk.fill(view, band, key_source, chunks[c]);
          for (int64_t i = 0; i < found.candidates; ++i) {
            if (chunk.keys[i] == threshold) {
              mine.add(chunks[c] + chunk.positions[i]);
            }
          }
        }
        const std::lock_guard<std::mutex> guard(lock);
        all.merge(mine);
      });
  all.mark(selected);
}

// Writes the whole mask: the requested number of candidates with the largest keys.
template <class Keys>
void select(const TokenView& view, Band band, const Keys& key_source, uint32_t threshold,
            const SelectionCount& request, uint8_t* selected) {
  Collected collected = collect(view, band, key_source, threshold, selected);
  const int64_t wanted = request.of(collected.valid);
  if (collected.above() + collected.equal < wanted && threshold > Keys::kLowest) {
    threshold = Keys::kLowest;
    collected = collect(view, band, key_source, threshold, nullptr);
  }
  const int64_t need = std::min(wanted, collected.above() + collected.equal);
  if (need <= 0) {
    return;
  }
  if (need > collected.above()) {
    for (const int64_t position : collected.positions) {
      selected[position] = 1;
    }
    mark_equal(view, band, key_source, threshold, collected, need - collected.above(), selected);
    return;
  }
  const KeyThreshold nth = radix_threshold(collected.keys.data(), collected.above(), need);
  LowestIndices ties(view, nth.need);
  for (int64_t i = 0; i < collected.above(); ++i) {
    if (collected.keys[i] > nth.key) {
      selected[collected.positions[i]] = 1;
    } else if (collected.keys[i] == nth.key) {
      ties.add(collected.positions[i]);
    }
  }
  ties.mark(selected);
}

// A spread-out sample (multiples of the golden ratio, modulo 1: no stride that could fall in step with the rows).
struct Sample {
  double scale = 0.0;         // tokens per sampled token; 0: batch too small to be worth sampling
  int64_t valid = 0;          // of the sample
  std::vector<uint32_t> keys;  // ordered values of the sampled candidates

  Sample(const TokenView& view, Band band) {
    if (view.tokens < 4 * kSampleSize) {
      return;
    }
    scale = static_cast<double>(view.tokens) / kSampleSize;
    // First the reads, which miss the caches, without a branch that depends on one: they overlap.
    std::vector<float> values(kSampleSize);
    std::vector<uint8_t> counts(kSampleSize), excluded(kSampleSize);
    double fraction = 0.0;
    for (int64_t i = 0; i < kSampleSize; ++i) {
      fraction += 0.6180339887498949;
      fraction -= fraction >= 1.0;
      const auto position = static_cast<int64_t>(fraction * static_cast<double>(view.tokens));
      values[i] = view.covariance[position];
      counts[i] = view.mask ? view.mask[position] : 1;
      excluded[i] = view.exclude ? view.exclude[position] : 0;
    }
    keys.reserve(kSampleSize);
    for (int64_t i = 0; i < kSampleSize; ++i) {
      valid += counts[i] != 0;
      if (counts[i] && !excluded[i] && values[i] >= band.low && values[i] <= band.high) {
        keys.push_back(ordered_key(values[i]));
      }
    }
  }

  int64_t expected_valid() const { return static_cast<int64_t>(valid * scale); }
};

// A value that is very likely below the need-th largest: six standard deviations of the sample's count below it, and
// some more for the small counts, whose distribution is skewed.
uint32_t guess_value(Sample& sample, double need) {
  if (sample.scale == 0.0) {
    return ValueKeys::kLowest;
  }
  const double expected = need / sample.scale;
  const double rank = expected + 6.0 * std::sqrt(expected) + 8.0;
  if (!(rank < static_cast<double>(sample.keys.size()))) {
    return ValueKeys::kLowest;
  }
  const auto nth = sample.keys.begin() + static_cast<int64_t>(rank);
  std::nth_element(sample.keys.begin(), nth, sample.keys.end(), std::greater<uint32_t>());
  return *nth;
}

// The same for random keys, which are uniform: only the number of candidates has to be guessed.
uint32_t guess_random(const Sample& sample, double need) {
  const auto hits = static_cast<double>(sample.keys.size());
  const double candidates = (hits - 6.0 * std::sqrt(hits) - 6.0) * sample.scale;
  const double share = (need + 6.0 * std::sqrt(need) + 16.0) / candidates;
  if (!(candidates > 0.0) || share >= 1.0) {
    return RandomKeys::kLowest;
  }
  return static_cast<uint32_t>((1.0 - share) * 4294967296.0);
}

// Band between the lower order statistics at quantiles low and high of all candidates.
Band quantile_band(const TokenView& view, double low, double high, bool closed) {
  std::vector<int64_t> per_chunk((view.tokens + kChunk - 1) / kChunk);
  torch::stable::parallel_for(
      0, static_cast<int64_t>(per_chunk.size()), kChunksPerTask, [&](int64_t first, int64_t last) {
        uint32_t positions[kChunk + kChunkSlack];
        for (int64_t chunk = first; chunk < last; ++chunk) {
          const int64_t begin = chunk * kChunk, end = std::min(begin + kChunk, view.tokens);
          per_chunk[chunk] = view.scan->candidates(view, begin, end, kAllValues, positions).candidates;
        }
      });
  int64_t total = 0;
  for (const int64_t count : per_chunk) {
    total += count;
  }
  if (total == 0 || !(low < high)) {
    return {kInfinity, -kInfinity};
  }
  const int64_t need_low = quantile_rank(total, low), need_high = quantile_rank(total, high);
  Sample sample(view, kAllValues);
  uint32_t threshold = guess_value(sample, static_cast<double>(need_low));
  Collected collected = collect(view, kAllValues, ValueKeys{}, threshold, nullptr);
  if (collected.above() + collected.equal < need_low) {
    threshold = ValueKeys::kLowest;
    collected = collect(view, kAllValues, ValueKeys{}, threshold, nullptr);
  }
  const auto nth_key = [&](int64_t need) {
    return need > collected.above() ? threshold
                                    : radix_threshold(collected.keys.data(), collected.above(), need).key;
  };
  return value_band(key_band(nth_key(need_low), nth_key(need_high), closed));
}

// Between low and high, or, if quantile, between the order statistics at these shares of the candidates.
Band clip_cov_band(const TokenView& view, double low, double high, bool quantile, bool closed) {
  return quantile ? quantile_band(view, low, high, closed)
                  : value_band(key_band_of_values(low, high, closed));
}

// They write the whole mask, bool bytes.
void select_at_random(const TokenView& view, Band band, const SelectionCount& request, int64_t seed,
                      uint8_t* selected) {
  const Sample sample(view, band);
  const uint32_t threshold = guess_random(sample, static_cast<double>(request.of(sample.expected_valid())));
  select(view, band, RandomKeys{static_cast<uint64_t>(seed)}, threshold, request, selected);
}

void select_largest(const TokenView& view, const SelectionCount& request, uint8_t* selected) {
  Sample sample(view, kAllValues);
  const uint32_t threshold = guess_value(sample, static_cast<double>(request.of(sample.expected_valid())));
  select(view, kAllValues, ValueKeys{}, threshold, request, selected);
}

SelectionCount count_of(double ratio, int64_t k, bool at_least_one, const std::optional<Tensor>& numbers) {
  const auto* given = data_or_null<double>(numbers);
  return given ? count_in_memory(given, at_least_one) : SelectionCount{ratio, k, at_least_one};
}

Tensor clip_cov_mask(const Tensor& covariance, std::optional<Tensor> mask, std::optional<Tensor> exclude,
                     std::optional<Tensor> token_index, const Tensor& seed, double ratio, int64_t k,
                     bool at_least_one, double low, double high, bool quantile, bool closed,
                     std::optional<Tensor> numbers) {
  check_selection(covariance, mask, exclude, token_index, ratio, k, numbers, 4);
  check_scalar("seed", seed, covariance);
  if (const auto* given = data_or_null<double>(numbers)) {
    low = given[2];
    high = given[3];
  }
  const TokenView view = token_view(covariance, mask, exclude, token_index);
  Tensor selected = torch::stable::new_empty(covariance, covariance.sizes(), torch::headeronly::ScalarType::Bool);
  select_at_random(view, clip_cov_band(view, low, high, quantile, closed), count_of(ratio, k, at_least_one, numbers),
                   *static_cast<const int64_t*>(seed.const_data_ptr()),
                   static_cast<uint8_t*>(selected.mutable_data_ptr()));
  return selected;
}

Tensor kl_cov_mask(const Tensor& covariance, std::optional<Tensor> mask, std::optional<Tensor> exclude,
                   std::optional<Tensor> token_index, double ratio, int64_t k, bool at_least_one,
                   std::optional<Tensor> numbers) {
  check_selection(covariance, mask, exclude, token_index, ratio, k, numbers, 2);
  Tensor selected = torch::stable::new_empty(covariance, covariance.sizes(), torch::headeronly::ScalarType::Bool);
  select_largest(token_view(covariance, mask, exclude, token_index), count_of(ratio, k, at_least_one, numbers),
                 static_cast<uint8_t*>(selected.mutable_data_ptr()));
  return selected;
}

}  // namespace
}  // namespace entropy_kernels::cpu

STABLE_TORCH_LIBRARY_IMPL(entropy_kernels_native, CompositeExplicitAutograd, m) {
  m.impl("clip_cov_mask", TORCH_BOX(&entropy_kernels::cpu::clip_cov_mask));
  m.impl("kl_cov_mask", TORCH_BOX(&entropy_kernels::cpu::kl_cov_mask));
}

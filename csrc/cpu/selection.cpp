// Selection masks over one process's batch. All are "the n largest of 32-bit keys among the candidates": random keys for
// Clip-Cov, covariances in their order for KL-Cov, and for a budget scores, as many as come to it. A threshold that is very likely just below the
// n-th largest key is guessed from a sample; one pass over the tokens counts them and keeps the few keys above it, and
// the exact selection is made among those. A wrong guess costs a second pass, never the result.
#include "cpu/selection.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <mutex>
#include <utility>
#include <vector>

#include "common/budget.h"
#include "common/radix_select.h"
#include "common/selection.h"
#include "cpu/selection_scan.h"

namespace entropy_kernels::cpu {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLargest = std::numeric_limits<float>::max();
constexpr Range kAllValues{-kInfinity, kInfinity};  // everything but NaN
constexpr Range kCandidates{0.0f, kLargest};  // for a budget; 0 counts nothing
constexpr int64_t kChunksPerTask = 16;
constexpr int64_t kSampleSize = 4096;

// A batch and what scans it.
struct View : TokenView {
  const ScanKernels* scan;
};

// The values of a band of keys. The key next to an infinity's is a NaN: nothing lies above +inf or below -inf. The key
// below +0's would be that of -0, which equals it: one further down.
Range values_of(KeyBand keys) {
  constexpr uint32_t kMinusZero = 0x7fffffffu;
  return {key_value(keys.low), key_value(keys.high == kMinusZero ? kMinusZero - 1 : keys.high)};
}

// Keys of KL-Cov and of quantiles: the covariance itself.
struct ValueKeys {
  static constexpr uint32_t kLowest = 0x007fffffu;  // ordered_key(-inf)

  Range above(Range range, uint32_t threshold) const { return {key_value(threshold), range.high}; }
  void operator()(const View& view, int64_t begin, const uint32_t* positions, int64_t count,
                  uint32_t* keys) const {
    for (int64_t i = 0; i < count; ++i) {
      keys[i] = ordered_key(view.covariance[begin + positions[i]]);
    }
  }
};

// Those of a budget.
struct PositiveKeys : ValueKeys {
  static constexpr uint32_t kLowest = kZeroKey;
};

// Keys of Clip-Cov.
struct RandomKeys {
  static constexpr uint32_t kLowest = 0;
  uint64_t seed;

  Range above(Range range, uint32_t) const { return range; }
  void operator()(const View& view, int64_t begin, const uint32_t* positions, int64_t count,
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

// How much is to be selected, and what each key counts there.
struct CountRequest {
  Count count;

  int64_t of(int64_t valid) const { return count.of(valid); }
  int64_t weight(uint32_t) const { return 1; }
  uint32_t lower(uint32_t, uint32_t lowest) const { return lowest; }
};

// Fixed-point scores.
struct BudgetRequest {
  int64_t wanted;
  double scale;
  uint32_t safe;  // a threshold that is rarely too high

  int64_t of(int64_t) const { return wanted; }
  int64_t weight(uint32_t key) const { return key_weight(key, scale); }
  // The threshold to try after one that was too high.
  uint32_t lower(uint32_t threshold, uint32_t lowest) const { return safe < threshold ? safe : lowest; }
};

// Positions and keys of one chunk's candidates.
struct Chunk {
  uint32_t positions[kChunk + kChunkSlack];
  uint32_t keys[kChunk + kChunkSlack];

  template <class Keys>
  ChunkCount fill(const View& view, Range range, const Keys& key_source, int64_t begin) {
    const int64_t end = std::min(begin + kChunk, view.tokens);
    const ChunkCount count = view.scan->candidates(view, begin, end, range, positions);
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
Collected collect(const View& view, Range range, const Keys& key_source, uint32_t threshold, uint8_t* selected) {
  range = key_source.above(range, threshold);
  return over_chunks(view.tokens, [&](int64_t begin, Collected& mine) {
    Chunk chunk;
    const ChunkCount count = chunk.fill(view, range, key_source, begin);
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
  LowestIndices(const View& view, int64_t count) : index_(view.index), count_(count) {}

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
void mark_equal(const View& view, Range range, const Keys& key_source, uint32_t threshold, Collected& collected,
                int64_t count, uint8_t* selected) {
  range = key_source.above(range, threshold);
  std::vector<int64_t>& chunks = collected.equal_chunks;
  std::sort(chunks.begin(), chunks.end());
  LowestIndices all(view, count);
  std::mutex lock;
  torch::stable::parallel_for(
      0, static_cast<int64_t>(chunks.size()), kChunksPerTask, [&](int64_t first, int64_t last) {
        LowestIndices mine(view, count);
        Chunk chunk;
        for (int64_t c = first; c < last && !mine.complete_before(chunks[c]); ++c) {
          const ChunkCount found = chunk.fill(view, range, key_source, chunks[c]);
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

// Writes the whole mask: of the candidates those with the largest keys, as many as are requested.
template <class Keys, class Request>
void select(const View& view, Range range, const Keys& key_source, uint32_t threshold, const Request& request,
            uint8_t* selected) {
  const auto weight = [&](uint32_t key) { return request.weight(key); };
  int64_t above = 0, equal = 0;  // what those collected come to
  const auto weigh = [&](const Collected& collected) {
    above = 0;
    for (const uint32_t key : collected.keys) {
      above += weight(key);
    }
    equal = collected.equal * weight(threshold);
  };
  // How many keys come to `need`
  const auto keys_for = [&](int64_t need, uint32_t key) { return (need + weight(key) - 1) / weight(key); };
  Collected collected = collect(view, range, key_source, threshold, selected);
  const int64_t wanted = request.of(collected.valid);
  weigh(collected);
  while (above + equal < wanted && threshold > Keys::kLowest) {
    threshold = request.lower(threshold, Keys::kLowest);
    collected = collect(view, range, key_source, threshold, nullptr);
    weigh(collected);
  }
  const int64_t need = std::min(wanted, above + equal);
  if (need <= 0) {
    return;
  }
  if (need > above) {
    for (const int64_t position : collected.positions) {
      selected[position] = 1;
    }
    mark_equal(view, range, key_source, threshold, collected, keys_for(need - above, threshold), selected);
    return;
  }
  const KeyThreshold nth = radix_threshold(collected.keys.data(), collected.above(), need, weight);
  LowestIndices ties(view, keys_for(nth.need, nth.key));
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

  Sample(const View& view, Range range) {
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
      if (counts[i] && !excluded[i] && values[i] >= range.low && values[i] <= range.high) {
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

// The same for scores that are to come to `need`, of which some may be far larger than others: so many standard
// deviations, about the root of the sum of the squares, below it. 32 steps for each power of two.
uint32_t guess_budget(const Sample& sample, double need, double deviations) {
  constexpr int kBins = 1024, kShift = 18;
  if (sample.scale == 0.0 || sample.keys.empty()) {
    return PositiveKeys::kLowest;
  }
  const uint32_t top = *std::max_element(sample.keys.begin(), sample.keys.end());
  std::array<double, kBins> sums = {}, squares = {};
  for (const uint32_t key : sample.keys) {
    const double value = key_value(key);
    const uint32_t bin = std::min<uint32_t>((top - key) >> kShift, kBins - 1);
    sums[bin] += value;
    squares[bin] += value * value;
  }
  const double expected = need / sample.scale;
  double above = 0.0, square = 0.0;
  for (int64_t bin = 0; bin + 1 < kBins; ++bin) {
    square += above < expected ? squares[bin] : 0.0;
    above += sums[bin];
    const int64_t threshold = top - ((bin + 1) << kShift);
    if (threshold <= PositiveKeys::kLowest) {
      break;
    }
    const double room = above - expected - deviations * key_value(static_cast<uint32_t>(threshold));
    if (room > 0.0 && room * room >= deviations * deviations * square) {
      return static_cast<uint32_t>(threshold);
    }
  }
  return PositiveKeys::kLowest;
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

// A batch's fixed-point scale, and what is summed of it.
struct Measured {
  int64_t exponent, sum;
};

// The scale depends on the largest magnitude, of which the first chunks tell most: each is summed at the scale that is
// known by then, and those that were summed at another one than the batch's in the end are summed again.
Measured measure(const View& view, const Sample& sample, Summed summed) {
  struct Part {
    int64_t valid, exponent, sum;
  };
  std::vector<Part> parts((view.tokens + kChunk - 1) / kChunk);
  const int64_t count = static_cast<int64_t>(parts.size());
  const auto end_of = [&](int64_t chunk) { return std::min((chunk + 1) * kChunk, view.tokens); };
  const auto exponent_of = [](int32_t largest, int64_t valid) {
    return fixed_point_exponent(Magnitude<float>::value(largest), static_cast<double>(valid));
  };
  std::atomic<int32_t> largest{0};
  const int64_t expected = view.mask && sample.scale != 0.0 ? sample.expected_valid() : view.tokens;
  torch::stable::parallel_for(0, count, kChunksPerTask, [&](int64_t first, int64_t last) {
    for (int64_t chunk = first; chunk < last; ++chunk) {
      int32_t known = largest.load(std::memory_order_relaxed);
      const int64_t exponent = exponent_of(known, expected);
      const ScoreTotals totals =
          view.scan->totals(view, chunk * kChunk, end_of(chunk), summed, power_of_two(exponent));
      parts[chunk] = {totals.valid, exponent, totals.sum};
      while (totals.largest > known && !largest.compare_exchange_weak(known, totals.largest)) {
      }
    }
  });
  int64_t valid = 0;
  for (const Part& part : parts) {
    valid += part.valid;
  }
  Measured all = {exponent_of(largest, valid), 0};
  if (summed != Summed::kNone) {
    torch::stable::parallel_for(0, count, kChunksPerTask, [&](int64_t first, int64_t last) {
      for (int64_t chunk = first; chunk < last; ++chunk) {
        if (parts[chunk].exponent != all.exponent) {
          const double scale = power_of_two(all.exponent);
          parts[chunk].sum = view.scan->totals(view, chunk * kChunk, end_of(chunk), summed, scale).sum;
        }
      }
    });
    for (const Part& part : parts) {
      all.sum += part.sum;
    }
  }
  return all;
}

// Between the lower order statistics at the band's quantiles of all candidates.
Range quantile_range(const View& view, const Band& band) {
  const double low = band.lower(), high = band.upper();
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
  return values_of(key_band(nth_key(need_low), nth_key(need_high), band.closed));
}

}  // namespace

void select(const Selection& selection, uint8_t* selected) {
  const View view = {selection.view, &scan_kernels()};
  const Count& count = selection.count;
  if (selection.drawn) {
    const Band& band = selection.band;
    const Range range = band.quantile ? quantile_range(view, band) : values_of(band.keys());
    const Sample sample(view, range);
    const uint32_t threshold = guess_random(sample, static_cast<double>(count.of(sample.expected_valid())));
    select(view, range, RandomKeys{selection.seed.read()}, threshold, CountRequest{count}, selected);
  } else {
    Sample sample(view, kAllValues);
    const uint32_t threshold = guess_value(sample, static_cast<double>(count.of(sample.expected_valid())));
    select(view, kAllValues, ValueKeys{}, threshold, CountRequest{count}, selected);
  }
}

void select(const TokenView& tokens, const Budget& budget, uint8_t* selected) {
  const View view = {tokens, &scan_kernels()};
  const Sample sample(view, kCandidates);
  // What a limit is held against counts all tokens, what a share is taken of the candidates.
  const Summed summed = budget.by_limit()   ? Summed::kFinite
                        : budget.by_share() ? Summed::kCandidates
                                            : Summed::kNone;
  const Measured all = measure(view, sample, summed);
  const int64_t wanted = budget.of(all.exponent, all.sum, all.sum);
  const double need = static_cast<double>(wanted) * power_of_two(-all.exponent);
  const BudgetRequest request = {wanted, power_of_two(all.exponent), guess_budget(sample, need, 8.0)};
  select(view, kCandidates, PositiveKeys{}, guess_budget(sample, need, 2.5), request, selected);
}

}  // namespace entropy_kernels::cpu

// How many tokens a selection takes, and from which range of covariance. Host + device.
#pragma once

#include <cstdint>

#include "common/host_device.h"
#include "common/radix_select.h"

namespace entropy_kernels {

// A share held to [0, 1]; NaN is 0.
EK_HOST_DEVICE double within_share(double value) { return value > 0 ? (value < 1 ? value : 1) : 0; }

// How many tokens to select: k if it is given (>= 0), else a share of those that count. As Count of
// entropy_kernels/backends/radix_select.py: `numbers`, float64 [ratio, k (NaN: not given), ...], are read in the place of
// ratio and k unless null, held to what they may be.
struct Count {
  double ratio;
  int64_t k;
  bool at_least_one;
  const double* numbers;

  // With `numbers` read, where they are in memory of whoever asks.
  EK_HOST_DEVICE Count read() const {
    if (numbers == nullptr) {
      return *this;
    }
    constexpr double kMost = 9007199254740992.0;  // more than any batch holds
    const double given = numbers[1];
    const int64_t wanted = given != given ? -1 : given > 0 ? static_cast<int64_t>(given < kMost ? given : kMost) : 0;
    return {numbers[0], wanted, at_least_one, nullptr};
  }
  EK_HOST_DEVICE int64_t of(int64_t valid) const {
    const Count given = read();
    if (valid == 0) {
      return 0;
    }
    if (given.k >= 0) {
      return given.k;
    }
    // truncation is floor
    const auto share = static_cast<int64_t>(within_share(given.ratio) * static_cast<double>(valid));
    return share == 0 && at_least_one ? 1 : share;
  }
};

// Ordered keys (radix_select.h) of the covariances of a band, both ends included; none if low > high. Beyond the key of
// an infinity lies no value, and below that of +0 lies that of -0, which is no value's either: the key next to a bound
// excludes exactly the bound.
struct KeyBand {
  uint32_t low;
  uint32_t high;

  EK_HOST_DEVICE bool contains(uint32_t key) const { return key >= low && key <= high; }
};

EK_HOST_DEVICE KeyBand key_band(uint32_t low, uint32_t high, bool closed) {
  return closed ? KeyBand{low, high} : KeyBand{low + 1, high - 1};
}

// Range of covariance of Clip-Cov's candidates, empty unless low < high. As Band of
// entropy_kernels/backends/radix_select.py; `numbers`, float64 [ratio, k, low, high] or null, as in Count.
struct Band {
  double low, high;  // shares in [0, 1] if quantile
  bool quantile, closed;
  const double* numbers;

  // As of Count.
  EK_HOST_DEVICE Band read() const { return {lower(), upper(), quantile, closed, nullptr}; }
  EK_HOST_DEVICE double lower() const { return numbers != nullptr ? numbers[2] : low; }
  EK_HOST_DEVICE double upper() const { return numbers != nullptr ? numbers[3] : high; }
  // Where it is not of quantiles.
  EK_HOST_DEVICE KeyBand keys() const {
    const double from = lower(), to = upper();
    return from < to ? key_band(ordered_key(static_cast<float>(from)), ordered_key(static_cast<float>(to)), closed)
                     : KeyBand{1, 0};
  }
};

// One flat batch. Masks are bool bytes; null: all tokens count, none is excluded, the token index is the position.
struct TokenView {
  const float* covariance;
  const uint8_t* mask;
  const uint8_t* exclude;
  const int64_t* index;
  int64_t tokens;

  EK_HOST_DEVICE int64_t token_index(int64_t position) const { return index != nullptr ? index[position] : position; }
};

// A number, or where it is in memory.
struct Seed {
  int64_t number;
  const int64_t* memory;  // null: the number counts

  EK_HOST_DEVICE uint64_t read() const { return static_cast<uint64_t>(memory != nullptr ? *memory : number); }
};

// What a mask is made of.
struct Selection {
  TokenView view;
  Count count;
  bool drawn;  // random keys within the band; else the covariances are the keys, no seed, no band
  Seed seed;
  Band band;
};

// Of `total` values, how many are at least the order statistic number floor(q (total - 1)) in ascending order.
EK_HOST_DEVICE int64_t quantile_rank(int64_t total, double q) {
  return total == 0 ? 0 : total - static_cast<int64_t>(within_share(q) * static_cast<double>(total - 1));
}

// Ties go to the lowest index: the largest tie key wins, found digit by digit like the keys. Positions below a known
// number take fewer rounds than indices of 64 bits.
struct TieOrder {
  int rounds;
  uint64_t flip;

  static EK_HOST_DEVICE TieOrder of_indices() { return {6, tie_key(0)}; }
  static EK_HOST_DEVICE TieOrder of_positions(int64_t tokens) {
    int rounds = 1;
    while ((tokens - 1) >> (rounds * kRadixBits) != 0) {
      ++rounds;
    }
    return {rounds, (uint64_t{1} << (rounds * kRadixBits)) - 1};
  }
  EK_HOST_DEVICE uint64_t key(int64_t index) const { return static_cast<uint64_t>(index) ^ flip; }
  EK_HOST_DEVICE int shift(int round) const { return kRadixBits * (rounds - 1 - round); }
  // Whether the digits before those of `round` are `prefix`.
  EK_HOST_DEVICE bool matches(uint64_t key, int round, uint64_t prefix) const {
    return round == 0 || key >> (shift(round) + kRadixBits) == prefix;  // round 0 may have a shift by 66
  }
};

}  // namespace entropy_kernels

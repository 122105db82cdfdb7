// How many tokens a selection takes, and from which range of covariance. Host + device.
#pragma once

#include <cstdint>

#include "common/host_device.h"
#include "common/radix_select.h"

namespace entropy_kernels {

// A share held to [0, 1]; NaN is 0.
EK_HOST_DEVICE double within_share(double value) { return value > 0 ? (value < 1 ? value : 1) : 0; }

// How many tokens are to be selected: a share of those that count, or k if it is given (>= 0).
struct SelectionCount {
  double ratio;
  int64_t k;
  bool at_least_one;

  EK_HOST_DEVICE int64_t of(int64_t valid) const {
    if (valid == 0) {
      return 0;
    }
    if (k >= 0) {
      return k;
    }
    const auto share = static_cast<int64_t>(within_share(ratio) * static_cast<double>(valid));  // truncation is floor
    return share == 0 && at_least_one ? 1 : share;
  }
};

// The same from numbers in memory, float64: ratio, k (NaN: not given), held to what they may be.
EK_HOST_DEVICE SelectionCount count_in_memory(const double* numbers, bool at_least_one) {
  constexpr double kMost = 9007199254740992.0;  // more than any batch holds
  const double ratio = numbers[0], k = numbers[1];
  if (k != k) {
    return {ratio, -1, at_least_one};
  }
  return {ratio, k > 0 ? static_cast<int64_t>(k < kMost ? k : kMost) : 0, at_least_one};
}

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

// Between two covariances; empty unless low < high.
EK_HOST_DEVICE KeyBand key_band_of_values(double low, double high, bool closed) {
  return low < high ? key_band(ordered_key(static_cast<float>(low)), ordered_key(static_cast<float>(high)), closed)
                    : KeyBand{1, 0};
}

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

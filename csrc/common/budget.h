// How much of the score a selection takes, exactly: scores are integers, multiples of 2^-exponent (fixed_point.h). Host +
// device.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "common/fixed_point.h"
#include "common/host_device.h"
#include "common/radix_select.h"

namespace entropy_kernels {

// Ordered key of the score 0, which those of candidates exceed.
constexpr uint32_t kZeroKey = 0x80000000u;

// What a candidate's score counts, from its ordered key.
EK_HOST_DEVICE int64_t key_weight(uint32_t key, double scale) {
  return to_fixed_point(static_cast<double>(key_value(key)), scale);
}

EK_HOST_DEVICE int64_t ceil_shift(int64_t value, int bits) { return -(-value >> bits); }

// ceil(share * total) of a total in [0, 2^62) and a share > 0, of which 1 is the most. The share is m 2^-(52 + shift); m
// and the total are multiplied in halves, and ceil(ceil(x / a) / b) = ceil(x / (a b)).
EK_HOST_DEVICE int64_t share_of(int64_t total, double share) {
  const double at_most = share < 1 ? share : 1;
  int64_t bits;
  memcpy(&bits, &at_most, sizeof(bits));
  const int exponent = static_cast<int>(bits >> 52);
  const int64_t m = (bits & ((int64_t{1} << 52) - 1)) | static_cast<int64_t>(exponent > 0) << 52;
  const int shift = 1023 - (exponent > 1 ? exponent : 1);
  const int64_t m1 = m >> 27, m0 = m & ((1 << 27) - 1), t1 = total >> 31, t0 = total & 0x7fffffff;
  const int64_t low = (m0 * t1 << 4) + ceil_shift(m0 * t0, 27);  // ceil(m0 total / 2^27)
  return ceil_shift((m1 * t1 << 6) + ceil_shift(m1 * t0 + low, 25), shift < 63 ? shift : 63);
}

// As Budget of entropy_kernels/backends/radix_select.py: the first of the three that is not NaN counts.
struct Budget {
  double budget, limit, share;
  const double* numbers;  // float64, the three; null, or they are read in the place of those

  // With `numbers` read, where they are in memory of whoever asks.
  EK_HOST_DEVICE Budget read() const {
    return numbers == nullptr ? *this : Budget{numbers[0], numbers[1], numbers[2], nullptr};
  }

  // Of one that has been read, from here on.
  EK_HOST_DEVICE bool by_budget() const { return budget == budget; }
  EK_HOST_DEVICE bool by_limit() const { return !by_budget() && limit == limit; }
  EK_HOST_DEVICE bool by_share() const { return !by_budget() && !by_limit() && share > 0; }

  // What the selected scores have to come to, at least. `total`: over all that counts, asked for by a limit;
  // `candidates`: over these, asked for by a share.
  EK_HOST_DEVICE int64_t of(int64_t exponent, int64_t total, int64_t candidates) const {
    constexpr double kMost = 4611686018427387904.0;  // 2^62: no sum of scores comes to so much
    const double scale = power_of_two(exponent);
    // A product that underflows is still above 0, or below it
    if (by_budget()) {
      const double up = ceil(budget * scale);
      return !(budget > 0) ? 0 : static_cast<int64_t>(up < 1 ? 1 : up < kMost ? up : kMost);
    }
    if (by_limit()) {
      double down = floor(limit * scale);
      down = limit < 0 && !(down < 0) ? -1 : down < -kMost ? -kMost : down < kMost ? down : kMost;
      return total - static_cast<int64_t>(down);
    }
    return by_share() ? share_of(candidates, share) : 0;
  }
};

}  // namespace entropy_kernels

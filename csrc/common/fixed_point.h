// Sums whose value does not depend on the order of the terms: each term is rounded to an integer multiple of a power
// of two, and integers add exactly. With |x| <= largest and `count` terms the unit is 2^-51 of the largest power of
// two above `largest`, coarser only where 63 bits could not hold the sum (from 2^11 terms on, one bit per doubling):
// for four million terms the mean's rounding error is below 2^-40 of the largest |x|.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "common/host_device.h"

namespace entropy_kernels {

// The smallest e with |value| < 2^e, or -1022 for anything smaller than the smallest normal double.
EK_HOST_DEVICE int64_t exponent_above(double value) {
  uint64_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return static_cast<int64_t>((bits >> 52) & 0x7ff) - 1022;
}

EK_HOST_DEVICE double power_of_two(int64_t exponent) {  // exponent in [-1022, 1023]
  const uint64_t bits = static_cast<uint64_t>(exponent + 1023) << 52;
  double value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

// Exponent of the scale for `count` terms of at most `largest`: scaled terms stay below 2^51, their sum below 2^62.
EK_HOST_DEVICE int64_t fixed_point_exponent(double largest, double count) {
  const int64_t room = 62 - exponent_above(count);
  const int64_t exponent = (room < 51 ? room : 51) - exponent_above(largest);
  return exponent < 1000 ? exponent : 1000;
}

// Adding 1.5 * 2^52 rounds a double below 2^51 to the nearest integer, ties to even, and leaves it, two's complement,
// in the low bits. The product is exact, so it does not matter whether the compiler contracts it to an FMA.
constexpr double kRoundingMagic = 6755399441055744.0;
constexpr int64_t kRoundingMagicBits = 0x4338000000000000;

// Modulo 2^64: terms that are not finite, or a scale of the caller's own, may exceed it, and the order must not matter.
EK_HOST_DEVICE int64_t wrapping_sum(int64_t a, int64_t b) {
  return static_cast<int64_t>(static_cast<uint64_t>(a) + static_cast<uint64_t>(b));
}

EK_HOST_DEVICE int64_t to_fixed_point(double value, double scale) {
  const double shifted = value * scale + kRoundingMagic;
  int64_t bits;
  memcpy(&bits, &shifted, sizeof(bits));
  return wrapping_sum(bits, -kRoundingMagicBits);
}

// Magnitudes compare like their bits, and NaN has larger bits than infinity.
template <class T>
struct Magnitude {
  using Bits = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;
  static constexpr Bits kMask = std::numeric_limits<Bits>::max();

  static EK_HOST_DEVICE Bits of(T value, bool valid) {
    Bits bits;
    memcpy(&bits, &value, sizeof(bits));
    return bits & kMask & -static_cast<Bits>(valid);
  }
  // +inf stands for any value that is not finite.
  static EK_HOST_DEVICE double value(Bits bits) {
    T magnitude;
    memcpy(&magnitude, &bits, sizeof(bits));
    return magnitude < kInfinity<T> ? magnitude : kInfinity<T>;
  }
};

template <class T>
EK_HOST_DEVICE T value_if(T value, bool valid) {  // 0 otherwise, also for NaN; a bit mask vectorises, a branch does not
  typename Magnitude<T>::Bits bits;
  memcpy(&bits, &value, sizeof(bits));
  bits &= -static_cast<typename Magnitude<T>::Bits>(valid);
  memcpy(&value, &bits, sizeof(bits));
  return value;
}

// The mean of `count` terms from their sum at the scale of fixed_point_exponent; NaN if one of them was not finite.
EK_HOST_DEVICE double fixed_point_mean(int64_t sum, double largest, double count) {
  if (largest == kInfinity<double>) {
    return kNaN<double>;
  }
  return static_cast<double>(sum) * power_of_two(-fixed_point_exponent(largest, count)) / count;
}

// Product of the deviations from the means, rounded once; 0 for a token that does not count.
template <class T>
EK_HOST_DEVICE float deviation_product(T logprob, T advantage, bool valid, double mean_logprob, double mean_advantage) {
  const double product =
      (static_cast<double>(logprob) - mean_logprob) * (static_cast<double>(advantage) - mean_advantage);
  return value_if(static_cast<float>(product), valid);
}

}  // namespace entropy_kernels

// Sums whose value does not depend on the order of the terms: each term is rounded to an integer multiple of a power
// of two, and integers add exactly. With |x| <= largest and `count` terms the unit is 2^-51 of the largest power of
// two above `largest`, coarser only where 63 bits could not hold the sum (from 2^11 terms on, one bit per doubling):
// for four million terms the mean's rounding error is below 2^-40 of the largest |x|.
#pragma once

#include <cstdint>
#include <cstring>

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

EK_HOST_DEVICE int64_t to_fixed_point(double value, double scale) {
  const double shifted = value * scale + kRoundingMagic;
  int64_t bits;
  memcpy(&bits, &shifted, sizeof(bits));
  return bits - kRoundingMagicBits;
}

}  // namespace entropy_kernels

// Radix selection of the n largest 32-bit keys, ties to the lower 64-bit token index: what each round of it is.
// Host + device; who fills the histograms (one thread, a block, several ranks whose histograms are added) is up to
// the caller, and the result does not depend on it.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/host_device.h"

namespace entropy_kernels {

constexpr int kRadixBits = 11;
constexpr int kRadixBins = 1 << kRadixBits;
constexpr int kKeyRounds = 3;
constexpr int kKeyShift[kKeyRounds] = {21, 10, 0};
constexpr int kKeyBits[kKeyRounds] = {11, 11, 10};

// float -> uint32 in the same order; -0 and +0 share a key. NaN has no place in it: sort it out before.
EK_HOST_DEVICE uint32_t ordered_key(float value) {
  const float canonical = value == 0.0f ? 0.0f : value;
  uint32_t bits;
  memcpy(&bits, &canonical, sizeof(bits));
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// The float of an ordered key; a key just beyond that of an infinity gives a NaN, which compares false to anything.
EK_HOST_DEVICE float key_value(uint32_t key) {
  const uint32_t bits = key & 0x80000000u ? key & 0x7fffffffu : ~key;
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

// Signed token index -> unsigned, lower index larger: ties are broken by "largest first", like the keys.
EK_HOST_DEVICE uint64_t tie_key(int64_t index) { return static_cast<uint64_t>(index) ^ 0x7fffffffffffffffull; }

// The digit [shift, shift + bits) of a key.
EK_HOST_DEVICE uint32_t radix_digit(uint64_t key, int shift, int bits) {
  return static_cast<uint32_t>(key >> shift) & ((1u << bits) - 1u);
}

struct RadixDigit {
  uint32_t digit;  // of the need-th largest key
  int64_t above;   // keys with a larger digit
};

// The digit that holds the need-th largest (need >= 1, at most the number of keys counted).
EK_HOST_DEVICE RadixDigit find_digit(const int64_t* histogram, int bins, int64_t need) {
  int64_t above = 0;
  int digit = bins - 1;
  while (digit > 0 && above + histogram[digit] < need) {
    above += histogram[digit--];
  }
  return {static_cast<uint32_t>(digit), above};
}

struct KeyThreshold {
  uint32_t key;  // the need-th largest
  int64_t need;  // how many of the keys equal to it belong to the selection
};

// What each of the keys counts where they are counted.
struct OneEach {
  int64_t operator()(uint32_t) const { return 1; }
};

// The need-th largest of `count` keys in memory, by one thread. With other weights: the largest key that those not below
// it come to `need`, and how much of that is left to it.
template <class Weight = OneEach>
KeyThreshold radix_threshold(const uint32_t* keys, int64_t count, int64_t need, const Weight& weight = {}) {
  int64_t histogram[kRadixBins];
  uint32_t prefix = 0;
  for (int round = 0; round < kKeyRounds; ++round) {
    const int shift = kKeyShift[round], bits = kKeyBits[round];
    for (int bin = 0; bin < kRadixBins; ++bin) {
      histogram[bin] = 0;
    }
    for (int64_t i = 0; i < count; ++i) {
      if ((static_cast<uint64_t>(keys[i]) >> (shift + bits)) == prefix) {
        histogram[radix_digit(keys[i], shift, bits)] += weight(keys[i]);
      }
    }
    const RadixDigit found = find_digit(histogram, 1 << bits, need);
    need -= found.above;
    prefix = (prefix << bits) | found.digit;
  }
  return {prefix, need};
}

}  // namespace entropy_kernels

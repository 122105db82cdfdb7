// The single steps of selection, for batches spread over ranks: their histograms are added between the rounds. What
// each does with one token; host + device. Keys are int64 here: 0 .. 2^32 - 1, or -1 for a token that is no candidate.
// Columns of a search state: prefix, need, equal (entropy_kernels/backends/radix_select.py).
#pragma once

#include <cstdint>

#include "common/budget.h"
#include "common/fixed_point.h"
#include "common/host_device.h"
#include "common/philox.h"
#include "common/radix_select.h"

namespace entropy_kernels {

constexpr int kStateColumns = 3;

// Ordered covariances of the candidates.
struct ValueKeyStep {
  const float* covariance;
  const uint8_t* mask;     // null: all tokens count
  const uint8_t* exclude;  // null: none is excluded
  int64_t* keys;

  EK_HOST_DEVICE void operator()(int64_t i) const {
    const float value = covariance[i];
    const bool candidate =
        (mask == nullptr || mask[i] != 0) && (exclude == nullptr || exclude[i] == 0) && value == value;
    keys[i] = candidate ? static_cast<int64_t>(ordered_key(value)) : -1;
  }
};

// Token indices: given, or the position after those of lower ranks.
struct TokenIndex {
  const int64_t* given;   // null: none
  const int64_t* offset;  // ()

  EK_HOST_DEVICE int64_t operator()(int64_t i) const { return given != nullptr ? given[i] : wrapping_sum(*offset, i); }
};

// Random keys of the candidates whose ordered covariance lies in the band, both ends included.
struct RandomKeyStep {
  const int64_t* values;
  const int64_t* band;  // (2,)
  TokenIndex index;
  const int64_t* seed;  // ()
  int64_t* keys;

  EK_HOST_DEVICE void operator()(int64_t i) const {
    const int64_t value = values[i];
    const bool candidate = value >= 0 && value >= band[0] && value <= band[1];
    keys[i] = candidate ? static_cast<int64_t>(token_key(static_cast<uint64_t>(index(i)), static_cast<uint64_t>(*seed)))
                        : -1;
  }
};

// The digit of a key that shares the prefix of a row of states, else -1. As for every digit of a histogram, how much it
// counts there, and the type that holds what a part of the tokens comes to.
struct KeyDigitStep {
  using Sum = uint32_t;
  const int64_t* keys;
  const int64_t* state;  // (rows, 3)
  int shift, bits;

  EK_HOST_DEVICE int operator()(int64_t row, int64_t i) const {
    const int64_t key = keys[i];
    // -1 >> anything is -1, which is no prefix
    return key >> (shift + bits) == state[row * kStateColumns]
               ? static_cast<int>(radix_digit(static_cast<uint64_t>(key), shift, bits))
               : -1;
  }
  EK_HOST_DEVICE Sum weight(int64_t) const { return 1; }
};

// The same of one row, weighed by the keys' scores times `scale`; modulo 2^64, for keys and scales of any values.
struct WeightDigitStep {
  using Sum = uint64_t;
  KeyDigitStep digit;
  const double* scale;  // ()

  EK_HOST_DEVICE int operator()(int64_t row, int64_t i) const { return digit(row, i); }
  EK_HOST_DEVICE Sum weight(int64_t i) const {
    return static_cast<Sum>(key_weight(static_cast<uint32_t>(digit.keys[i]), *scale));
  }
};

// Of a token whose key is key_state's prefix: the digit of its tie key, if the `known` bits above it are the state's.
struct IndexDigitStep {
  using Sum = uint32_t;
  const int64_t* keys;
  TokenIndex index;
  const int64_t* key_state;  // (1, 3)
  const int64_t* state;      // (1, 3)
  int shift, bits, known;

  EK_HOST_DEVICE int operator()(int64_t, int64_t i) const {
    if (keys[i] != *key_state) {
      return -1;
    }
    const uint64_t tie = tie_key(index(i));
    const int above = known != 0 ? shift + bits : 0;  // a shift by 64 would be undefined
    const uint64_t prefix = tie >> above & ((uint64_t{1} << known) - 1);
    return prefix == static_cast<uint64_t>(*state) ? static_cast<int>(radix_digit(tie, shift, bits)) : -1;
  }
  EK_HOST_DEVICE Sum weight(int64_t) const { return 1; }
};

// Tokens whose key is above the threshold, or equal to it with a token index up to last_index.
struct MaskStep {
  const int64_t* keys;
  TokenIndex index;
  const int64_t* threshold;   // ()
  const int64_t* last_index;  // ()
  uint8_t* selected;

  EK_HOST_DEVICE void operator()(int64_t i) const {
    selected[i] = keys[i] > *threshold || (keys[i] == *threshold && index(i) <= *last_index);
  }
};

// Log-probs and advantages of tokens, of which those count whose mask byte is not 0; null: all of them.
template <class T>
struct TokenPairs {
  const T* logprob;
  const T* advantages;
  const uint8_t* mask;
  int64_t tokens;

  EK_HOST_DEVICE bool counts(int64_t i) const { return mask == nullptr || mask[i] != 0; }
};

// Their covariance from given means.
template <class T>
struct CovarianceStep {
  TokenPairs<T> pairs;
  const double* means;  // (2,)
  float* covariance;

  EK_HOST_DEVICE void operator()(int64_t i) const {
    covariance[i] = deviation_product(pairs.logprob[i], pairs.advantages[i], pairs.counts(i), means[0], means[1]);
  }
};

}  // namespace entropy_kernels

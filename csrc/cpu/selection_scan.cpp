#include "cpu/selection_scan.h"

#include <algorithm>

#include "common/fixed_point.h"
#include "common/philox.h"
#include "cpu/capability.h"

#if defined(__x86_64__)
#include "cpu/simd_target.h"
#endif

namespace entropy_kernels::cpu {
namespace portable {

// Candidates of [i, end), appended to those already counted.
ChunkCount append(const TokenView& view, int64_t begin, int64_t i, int64_t end, Range range, uint32_t* positions,
                  ChunkCount count) {
  for (; i < end; ++i) {
    const bool valid = !view.mask || view.mask[i];
    const bool kept = !view.exclude || !view.exclude[i];
    const float value = view.covariance[i];
    positions[count.candidates] = static_cast<uint32_t>(i - begin);  // overwritten by the next unless it is one
    count.candidates += valid & kept & (value >= range.low) & (value <= range.high);
    count.valid += valid;
  }
  return count;
}

ChunkCount candidates(const TokenView& view, int64_t begin, int64_t end, Range range, uint32_t* positions) {
  return append(view, begin, begin, end, range, positions, {0, 0});
}

void random_keys(const TokenView& view, int64_t begin, const uint32_t* positions, int64_t count, uint64_t seed,
                 uint32_t* keys) {
  for (int64_t i = 0; i < count; ++i) {
    keys[i] = token_key(static_cast<uint64_t>(view.token_index(begin + positions[i])), seed);
  }
}

KeyCount append_above(uint32_t threshold, uint32_t* keys, uint32_t* positions, int64_t i, int64_t count,
                      KeyCount found) {
  for (; i < count; ++i) {
    const uint32_t key = keys[i], position = positions[i];
    keys[found.above] = key;
    positions[found.above] = position;
    found.above += key > threshold;
    found.equal += key == threshold;
  }
  return found;
}

KeyCount compress_above(uint32_t threshold, uint32_t* keys, uint32_t* positions, int64_t count) {
  return append_above(threshold, keys, positions, 0, count, {0, 0});
}

// Those of [i, end), added to what there is.
ScoreTotals add_totals(const TokenView& view, int64_t i, int64_t end, Summed summed, double scale, ScoreTotals totals) {
  for (; i < end; ++i) {
    const bool valid = !view.mask || view.mask[i];
    const float score = view.covariance[i];
    const int32_t magnitude = Magnitude<float>::of(score, valid);
    const bool finite = valid && magnitude < kInfinityBits;
    totals.valid += valid;
    totals.largest = std::max(totals.largest, finite ? magnitude : 0);
    if (finite && (summed == Summed::kFinite ||
                   (summed == Summed::kCandidates && score > 0.0f && !(view.exclude && view.exclude[i])))) {
      totals.sum = wrapping_sum(totals.sum, to_fixed_point(score, scale));
    }
  }
  return totals;
}

ScoreTotals totals(const TokenView& view, int64_t begin, int64_t end, Summed summed, double scale) {
  return add_totals(view, begin, end, summed, scale, {0, 0, 0});
}

constexpr ScanKernels kernels{candidates, random_keys, compress_above, totals};

}  // namespace portable

#if defined(__x86_64__)
EK_TARGET_BEGIN("avx2,fma,popcnt")
namespace avx2 {

// byte b -> the positions of its set bits, in ascending order, as eight bytes
struct CompressTable {
  uint64_t entry[256];
  constexpr CompressTable() : entry() {
    for (int byte = 0; byte < 256; ++byte) {
      int slot = 0;
      for (int bit = 0; bit < 8; ++bit) {
        if (byte >> bit & 1) {
          entry[byte] |= static_cast<uint64_t>(bit) << (8 * slot++);
        }
      }
    }
  }
};
constexpr CompressTable kCompress{};

// The set bits' numbers, in the first lanes.
__m256i compress_order(uint32_t byte) {
  return _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(static_cast<int64_t>(kCompress.entry[byte])));
}

uint32_t nonzero_bytes(const uint8_t* bytes) {
  const __m256i block = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes));
  return ~static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_cmpeq_epi8(block, _mm256_setzero_si256())));
}

ChunkCount candidates(const TokenView& view, int64_t begin, int64_t end, Range range, uint32_t* positions) {
  const __m256 low = _mm256_set1_ps(range.low), high = _mm256_set1_ps(range.high);
  ChunkCount count{0, 0};
  int64_t i = begin;
  for (; i + 32 <= end; i += 32) {
    const uint32_t valid = view.mask ? nonzero_bytes(view.mask + i) : ~0u;
    const uint32_t excluded = view.exclude ? nonzero_bytes(view.exclude + i) : 0u;
    uint32_t inside = 0;
    for (int part = 0; part < 4; ++part) {
      const __m256 value = _mm256_loadu_ps(view.covariance + i + 8 * part);
      const __m256 hit = _mm256_and_ps(_mm256_cmp_ps(value, low, _CMP_GE_OQ), _mm256_cmp_ps(value, high, _CMP_LE_OQ));
      inside |= static_cast<uint32_t>(_mm256_movemask_ps(hit)) << (8 * part);
    }
    inside &= valid & ~excluded;
    count.valid += __builtin_popcount(valid);
    for (int32_t base = static_cast<int32_t>(i - begin); inside; inside >>= 8, base += 8) {
      const uint32_t byte = inside & 0xff;
      const __m256i position = _mm256_add_epi32(compress_order(byte), _mm256_set1_epi32(base));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(positions + count.candidates), position);
      count.candidates += __builtin_popcount(byte);
    }
  }
  return portable::append(view, begin, i, end, range, positions, count);
}

// The key words of all rounds, spread over the lanes once instead of in every round of every vector.
struct KeySchedule {
  __m256i first[kPhiloxRounds];
  __m256i second[kPhiloxRounds];
};

KeySchedule key_schedule(uint64_t seed) {
  KeySchedule keys;
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < kPhiloxRounds; ++round, key0 += kPhiloxW0, key1 += kPhiloxW1) {
    keys.first[round] = _mm256_set1_epi64x(key0);
    keys.second[round] = _mm256_set1_epi64x(key1);
  }
  return keys;
}

// Vectors of tokens that go through the rounds side by side: one alone would wait for its multiplications.
constexpr int kStreams = 4;
constexpr int64_t kTokensAtOnce = 4 * kStreams;

// First output words of Philox4x32-10 for counters (index, 0, 0), in place, one token per 64-bit lane. A word is
// the low half of its lane; the high half is garbage that _mm256_mul_epu32 ignores and the caller drops.
inline void first_words(__m256i* index, const KeySchedule& keys) {
  const __m256i m0 = _mm256_set1_epi64x(kPhiloxM0), m1 = _mm256_set1_epi64x(kPhiloxM1);
  __m256i c0[kStreams], c1[kStreams], c2[kStreams], c3[kStreams];
#pragma GCC unroll 4
  for (int s = 0; s < kStreams; ++s) {
    // Round 1 with c2 = c3 = 0: its second product is 0.
    c3[s] = _mm256_mul_epu32(index[s], m0);
    c2[s] = _mm256_xor_si256(_mm256_srli_epi64(c3[s], 32), keys.second[0]);
    c1[s] = _mm256_setzero_si256();
    c0[s] = _mm256_xor_si256(_mm256_srli_epi64(index[s], 32), keys.first[0]);
  }
#pragma GCC unroll 8
  for (int round = 1; round < kPhiloxRounds - 1; ++round) {
#pragma GCC unroll 4
    for (int s = 0; s < kStreams; ++s) {
      const __m256i product0 = _mm256_mul_epu32(c0[s], m0), product1 = _mm256_mul_epu32(c2[s], m1);
      c0[s] = _mm256_xor_si256(_mm256_xor_si256(c1[s], keys.first[round]), _mm256_srli_epi64(product1, 32));
      c2[s] = _mm256_xor_si256(_mm256_xor_si256(c3[s], keys.second[round]), _mm256_srli_epi64(product0, 32));
      c1[s] = product1;
      c3[s] = product0;
    }
  }
#pragma GCC unroll 4
  for (int s = 0; s < kStreams; ++s) {
    // The last round needs one product for the one word that is kept.
    const __m256i high = _mm256_srli_epi64(_mm256_mul_epu32(c2[s], m1), 32);
    index[s] = _mm256_xor_si256(_mm256_xor_si256(c1[s], keys.first[kPhiloxRounds - 1]), high);
  }
}

// (low half of each lane of a, low half of each lane of b) -> eight 32-bit words in order
__m256i low_words(__m256i a, __m256i b) {
  const __m256 mixed = _mm256_shuffle_ps(_mm256_castsi256_ps(a), _mm256_castsi256_ps(b), 0x88);
  return _mm256_permute4x64_epi64(_mm256_castps_si256(mixed), 0xD8);
}

void random_keys(const TokenView& view, int64_t begin, const uint32_t* positions, int64_t count, uint64_t seed,
                 uint32_t* keys) {
  const KeySchedule schedule = key_schedule(seed);
  const __m256i base = _mm256_set1_epi64x(begin);
  const long long* indices = view.index ? reinterpret_cast<const long long*>(view.index + begin) : nullptr;
  for (int64_t i = 0; i < count; i += kTokensAtOnce) {
    uint32_t padded[kTokensAtOnce] = {};  // the last tokens, and the chunk's first in place of those that are not there
    const uint32_t* from = positions + i;
    if (i + kTokensAtOnce > count) {
      for (int64_t j = i; j < count; ++j) {
        padded[j - i] = positions[j];
      }
      from = padded;
    }
    __m256i words[kStreams];
    for (int s = 0; s < kStreams; ++s) {
      const __m128i four = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + 4 * s));
      words[s] = indices ? _mm256_i32gather_epi64(indices, four, 8)
                         : _mm256_add_epi64(_mm256_cvtepu32_epi64(four), base);
    }
    first_words(words, schedule);
    for (int s = 0; s < kStreams; s += 2) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(keys + i + 4 * s), low_words(words[s], words[s + 1]));
    }
  }
}

KeyCount compress_above(uint32_t threshold, uint32_t* keys, uint32_t* positions, int64_t count) {
  const __m256i sign = _mm256_set1_epi32(INT32_MIN);  // there is only a signed comparison
  const __m256i bound = _mm256_set1_epi32(static_cast<int32_t>(threshold));
  const __m256i signed_bound = _mm256_xor_si256(bound, sign);
  KeyCount found{0, 0};
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    const __m256i key = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(keys + i));
    const __m256i above = _mm256_cmpgt_epi32(_mm256_xor_si256(key, sign), signed_bound);
    const __m256i equal = _mm256_cmpeq_epi32(key, bound);
    const auto above_bits = static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(above)));
    const auto equal_bits = static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(equal)));
    if (above_bits) {
      const __m256i order = compress_order(above_bits);
      const __m256i position = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(positions + i));
      // In place: what is written never reaches beyond what has been read.
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(keys + found.above), _mm256_permutevar8x32_epi32(key, order));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(positions + found.above),
                          _mm256_permutevar8x32_epi32(position, order));
      found.above += __builtin_popcount(above_bits);
    }
    found.equal += __builtin_popcount(equal_bits);
  }
  return portable::append_above(threshold, keys, positions, i, count, found);
}

// All bits of the lanes whose byte is not 0, in those of eight tokens.
__m256i nonzero_lanes(const uint8_t* bytes) {
  const __m256i words = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes)));
  return _mm256_cmpgt_epi32(words, _mm256_setzero_si256());
}

template <Summed kSummed>
ScoreTotals totals_of(const TokenView& view, int64_t begin, int64_t end, double scale) {
  const __m256i magnitude_bits = _mm256_set1_epi32(0x7fffffff), infinity = _mm256_set1_epi32(kInfinityBits);
  const __m256d scales = _mm256_set1_pd(scale), magic = _mm256_set1_pd(kRoundingMagic);
  __m256i count = _mm256_setzero_si256(), largest = _mm256_setzero_si256(), sum = _mm256_setzero_si256();
  int64_t i = begin;
  for (; i + 8 <= end; i += 8) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(view.covariance + i));
    const __m256i valid = view.mask ? nonzero_lanes(view.mask + i) : _mm256_set1_epi32(-1);
    const __m256i magnitude = _mm256_and_si256(bits, magnitude_bits);
    __m256i finite = _mm256_and_si256(valid, _mm256_cmpgt_epi32(infinity, magnitude));
    count = _mm256_sub_epi32(count, valid);
    largest = _mm256_max_epi32(largest, _mm256_and_si256(magnitude, finite));
    if constexpr (kSummed != Summed::kNone) {
      if constexpr (kSummed == Summed::kCandidates) {
        finite = _mm256_and_si256(finite, _mm256_cmpgt_epi32(bits, _mm256_setzero_si256()));
        if (view.exclude) finite = _mm256_andnot_si256(nonzero_lanes(view.exclude + i), finite);
      }
      const __m256 score = _mm256_castsi256_ps(_mm256_and_si256(bits, finite));
      for (const __m128 half : {_mm256_castps256_ps128(score), _mm256_extractf128_ps(score, 1)}) {
        // the product is exact: there is one rounding
        const __m256d shifted = _mm256_fmadd_pd(_mm256_cvtps_pd(half), scales, magic);
        sum = _mm256_add_epi64(sum, _mm256_castpd_si256(shifted));
      }
    }
  }
  alignas(32) int32_t counts[8], magnitudes[8];
  alignas(32) uint64_t sums[4];
  _mm256_store_si256(reinterpret_cast<__m256i*>(counts), count);
  _mm256_store_si256(reinterpret_cast<__m256i*>(magnitudes), largest);
  _mm256_store_si256(reinterpret_cast<__m256i*>(sums), sum);
  ScoreTotals totals{0, 0, 0};
  for (int lane = 0; lane < 8; ++lane) {
    totals.valid += counts[lane];
    totals.largest = std::max(totals.largest, magnitudes[lane]);
  }
  if (kSummed != Summed::kNone) {
    const uint64_t magics = static_cast<uint64_t>(kRoundingMagicBits) * static_cast<uint64_t>(i - begin);
    totals.sum = static_cast<int64_t>(sums[0] + sums[1] + sums[2] + sums[3] - magics);
  }
  return portable::add_totals(view, i, end, kSummed, scale, totals);
}

ScoreTotals totals(const TokenView& view, int64_t begin, int64_t end, Summed summed, double scale) {
  return summed == Summed::kNone     ? totals_of<Summed::kNone>(view, begin, end, scale)
         : summed == Summed::kFinite ? totals_of<Summed::kFinite>(view, begin, end, scale)
                                     : totals_of<Summed::kCandidates>(view, begin, end, scale);
}

constexpr ScanKernels kernels{candidates, random_keys, compress_above, totals};

}  // namespace avx2
EK_TARGET_END
#endif

const ScanKernels& scan_kernels() {
#if defined(__x86_64__)
  switch (selected_capability()) {
    case Capability::kAvx512:
      return avx512::kernels();
    case Capability::kAvx2:
      return avx2::kernels;
    default:
      break;
  }
#endif
  return portable::kernels;
}

}  // namespace entropy_kernels::cpu

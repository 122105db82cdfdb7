// The scan for CPUs with AVX-512F: twice the lanes of AVX2, compression in one instruction, three-way xor.
#include "common/fixed_point.h"
#include "common/philox.h"
#include "cpu/selection_scan.h"

#if defined(__x86_64__)
#include <algorithm>

#include "cpu/simd_target.h"

EK_TARGET_BEGIN("avx512f,avx2,popcnt")
namespace entropy_kernels::cpu::avx512 {
namespace {

constexpr int64_t kLanes = 16;

// The first `count` of sixteen lanes.
__mmask16 first_lanes(int64_t count) {
  return static_cast<__mmask16>(count >= kLanes ? 0xffffu : (1u << count) - 1u);
}

// Which of 16 bytes are not 0; those beyond `lanes` are not read.
__mmask16 nonzero_bytes(const uint8_t* bytes, __mmask16 lanes, int64_t count) {
  alignas(16) uint8_t last[kLanes] = {};
  if (lanes != 0xffff) {
    std::copy(bytes, bytes + count, last);
    bytes = last;
  }
  const __m512i words = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
  return _mm512_test_epi32_mask(words, words);
}

ChunkCount candidates(const TokenView& view, int64_t begin, int64_t end, Range range, uint32_t* positions) {
  const __m512 low = _mm512_set1_ps(range.low), high = _mm512_set1_ps(range.high);
  __m512i position = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  ChunkCount count{0, 0};
  for (int64_t i = begin; i < end; i += kLanes) {
    const int64_t left = end - i;
    const __mmask16 lanes = first_lanes(left);
    const __mmask16 valid = view.mask ? nonzero_bytes(view.mask + i, lanes, left) : lanes;
    const __m512 value = _mm512_maskz_loadu_ps(lanes, view.covariance + i);
    __mmask16 inside = _mm512_mask_cmp_ps_mask(_mm512_mask_cmp_ps_mask(valid, value, low, _CMP_GE_OQ), value, high,
                                               _CMP_LE_OQ);
    if (view.exclude) inside &= static_cast<__mmask16>(~nonzero_bytes(view.exclude + i, lanes, left));
    count.valid += __builtin_popcount(valid);
    // A whole vector is stored: compressing into memory costs far more on some CPUs.
    if (inside) {
      _mm512_storeu_si512(positions + count.candidates, _mm512_maskz_compress_epi32(inside, position));
      count.candidates += __builtin_popcount(inside);
    }
    position = _mm512_add_epi32(position, _mm512_set1_epi32(kLanes));
  }
  return count;
}

// Vectors of tokens that go through the rounds side by side: one alone would wait for its multiplications.
constexpr int kStreams = 4;
constexpr int64_t kTokensAtOnce = 8 * kStreams;
static_assert(kTokensAtOnce <= kChunkSlack);

inline __m512i xor3(__m512i a, __m512i b, __m512i c) { return _mm512_ternarylogic_epi64(a, b, c, 0x96); }

struct KeySchedule {
  __m512i first[kPhiloxRounds];
  __m512i second[kPhiloxRounds];
};

// First output words of Philox4x32-10 for counters (index, 0, 0), in place, one token per 64-bit lane. A word is the
// low half of its lane; the high half is garbage that _mm512_mul_epu32 ignores and the caller drops.
inline void first_words(__m512i* index, const KeySchedule& keys) {
  const __m512i m0 = _mm512_set1_epi64(kPhiloxM0), m1 = _mm512_set1_epi64(kPhiloxM1);
  __m512i c0[kStreams], c1[kStreams], c2[kStreams], c3[kStreams];
#pragma GCC unroll 4
  for (int s = 0; s < kStreams; ++s) {
    // Round 1 with c2 = c3 = 0: its second product is 0.
    c3[s] = _mm512_mul_epu32(index[s], m0);
    c2[s] = _mm512_xor_si512(_mm512_srli_epi64(c3[s], 32), keys.second[0]);
    c1[s] = _mm512_setzero_si512();
    c0[s] = _mm512_xor_si512(_mm512_srli_epi64(index[s], 32), keys.first[0]);
  }
#pragma GCC unroll 8
  for (int round = 1; round < kPhiloxRounds - 1; ++round) {
#pragma GCC unroll 4
    for (int s = 0; s < kStreams; ++s) {
      const __m512i product0 = _mm512_mul_epu32(c0[s], m0), product1 = _mm512_mul_epu32(c2[s], m1);
      c0[s] = xor3(c1[s], keys.first[round], _mm512_srli_epi64(product1, 32));
      c2[s] = xor3(c3[s], keys.second[round], _mm512_srli_epi64(product0, 32));
      c1[s] = product1;
      c3[s] = product0;
    }
  }
#pragma GCC unroll 4
  for (int s = 0; s < kStreams; ++s) {
    // The last round needs one product for the one word that is kept.
    const __m512i high = _mm512_srli_epi64(_mm512_mul_epu32(c2[s], m1), 32);
    index[s] = xor3(c1[s], keys.first[kPhiloxRounds - 1], high);
  }
}

void random_keys(const TokenView& view, int64_t begin, const uint32_t* positions, int64_t count, uint64_t seed,
                 uint32_t* keys) {
  KeySchedule schedule;
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < kPhiloxRounds; ++round, key0 += kPhiloxW0, key1 += kPhiloxW1) {
    schedule.first[round] = _mm512_set1_epi64(key0);
    schedule.second[round] = _mm512_set1_epi64(key1);
  }
  const __m512i base = _mm512_set1_epi64(begin);
  const long long* indices = view.index ? reinterpret_cast<const long long*>(view.index + begin) : nullptr;
  for (int64_t i = 0; i < count; i += kTokensAtOnce) {
    uint32_t padded[kTokensAtOnce] = {};  // the last tokens, and the chunk's first in place of those that are not there
    const uint32_t* from = positions + i;
    if (i + kTokensAtOnce > count) {
      std::copy(positions + i, positions + count, padded);
      from = padded;
    }
    __m512i words[kStreams];
#pragma GCC unroll 4
    for (int s = 0; s < kStreams; ++s) {
      const __m256i eight = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + 8 * s));
      words[s] = indices ? _mm512_i32gather_epi64(eight, indices, 8)
                         : _mm512_add_epi64(_mm512_cvtepu32_epi64(eight), base);
    }
    first_words(words, schedule);
#pragma GCC unroll 4
    for (int s = 0; s < kStreams; ++s) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(keys + i + 8 * s), _mm512_cvtepi64_epi32(words[s]));
    }
  }
}

KeyCount compress_above(uint32_t threshold, uint32_t* keys, uint32_t* positions, int64_t count) {
  const __m512i bound = _mm512_set1_epi32(static_cast<int32_t>(threshold));
  KeyCount found{0, 0};
  for (int64_t i = 0; i < count; i += kLanes) {
    const __mmask16 lanes = first_lanes(count - i);
    const __m512i key = _mm512_maskz_loadu_epi32(lanes, keys + i);
    const __mmask16 above = _mm512_mask_cmpgt_epu32_mask(lanes, key, bound);
    found.equal += __builtin_popcount(_mm512_mask_cmpeq_epu32_mask(lanes, key, bound));
    if (above) {
      const __m512i position = _mm512_maskz_loadu_epi32(lanes, positions + i);
      // In place: what is written never reaches beyond what has been read.
      _mm512_storeu_si512(keys + found.above, _mm512_maskz_compress_epi32(above, key));
      _mm512_storeu_si512(positions + found.above, _mm512_maskz_compress_epi32(above, position));
      found.above += __builtin_popcount(above);
    }
  }
  return found;
}

template <Summed kSummed>
ScoreTotals totals_of(const TokenView& view, int64_t begin, int64_t end, double scale) {
  const __m512i magnitude_bits = _mm512_set1_epi32(0x7fffffff), infinity = _mm512_set1_epi32(kInfinityBits);
  const __m512d scales = _mm512_set1_pd(scale), magic = _mm512_set1_pd(kRoundingMagic);
  __m512i largest = _mm512_setzero_si512(), sum = _mm512_setzero_si512();
  int64_t count = 0;
  uint64_t magics = 0;
  for (int64_t i = begin; i < end; i += kLanes) {
    const int64_t left = end - i;
    const __mmask16 lanes = first_lanes(left);
    const __mmask16 valid = view.mask ? nonzero_bytes(view.mask + i, lanes, left) : lanes;
    const __m512i bits = _mm512_maskz_loadu_epi32(lanes, view.covariance + i);
    const __m512i magnitude = _mm512_and_epi32(bits, magnitude_bits);
    __mmask16 finite = _mm512_mask_cmplt_epi32_mask(valid, magnitude, infinity);
    largest = _mm512_mask_max_epi32(largest, finite, largest, magnitude);
    count += __builtin_popcount(valid);
    if constexpr (kSummed != Summed::kNone) {
      if constexpr (kSummed == Summed::kCandidates) {
        finite = _mm512_mask_cmpgt_epi32_mask(finite, bits, _mm512_setzero_si512());
        if (view.exclude) finite &= static_cast<__mmask16>(~nonzero_bytes(view.exclude + i, lanes, left));
      }
      const __m512d scores = _mm512_castsi512_pd(_mm512_maskz_mov_epi32(finite, bits));
      for (const __m256d half : {_mm512_castpd512_pd256(scores), _mm512_extractf64x4_pd(scores, 1)}) {
        // the product is exact: there is one rounding
        const __m512d shifted = _mm512_fmadd_pd(_mm512_cvtps_pd(_mm256_castpd_ps(half)), scales, magic);
        sum = _mm512_add_epi64(sum, _mm512_castpd_si512(shifted));
      }
      magics += kLanes * static_cast<uint64_t>(kRoundingMagicBits);
    }
  }
  const auto all = static_cast<uint64_t>(_mm512_reduce_add_epi64(sum));
  return {count, _mm512_reduce_max_epi32(largest), static_cast<int64_t>(all - magics)};
}

ScoreTotals totals(const TokenView& view, int64_t begin, int64_t end, Summed summed, double scale) {
  return summed == Summed::kNone     ? totals_of<Summed::kNone>(view, begin, end, scale)
         : summed == Summed::kFinite ? totals_of<Summed::kFinite>(view, begin, end, scale)
                                     : totals_of<Summed::kCandidates>(view, begin, end, scale);
}

}  // namespace

const ScanKernels& kernels() {
  static constexpr ScanKernels all{candidates, random_keys, compress_above, totals};
  return all;
}

}  // namespace entropy_kernels::cpu::avx512
EK_TARGET_END
#endif

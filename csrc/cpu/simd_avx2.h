// Sixteen floats as two AVX registers, for CPUs with AVX2, FMA and F16C.
//
// The kernel (token_stats_kernel.h) is written for sixteen lanes whatever the instruction set: one cache line of fp32,
// half a line of bf16 or fp16. Included inside an instruction set's namespace, under its target options, so that no
// inline function here can be linked into another's code.

#define EK_INLINE __attribute__((always_inline)) inline

struct F32x16 {
  __m256 lo, hi;

  static EK_INLINE F32x16 set1(float value) { return {_mm256_set1_ps(value), _mm256_set1_ps(value)}; }
  static EK_INLINE F32x16 load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
  EK_INLINE void store(float* p) const {
    _mm256_storeu_ps(p, lo);
    _mm256_storeu_ps(p + 8, hi);
  }
  // p must be 64-byte aligned
  EK_INLINE void stream(float* p) const {
    _mm256_stream_ps(p, lo);
    _mm256_stream_ps(p + 8, hi);
  }
};

EK_INLINE F32x16 operator+(F32x16 a, F32x16 b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
EK_INLINE F32x16 operator-(F32x16 a, F32x16 b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
EK_INLINE F32x16 operator*(F32x16 a, F32x16 b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
EK_INLINE F32x16 operator/(F32x16 a, F32x16 b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
// a * b + c
EK_INLINE F32x16 fma(F32x16 a, F32x16 b, F32x16 c) {
  return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
// The larger; b where either is NaN.
EK_INLINE F32x16 max_or_second(F32x16 a, F32x16 b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
// a < b ? x : y
EK_INLINE F32x16 where_less(F32x16 a, F32x16 b, F32x16 x, F32x16 y) {
  return {_mm256_blendv_ps(y.lo, x.lo, _mm256_cmp_ps(a.lo, b.lo, _CMP_LT_OQ)),
          _mm256_blendv_ps(y.hi, x.hi, _mm256_cmp_ps(a.hi, b.hi, _CMP_LT_OQ))};
}
EK_INLINE F32x16 abs(F32x16 a) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(sign, a.lo), _mm256_andnot_ps(sign, a.hi)};
}
// |a| with the sign of b
EK_INLINE F32x16 copysign(F32x16 a, F32x16 b) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_or_ps(_mm256_andnot_ps(sign, a.lo), _mm256_and_ps(sign, b.lo)),
          _mm256_or_ps(_mm256_andnot_ps(sign, a.hi), _mm256_and_ps(sign, b.hi))};
}
// The float whose bits are those of a, shifted into the exponent.
EK_INLINE F32x16 bits_to_exponent(F32x16 a) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(a.lo), 23)),
          _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(a.hi), 23))};
}
EK_INLINE float horizontal_max(F32x16 a) {
  const __m256 eight = _mm256_max_ps(a.lo, a.hi);
  __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  four = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(four, _mm_shuffle_ps(four, four, 1)));
}
EK_INLINE bool any_nan(F32x16 a) {
  return _mm256_movemask_ps(_mm256_or_ps(_mm256_cmp_ps(a.lo, a.lo, _CMP_UNORD_Q),
                                         _mm256_cmp_ps(a.hi, a.hi, _CMP_UNORD_Q))) != 0;
}

// 32 bf16: a bf16 is the upper half of a float, so even and odd elements are one shift and one mask away, and
// nothing crosses lanes.
EK_INLINE void load_bf16(const std::uint16_t* p, F32x16& even, F32x16& odd) {
  const __m256i a = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  const __m256i b = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 16));
  const __m256i upper = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
  even = {_mm256_castsi256_ps(_mm256_slli_epi32(a, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(b, 16))};
  odd = {_mm256_castsi256_ps(_mm256_and_si256(a, upper)), _mm256_castsi256_ps(_mm256_and_si256(b, upper))};
}
// Bits of the float nearest to v among bf16 (ties to even) in the upper half; the lower half is rubbish.
EK_INLINE __m256i round_to_bf16(__m256 v) {
  const __m256i bits = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
  // Rounding could carry a NaN's payload into infinity or zero.
  const __m256 nan = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fc00000));
  return _mm256_castps_si256(
      _mm256_blendv_ps(_mm256_castsi256_ps(rounded), nan, _mm256_cmp_ps(v, v, _CMP_UNORD_Q)));
}
EK_INLINE __m256i pack_bf16(__m256 even, __m256 odd) {
  return _mm256_blend_epi16(_mm256_srli_epi32(round_to_bf16(even), 16), round_to_bf16(odd), 0xaa);
}
EK_INLINE void store_bf16(std::uint16_t* p, F32x16 even, F32x16 odd) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), pack_bf16(even.lo, odd.lo));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 16), pack_bf16(even.hi, odd.hi));
}
EK_INLINE void stream_bf16(std::uint16_t* p, F32x16 even, F32x16 odd) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), pack_bf16(even.lo, odd.lo));
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p + 16), pack_bf16(even.hi, odd.hi));
}

// 16 fp16, in order.
EK_INLINE F32x16 load_f16(const std::uint16_t* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))),
          _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8)))};
}
EK_INLINE void store_f16(std::uint16_t* p, F32x16 v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v.lo, _MM_FROUND_TO_NEAREST_INT));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8), _mm256_cvtps_ph(v.hi, _MM_FROUND_TO_NEAREST_INT));
}
EK_INLINE void stream_f16(std::uint16_t* p, F32x16 v) {
  _mm_stream_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v.lo, _MM_FROUND_TO_NEAREST_INT));
  _mm_stream_si128(reinterpret_cast<__m128i*>(p + 8), _mm256_cvtps_ph(v.hi, _MM_FROUND_TO_NEAREST_INT));
}

// d * (c_hi + c_lo) as n + r: returns r, |r| <= 1/2, and sets `biased` to magic + n (see Exponential).
EK_INLINE F32x16 split_exponent(F32x16 d, F32x16 c_hi, F32x16 c_lo, F32x16 magic, F32x16& biased) {
  biased = fma(d, c_hi, magic);
  const F32x16 n = biased - magic;
  const F32x16 rest = {_mm256_fmsub_ps(d.lo, c_hi.lo, n.lo), _mm256_fmsub_ps(d.hi, c_hi.hi, n.hi)};
  return fma(d, c_lo, rest);
}

EK_INLINE void store_fence() { _mm_sfence(); }

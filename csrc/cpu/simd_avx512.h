// Sixteen floats in one AVX-512 register; needs AVX-512F only. See simd_avx2.h for what each function means.

#define EK_INLINE __attribute__((always_inline)) inline

struct F32x16 {
  __m512 v;

  static EK_INLINE F32x16 set1(float value) { return {_mm512_set1_ps(value)}; }
  static EK_INLINE F32x16 load(const float* p) { return {_mm512_loadu_ps(p)}; }
  EK_INLINE void store(float* p) const { _mm512_storeu_ps(p, v); }
  EK_INLINE void stream(float* p) const { _mm512_stream_ps(p, v); }
};

EK_INLINE F32x16 operator+(F32x16 a, F32x16 b) { return {_mm512_add_ps(a.v, b.v)}; }
EK_INLINE F32x16 operator-(F32x16 a, F32x16 b) { return {_mm512_sub_ps(a.v, b.v)}; }
EK_INLINE F32x16 operator*(F32x16 a, F32x16 b) { return {_mm512_mul_ps(a.v, b.v)}; }
EK_INLINE F32x16 operator/(F32x16 a, F32x16 b) { return {_mm512_div_ps(a.v, b.v)}; }
EK_INLINE F32x16 fma(F32x16 a, F32x16 b, F32x16 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
EK_INLINE F32x16 max_or_second(F32x16 a, F32x16 b) { return {_mm512_max_ps(a.v, b.v)}; }
EK_INLINE F32x16 where_less(F32x16 a, F32x16 b, F32x16 x, F32x16 y) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), y.v, x.v)};
}
EK_INLINE F32x16 abs(F32x16 a) { return {_mm512_abs_ps(a.v)}; }
EK_INLINE F32x16 copysign(F32x16 a, F32x16 b) {
  // bitwise select (0xca): the sign bit from b, the rest from a
  const __m512i sign = _mm512_set1_epi32(static_cast<int>(0x80000000u));
  return {_mm512_castsi512_ps(
      _mm512_ternarylogic_epi32(sign, _mm512_castps_si512(b.v), _mm512_castps_si512(a.v), 0xca))};
}
EK_INLINE F32x16 bits_to_exponent(F32x16 a) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(a.v), 23))};
}
EK_INLINE float horizontal_max(F32x16 a) { return _mm512_reduce_max_ps(a.v); }
EK_INLINE bool any_nan(F32x16 a) { return _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q) != 0; }

EK_INLINE void load_bf16(const std::uint16_t* p, F32x16& even, F32x16& odd) {
  const __m512i a = _mm512_loadu_si512(p);
  even = {_mm512_castsi512_ps(_mm512_slli_epi32(a, 16))};
  odd = {_mm512_castsi512_ps(_mm512_and_si512(a, _mm512_set1_epi32(static_cast<int>(0xffff0000u))))};
}
EK_INLINE __m512i round_to_bf16(__m512 v) {
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  return _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc00000));
}
EK_INLINE __m512i pack_bf16(F32x16 even, F32x16 odd) {
  const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  return _mm512_ternarylogic_epi32(upper, round_to_bf16(odd.v), _mm512_srli_epi32(round_to_bf16(even.v), 16), 0xca);
}
EK_INLINE void store_bf16(std::uint16_t* p, F32x16 even, F32x16 odd) { _mm512_storeu_si512(p, pack_bf16(even, odd)); }
EK_INLINE void stream_bf16(std::uint16_t* p, F32x16 even, F32x16 odd) {
  _mm512_stream_si512(reinterpret_cast<__m512i*>(p), pack_bf16(even, odd));
}

EK_INLINE F32x16 load_f16(const std::uint16_t* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
EK_INLINE void store_f16(std::uint16_t* p, F32x16 v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v.v, _MM_FROUND_TO_NEAREST_INT));
}
EK_INLINE void stream_f16(std::uint16_t* p, F32x16 v) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v.v, _MM_FROUND_TO_NEAREST_INT));
}

EK_INLINE F32x16 split_exponent(F32x16 d, F32x16 c_hi, F32x16 c_lo, F32x16 magic, F32x16& biased) {
  biased = fma(d, c_hi, magic);
  const F32x16 n = biased - magic;
  return fma(d, c_lo, {_mm512_fmsub_ps(d.v, c_hi.v, n.v)});
}

EK_INLINE void store_fence() { _mm_sfence(); }

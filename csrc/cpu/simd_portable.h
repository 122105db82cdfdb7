// Sixteen floats as four vectors of four, in the vector extensions of GCC and Clang: SSE2 on x86-64, NEON on aarch64,
// plain code elsewhere. See simd_avx2.h for what each function means.

#define EK_INLINE __attribute__((always_inline)) inline

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "load_bf16 takes the even element from the lower half-word");

typedef float F32x4 __attribute__((vector_size(16)));
typedef std::int32_t I32x4 __attribute__((vector_size(16)));
typedef std::uint32_t U32x4 __attribute__((vector_size(16)));

EK_INLINE F32x4 blend4(I32x4 mask, F32x4 x, F32x4 y) { return (F32x4)((mask & (I32x4)x) | (~mask & (I32x4)y)); }

struct F32x16 {
  F32x4 v[4];

  static EK_INLINE F32x16 set1(float value) {
    const F32x4 four = {value, value, value, value};
    return {{four, four, four, four}};
  }
  static EK_INLINE F32x16 load(const float* p) {
    F32x16 r;
    __builtin_memcpy(&r, p, sizeof(r));
    return r;
  }
  EK_INLINE void store(float* p) const { __builtin_memcpy(p, this, sizeof(*this)); }
  EK_INLINE void stream(float* p) const { store(p); }
};

#define EK_LANES(expression) \
  F32x16 r;                  \
  for (int i = 0; i < 4; ++i) r.v[i] = (expression); \
  return r

EK_INLINE F32x16 operator+(F32x16 a, F32x16 b) { EK_LANES(a.v[i] + b.v[i]); }
EK_INLINE F32x16 operator-(F32x16 a, F32x16 b) { EK_LANES(a.v[i] - b.v[i]); }
EK_INLINE F32x16 operator*(F32x16 a, F32x16 b) { EK_LANES(a.v[i] * b.v[i]); }
EK_INLINE F32x16 operator/(F32x16 a, F32x16 b) { EK_LANES(a.v[i] / b.v[i]); }
// Fused where the target has it in hardware; nothing below depends on that.
EK_INLINE F32x4 fma4(F32x4 a, F32x4 b, F32x4 c) {
#if defined(__FP_FAST_FMAF)
  F32x4 r;
  for (int lane = 0; lane < 4; ++lane) r[lane] = __builtin_fmaf(a[lane], b[lane], c[lane]);
  return r;
#else
  return a * b + c;
#endif
}
EK_INLINE F32x16 fma(F32x16 a, F32x16 b, F32x16 c) { EK_LANES(fma4(a.v[i], b.v[i], c.v[i])); }
EK_INLINE F32x16 max_or_second(F32x16 a, F32x16 b) { EK_LANES(blend4(a.v[i] > b.v[i], a.v[i], b.v[i])); }
EK_INLINE F32x16 where_less(F32x16 a, F32x16 b, F32x16 x, F32x16 y) {
  EK_LANES(blend4(a.v[i] < b.v[i], x.v[i], y.v[i]));
}
EK_INLINE F32x4 mask4(F32x4 a, std::uint32_t mask) { return (F32x4)((U32x4)a & mask); }
EK_INLINE F32x16 abs(F32x16 a) { EK_LANES(mask4(a.v[i], 0x7fffffffu)); }
EK_INLINE F32x16 copysign(F32x16 a, F32x16 b) {
  EK_LANES((F32x4)((U32x4)mask4(a.v[i], 0x7fffffffu) | (U32x4)mask4(b.v[i], 0x80000000u)));
}
EK_INLINE F32x16 bits_to_exponent(F32x16 a) { EK_LANES((F32x4)((U32x4)a.v[i] << 23)); }
EK_INLINE float horizontal_max(F32x16 a) {
  const F32x16 b = {{blend4(a.v[0] > a.v[1], a.v[0], a.v[1]), blend4(a.v[2] > a.v[3], a.v[2], a.v[3])}};
  const F32x4 four = blend4(b.v[0] > b.v[1], b.v[0], b.v[1]);
  float top = four[0];
  for (int i = 1; i < 4; ++i) top = four[i] > top ? four[i] : top;
  return top;
}
EK_INLINE bool any_nan(F32x16 a) {
  I32x4 nan = a.v[0] != a.v[0];
  for (int i = 1; i < 4; ++i) nan |= a.v[i] != a.v[i];
  return (nan[0] | nan[1] | nan[2] | nan[3]) != 0;
}

EK_INLINE void load_bf16(const std::uint16_t* p, F32x16& even, F32x16& odd) {
  const F32x16 words = F32x16::load(reinterpret_cast<const float*>(p));
  for (int i = 0; i < 4; ++i) {
    even.v[i] = (F32x4)((U32x4)words.v[i] << 16);
    odd.v[i] = mask4(words.v[i], 0xffff0000u);
  }
}
EK_INLINE U32x4 round_to_bf16(F32x4 v) {
  const U32x4 bits = (U32x4)v;
  const F32x4 rounded = (F32x4)(bits + 0x7fffu + ((bits >> 16) & 1u));
  const U32x4 nan = {0x7fc00000u, 0x7fc00000u, 0x7fc00000u, 0x7fc00000u};
  return (U32x4)blend4(v == v, rounded, (F32x4)nan);
}
EK_INLINE void store_bf16(std::uint16_t* p, F32x16 even, F32x16 odd) {
  F32x16 words;
  for (int i = 0; i < 4; ++i) {
    words.v[i] = (F32x4)((round_to_bf16(even.v[i]) >> 16) | (round_to_bf16(odd.v[i]) & 0xffff0000u));
  }
  words.store(reinterpret_cast<float*>(p));
}
EK_INLINE void stream_bf16(std::uint16_t* p, F32x16 even, F32x16 odd) { store_bf16(p, even, odd); }

EK_INLINE F32x16 load_f16(const std::uint16_t* p) {
  F32x16 r;
  for (int i = 0; i < 4; ++i) {
    const U32x4 half = {p[4 * i], p[4 * i + 1], p[4 * i + 2], p[4 * i + 3]};
    const U32x4 shifted = (half & 0x7fffu) << 13;
    // The exponent is off by 127 - 15; a multiplication corrects it and normalises subnormal halves as well.
    const F32x4 finite = (F32x4)shifted * 0x1p112f;
    const F32x4 special = (F32x4)(shifted | 0x7f800000u);  // infinity, or NaN with its payload
    const F32x4 magnitude = blend4((I32x4)((half & 0x7c00u) == 0x7c00u), special, finite);
    r.v[i] = (F32x4)((U32x4)magnitude | ((half & 0x8000u) << 16));
  }
  return r;
}
EK_INLINE void store_f16(std::uint16_t* p, F32x16 v) {
  for (int i = 0; i < 4; ++i) {
    const U32x4 magnitude = (U32x4)v.v[i] & 0x7fffffffu;
    const U32x4 sign = ((U32x4)v.v[i] >> 16) & 0x8000u;
    // Normal halves: rebias, round to nearest even at bit 13; overflow carries into the exponent and gives infinity.
    const U32x4 normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    // Subnormal halves: adding 1/2 aligns the ulp of the sum with theirs, and the addition rounds.
    const U32x4 subnormal = (U32x4)((F32x4)magnitude + 0.5f) - 0x3f000000u;
    const U32x4 infinity = {0x7c00u, 0x7c00u, 0x7c00u, 0x7c00u};
    const U32x4 nan = {0x7e00u, 0x7e00u, 0x7e00u, 0x7e00u};
    F32x4 half = blend4((I32x4)(magnitude < 0x38800000u), (F32x4)subnormal, (F32x4)normal);
    half = blend4((I32x4)(magnitude >= 0x47800000u), (F32x4)infinity, half);
    half = blend4((I32x4)(magnitude > 0x7f800000u), (F32x4)nan, half);
    const U32x4 bits = (U32x4)half | sign;
    for (int lane = 0; lane < 4; ++lane) p[4 * i + lane] = static_cast<std::uint16_t>(bits[lane]);
  }
}
EK_INLINE void stream_f16(std::uint16_t* p, F32x16 v) { store_f16(p, v); }

// Without a fused multiply-add, d * c_hi would lose |d c| 2^-24 in the exponent. Halves of 12 bits multiply exactly.
EK_INLINE F32x16 split_exponent(F32x16 d, F32x16 c_hi, F32x16 c_lo, F32x16 magic, F32x16& biased) {
  F32x16 r;
  for (int i = 0; i < 4; ++i) {
    const F32x4 d_top = mask4(d.v[i], 0xfffff000u);
    const F32x4 c_top = mask4(c_hi.v[i], 0xfffff000u);
    const F32x4 exact = d_top * c_top;
    const F32x4 rest = d.v[i] * ((c_hi.v[i] - c_top) + c_lo.v[i]) + (d.v[i] - d_top) * c_top;
    biased.v[i] = exact + magic.v[i];
    // |rest| may move the sum past 1/2 by a hair: the polynomial is as good there.
    r.v[i] = (exact - (biased.v[i] - magic.v[i])) + rest;
  }
  return r;
}

EK_INLINE void store_fence() {}

#undef EK_LANES

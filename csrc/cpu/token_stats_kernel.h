// The row kernels of token_stats, once in sixteen lanes for every instruction set.
// token_stats_{avx512,avx2,portable}.cpp include this inside their namespace and under their target options, after
// their simd_*.h: no include guard, and no function here may exist outside that namespace.
//
// Forward: blocks of 8 KB. The first pass over a block takes its maximum and pulls it into the L1 cache, the second
// adds up the exponentials. Only if the block holds a new maximum are the sums rescaled. Sums over a few lines that go to
// compensated totals keep fp32 accurate to 1e-7, also where a row has few different values, whose roundings do not cancel
// out.

// How many lines make a block, and how many floats a block has at most.
constexpr std::int64_t kBlockLines = 128;
constexpr std::int64_t kBlockFloats = 32 * kBlockLines;
// How many terms a lane adds up, by fours, before their sum goes to its total: few roundings where one of them is much
// larger than the rest.
constexpr std::int64_t kGroup = 32;

// A line is 64 bytes: sixteen fp32 in one vector, or 32 halves in two. Positions inside a line may be permuted (sums
// and maxima do not care); store undoes what load does.
struct LineF32 {
  using Element = float;
  static constexpr int kElements = 16, kVectors = 1;
  static constexpr Element kMinusInfinity = -std::numeric_limits<float>::infinity();
  static EK_INLINE void load(const Element* p, F32x16* v) { v[0] = F32x16::load(p); }
  static EK_INLINE void store(Element* p, const F32x16* v) { v[0].store(p); }
  static EK_INLINE void stream(Element* p, const F32x16* v) { v[0].stream(p); }
  // where element j of a line is among the vectors' lanes
  static EK_INLINE int lane(int j) { return j; }
};
struct LineBF16 {
  using Element = std::uint16_t;
  static constexpr int kElements = 32, kVectors = 2;
  static constexpr Element kMinusInfinity = 0xff80;
  static EK_INLINE void load(const Element* p, F32x16* v) { load_bf16(p, v[0], v[1]); }
  static EK_INLINE void store(Element* p, const F32x16* v) { store_bf16(p, v[0], v[1]); }
  static EK_INLINE void stream(Element* p, const F32x16* v) { stream_bf16(p, v[0], v[1]); }
  static EK_INLINE int lane(int j) { return (j & 1) * 16 + (j >> 1); }
};
struct LineF16 {
  using Element = std::uint16_t;
  static constexpr int kElements = 32, kVectors = 2;
  static constexpr Element kMinusInfinity = 0xfc00;
  static EK_INLINE void load(const Element* p, F32x16* v) {
    v[0] = load_f16(p);
    v[1] = load_f16(p + 16);
  }
  static EK_INLINE void store(Element* p, const F32x16* v) {
    store_f16(p, v[0]);
    store_f16(p + 16, v[1]);
  }
  static EK_INLINE void stream(Element* p, const F32x16* v) {
    stream_f16(p, v[0]);
    stream_f16(p + 16, v[1]);
  }
  static EK_INLINE int lane(int j) { return j; }
};

// e^{d / T} for d <= 0: 2^{d c} with c = log2(e) / T, n = round(d c), r = d c - n, 2^n from the exponent bits and 2^r
// from a polynomial (minimax in relative error with 2^0 = 1 exact: 2e-9; 0.94 ulp after rounding). c is kept as two
// floats, since one would be off by up to |d c| 3e-8. Below 2^-126.5 the result is exactly 0, so -inf adds nothing.
struct Exponential {
  F32x16 c_hi, c_lo, magic, floor;

  explicit EK_INLINE Exponential(double temperature) {
    // A tiny T must not make c infinite: 0 * inf is NaN.
    const double c = std::fmin(1.4426950408889634 / temperature, 1e36);
    const float hi = static_cast<float>(c);
    c_hi = F32x16::set1(hi);
    c_lo = F32x16::set1(static_cast<float>(c - hi));
    // Adding 1.5 * 2^23 rounds to an integer in the low mantissa bits; 127 is the bias of the exponent.
    magic = F32x16::set1(0x1.8p23f + 127.0f);
    floor = F32x16::set1(static_cast<float>(-127.0 / c));
  }
  // d no lower than where e^{d/T} is 0 (also for -inf, whose product with 0 would be NaN); NaN stays.
  EK_INLINE F32x16 clamp(F32x16 d) const { return max_or_second(floor, d); }
  // of a clamped d
  EK_INLINE F32x16 operator()(F32x16 d) const {
    F32x16 biased;
    const F32x16 r = split_exponent(d, c_hi, c_lo, magic, biased);
    F32x16 p = fma(F32x16::set1(0x1.41fbbcp-13f), r, F32x16::set1(0x1.5f3e54p-10f));
    p = fma(p, r, F32x16::set1(0x1.3b2d4cp-7f));
    p = fma(p, r, F32x16::set1(0x1.c6aee8p-5f));
    p = fma(p, r, F32x16::set1(0x1.ebfbdcp-3f));
    p = fma(p, r, F32x16::set1(0x1.62e430p-1f));
    p = fma(p, r, F32x16::set1(1.0f));
    return p * bits_to_exponent(biased);
  }
};

// softcap * tanh(z / softcap), and the derivative 1 - tanh² without its cancellation: 4u / (1 + u)² with
// u = e^{-2|z / softcap|}.
struct Softcap {
  Exponential exponential;
  F32x16 cap;

  explicit EK_INLINE Softcap(double softcap)
      : exponential(softcap / 2), cap(F32x16::set1(static_cast<float>(softcap))) {}

  EK_INLINE F32x16 apply(F32x16 z, F32x16* derivative = nullptr) const {
    const F32x16 one = F32x16::set1(1.0f), zero = F32x16::set1(0.0f);
    const F32x16 u = exponential(exponential.clamp(zero - abs(z)));
    const F32x16 inverse = one / (one + u);
    if (derivative != nullptr) *derivative = F32x16::set1(4.0f) * u * (inverse * inverse);
    const F32x16 a = abs(z / cap);
    // (1 - u) cancels near 0: there tanh a = a + a³ P(a²), minimax to 4e-9.
    const F32x16 square = a * a;
    F32x16 p = fma(F32x16::set1(-0.005704986397176981f), square, F32x16::set1(0.02063908614218235f));
    p = fma(p, square, F32x16::set1(-0.05373971536755562f));
    p = fma(p, square, F32x16::set1(0.13331441581249237f));
    p = fma(p, square, F32x16::set1(-0.3333328068256378f));
    const F32x16 near_zero = fma(a * square, p, a);
    return cap * copysign(where_less(a, F32x16::set1(0.625f), near_zero, (one - u) * inverse), z);
  }
};

struct Sums {
  F32x16 s, w, s2, w2;  // w and w2 in units of -d, not of x = d / T

  EK_INLINE Sums() : s(F32x16::set1(0.0f)), w(s), s2(s), w2(s) {}
};

// Kahan's: `excess` is what the additions so far have put into the total beyond what they should have.
EK_INLINE void add_compensated(F32x16 term, F32x16& total, F32x16& excess) {
  const F32x16 corrected = term - excess, next = total + corrected;
  excess = (next - total) - corrected;
  total = next;
}

// `count` elements from p on, padded with -inf to a whole line.
template <class Line>
EK_INLINE void pad_line(const typename Line::Element* p, std::int64_t count, typename Line::Element* line) {
  for (int j = 0; j < Line::kElements; ++j) line[j] = j < count ? p[j] : Line::kMinusInfinity;
}

template <class Line>
EK_INLINE F32x16 maximum(const typename Line::Element* p, std::int64_t lines, F32x16 top) {
  for (std::int64_t i = 0; i < lines; ++i) {
    F32x16 z[Line::kVectors];
    Line::load(p + i * Line::kElements, z);
    for (int k = 0; k < Line::kVectors; ++k) top = max_or_second(z[k], top);  // NaN is left to the second pass
  }
  return top;
}

template <class Line>
EK_INLINE bool has_nan(const typename Line::Element* p, std::int64_t lines) {
  for (std::int64_t i = 0; i < lines; ++i) {
    F32x16 z[Line::kVectors];
    Line::load(p + i * Line::kElements, z);
    for (int k = 0; k < Line::kVectors; ++k) {
      if (any_nan(z[k])) return true;
    }
  }
  return false;
}

template <class Line, bool kSecondMoments>
EK_INLINE void add_exponentials(const typename Line::Element* p, std::int64_t lines, float m,
                                const Exponential& exponential, std::int64_t prefetch_distance, Sums& total,
                                Sums& excess) {
  const F32x16 top = F32x16::set1(m);
  constexpr std::int64_t kLines = kGroup / Line::kVectors, kFour = 4 / Line::kVectors;
  for (std::int64_t begin = 0; begin < lines; begin += kLines) {
    const std::int64_t end = begin + kLines < lines ? begin + kLines : lines;
    Sums sums;
    const auto add = [&]<int kCount>(const typename Line::Element* line, std::integral_constant<int, kCount>) {
      F32x16 z[kCount], d[kCount], e[kCount];
      for (int k = 0; k < kCount; k += Line::kVectors) {
        Line::load(line + k / Line::kVectors * Line::kElements, z + k);
        __builtin_prefetch(line + k / Line::kVectors * Line::kElements + prefetch_distance);
      }
      for (int k = 0; k < kCount; ++k) {
        d[k] = exponential.clamp(z[k] - top);
        e[k] = exponential(d[k]);
      }
      const auto add_up = [&](const F32x16* f, F32x16& s, F32x16& w) {
        F32x16 sum = f[0], moment = d[0] * f[0];
        if constexpr (kCount >= 2) {
          sum = sum + f[1];
          moment = fma(d[1], f[1], moment);
        }
        if constexpr (kCount == 4) {
          sum = sum + (f[2] + f[3]);
          moment = moment + fma(d[3], f[3], d[2] * f[2]);
        }
        s = s + sum;
        w = w + moment;
      };
      add_up(e, sums.s, sums.w);
      if constexpr (kSecondMoments) {
        for (int k = 0; k < kCount; ++k) e[k] = e[k] * e[k];
        add_up(e, sums.s2, sums.w2);
      }
    };
    std::int64_t i = begin;
    for (; i + kFour <= end; i += kFour) add(p + i * Line::kElements, std::integral_constant<int, 4>());
    for (; i < end; ++i) add(p + i * Line::kElements, std::integral_constant<int, Line::kVectors>());
    add_compensated(sums.s, total.s, excess.s);
    add_compensated(sums.w, total.w, excess.w);
    if constexpr (kSecondMoments) {
      add_compensated(sums.s2, total.s2, excess.s2);
      add_compensated(sums.w2, total.w2, excess.w2);
    }
  }
}

EK_INLINE double horizontal_sum(F32x16 v) {
  float lanes[16];
  v.store(lanes);
  double sums[4] = {};
  for (int i = 0; i < 16; ++i) sums[i % 4] += static_cast<double>(lanes[i]);
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// The running state of a row: its maximum and sixteen lanes of each sum.
template <bool kSecondMoments>
struct Accumulator {
  Exponential exponential;
  double temperature;
  float m = -std::numeric_limits<float>::infinity();
  Sums total, excess;

  explicit EK_INLINE Accumulator(double t) : exponential(t), temperature(t) {}

  EK_INLINE void raise_maximum(float top) {
    if (m != -std::numeric_limits<float>::infinity()) {  // else every sum is 0
      const double distance = static_cast<double>(top) - m;
      const float scale = static_cast<float>(std::exp(-distance / temperature));
      const F32x16 factor = F32x16::set1(scale);
      // where the factor underflows, the distance may be infinite in fp32, and 0 * inf is NaN
      const F32x16 shift = F32x16::set1(scale == 0.0f ? 0.0f : static_cast<float>(-distance));
      total.w = factor * fma(shift, total.s, total.w);
      total.s = factor * total.s;
      if constexpr (kSecondMoments) {
        total.w2 = factor * (factor * fma(shift, total.s2, total.w2));
        total.s2 = factor * (factor * total.s2);
      }
      excess = Sums();
    }
    m = top;
  }

  // A block in the cache: whole lines from p on, then at most one padded line.
  template <class Line>
  EK_INLINE void add_block(const typename Line::Element* p, std::int64_t lines, const typename Line::Element* tail,
                           std::int64_t prefetch_distance) {
    F32x16 tops = maximum<Line>(p, lines, F32x16::set1(-std::numeric_limits<float>::infinity()));
    if (tail != nullptr) tops = maximum<Line>(tail, 1, tops);
    const float top = horizontal_max(tops);
    if (top > m) raise_maximum(top);
    if (m == -std::numeric_limits<float>::infinity()) {
      // Nothing but -inf so far: adds 0 (z - m would be NaN), unless there was a NaN, which maxima do not show.
      if (has_nan<Line>(p, lines) || (tail != nullptr && has_nan<Line>(tail, 1))) {
        total.s = F32x16::set1(std::numeric_limits<float>::quiet_NaN());
      }
      return;
    }
    add_exponentials<Line, kSecondMoments>(p, lines, m, exponential, prefetch_distance, total, excess);
    if (tail != nullptr) add_exponentials<Line, kSecondMoments>(tail, 1, m, exponential, 0, total, excess);
  }

  EK_INLINE SoftmaxState<double> state() const {
    SoftmaxState<double> state = SoftmaxState<double>::identity();
    state.m = m;
    state.s = horizontal_sum(total.s);
    state.w = 0.0 - horizontal_sum(total.w) / temperature;
    if constexpr (kSecondMoments) {
      state.s2 = horizontal_sum(total.s2);
      state.w2 = 0.0 - horizontal_sum(total.w2) / temperature;
    }
    // The maximum skips NaN; +inf stays visible.
    if (state.s != state.s && !(state.m == std::numeric_limits<double>::infinity())) state.m = state.s;
    return state;
  }
};

// Columns of a strided row, made contiguous.
template <class Element>
EK_INLINE void gather(const Element* p, std::int64_t stride, std::int64_t count, Element* out) {
  for (std::int64_t j = 0; j < count; ++j) out[j] = p[j * stride];
}

template <class Line, bool kSecondMoments>
SoftmaxState<double> accumulate_row(const Row& row, double temperature, double softcap) {
  using Element = typename Line::Element;
  constexpr std::int64_t kBlock = kBlockLines * Line::kElements;
  Accumulator<kSecondMoments> accumulator(temperature);
  alignas(64) Element tail[Line::kElements];
  alignas(64) Element gathered[kBlock];
  alignas(64) float staged[kBlockFloats + 32];
  const Softcap cap(softcap > 0 ? softcap : 1.0);
  for (std::int64_t begin = 0; begin < row.columns; begin += kBlock) {
    const std::int64_t count = row.columns - begin < kBlock ? row.columns - begin : kBlock;
    const Element* p = static_cast<const Element*>(row.data) + begin * row.stride;
    if (row.stride != 1) {
      gather(p, row.stride, count, gathered);
      p = gathered;
    }
    std::int64_t lines = count / Line::kElements;
    const int rest = static_cast<int>(count % Line::kElements);
    if (rest != 0) pad_line<Line>(p + lines * Line::kElements, rest, tail);
    if (softcap > 0) {
      for (std::int64_t i = 0; i < lines + (rest != 0); ++i) {
        F32x16 z[Line::kVectors];
        Line::load(i < lines ? p + i * Line::kElements : tail, z);
        for (int k = 0; k < Line::kVectors; ++k) cap.apply(z[k]).store(staged + (i * Line::kVectors + k) * 16);
      }
      // A capped -inf is -softcap; the padding must stay -inf.
      for (int j = rest; rest != 0 && j < Line::kElements; ++j) {
        staged[lines * Line::kElements + Line::lane(j)] = LineF32::kMinusInfinity;
      }
      accumulator.template add_block<LineF32>(staged, (lines + (rest != 0)) * Line::kVectors, nullptr, 0);
    } else {
      // The second pass fetches the next block while it computes; past the row's end that is the next row.
      accumulator.template add_block<Line>(p, lines, rest != 0 ? tail : nullptr, row.stride == 1 ? kBlock : 0);
    }
  }
  return accumulator.state();
}

template <class Line>
SoftmaxState<double> accumulate(const Row& row, double temperature, double softcap, bool second_moments) {
  return second_moments ? accumulate_row<Line, true>(row, temperature, softcap)
                        : accumulate_row<Line, false>(row, temperature, softcap);
}

double capped(double logit, double softcap) {
  float lanes[16];
  Softcap(softcap).apply(F32x16::set1(static_cast<float>(logit))).store(lanes);
  return static_cast<double>(lanes[0]);
}

// The gradient of one line; the branches are on compile-time constants.
template <bool kCollision, bool kSoftcap>
struct LineGradient {
  Exponential exponential;
  Softcap cap;
  F32x16 m, inverse_temperature, constant, linear, quadratic;

  explicit EK_INLINE LineGradient(const RowGradient& g)
      : exponential(g.temperature),
        cap(kSoftcap ? g.softcap : 1.0),
        m(F32x16::set1(static_cast<float>(g.m))),
        inverse_temperature(F32x16::set1(static_cast<float>(1.0 / g.temperature))),
        constant(F32x16::set1(static_cast<float>(g.coefficients.constant))),
        linear(F32x16::set1(static_cast<float>(g.coefficients.linear))),
        quadratic(F32x16::set1(static_cast<float>(g.coefficients.quadratic))) {}

  EK_INLINE F32x16 operator()(F32x16 z) const {
    F32x16 derivative;
    if constexpr (kSoftcap) z = cap.apply(z, &derivative);
    const F32x16 d = exponential.clamp(z - m);
    const F32x16 e = exponential(d);
    // x = d / T is bounded, linear / T need not be: T may be tiny
    F32x16 factor = fma(linear, d * inverse_temperature, constant);
    if constexpr (kCollision) factor = fma(quadratic, e, factor);
    if constexpr (kSoftcap) factor = factor * derivative;
    return e * factor;
  }
};

template <class Line, class Gradient>
EK_INLINE void partial_line(const Gradient& line_gradient, const typename Line::Element* in, std::int64_t count,
                            typename Line::Element* out) {
  alignas(64) typename Line::Element line[Line::kElements];
  F32x16 z[Line::kVectors];
  pad_line<Line>(in, count, line);
  Line::load(line, z);
  for (int k = 0; k < Line::kVectors; ++k) z[k] = line_gradient(z[k]);
  Line::store(line, z);
  for (std::int64_t j = 0; j < count; ++j) out[j] = line[j];
}

template <class Line, bool kCollision, bool kSoftcap>
void gradient_row(const Row& row, const RowGradient& g) {
  using Element = typename Line::Element;
  constexpr std::int64_t kBlock = kBlockLines * Line::kElements;
  const LineGradient<kCollision, kSoftcap> line_gradient(g);
  alignas(64) Element block_in[kBlock];
  alignas(64) Element block_out[kBlock];
  const bool strided = row.stride != 1 || g.stride != 1;
  const std::int64_t step = strided ? kBlock : row.columns;
  for (std::int64_t begin = 0; begin < row.columns; begin += step) {
    std::int64_t count = row.columns - begin < step ? row.columns - begin : step;
    const Element* in = static_cast<const Element*>(row.data) + begin * row.stride;
    Element* out = static_cast<Element*>(g.data) + begin * g.stride;
    if (strided) {
      gather(in, row.stride, count, block_in);
      in = block_in;
      out = block_out;
    }
    if (g.streaming && !strided) {
      // Streaming stores want whole, aligned lines.
      const std::int64_t misaligned = (reinterpret_cast<std::uintptr_t>(out) & 63) / sizeof(Element);
      std::int64_t head = misaligned == 0 ? 0 : Line::kElements - misaligned;
      if (head > count) head = count;
      partial_line<Line>(line_gradient, in, head, out);
      in += head;
      out += head;
      count -= head;
    }
    const std::int64_t lines = count / Line::kElements;
    for (std::int64_t i = 0; i < lines; ++i) {
      F32x16 z[Line::kVectors];
      Line::load(in + i * Line::kElements, z);
      __builtin_prefetch(in + i * Line::kElements + kBlock);
      for (int k = 0; k < Line::kVectors; ++k) z[k] = line_gradient(z[k]);
      if (g.streaming && !strided) {
        Line::stream(out + i * Line::kElements, z);
      } else {
        Line::store(out + i * Line::kElements, z);
      }
    }
    const std::int64_t done = lines * Line::kElements;
    if (done < count) partial_line<Line>(line_gradient, in + done, count - done, out + done);
    if (strided) {
      Element* scattered = static_cast<Element*>(g.data) + begin * g.stride;
      for (std::int64_t j = 0; j < count; ++j) scattered[j * g.stride] = block_out[j];
    }
  }
  if (g.streaming) store_fence();
}

template <class Line>
void gradient(const Row& row, const RowGradient& g) {
  const bool collision = g.coefficients.quadratic != 0;  // true for NaN
  if (g.softcap > 0) {
    collision ? gradient_row<Line, true, true>(row, g) : gradient_row<Line, false, true>(row, g);
  } else {
    collision ? gradient_row<Line, true, false>(row, g) : gradient_row<Line, false, false>(row, g);
  }
}

const RowKernels& row_kernels_of(Element element) {
  static constexpr RowKernels kFloat32 = {accumulate<LineF32>, capped, gradient<LineF32>};
  static constexpr RowKernels kBFloat16 = {accumulate<LineBF16>, capped, gradient<LineBF16>};
  static constexpr RowKernels kFloat16 = {accumulate<LineF16>, capped, gradient<LineF16>};
  return element == Element::kBFloat16 ? kBFloat16 : element == Element::kFloat16 ? kFloat16 : kFloat32;
}

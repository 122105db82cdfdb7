// What a thread does with the logits that it holds, and how threads merge. Host + device, for one thread at a time.
#pragma once

#include <cmath>

#include "element.h"

namespace entropy_kernels::cuda {

template <typename T>
inline constexpr T kLn2 = T(0.693147180559945309417232121458);
template <typename T>
inline constexpr T kLog2E = T(1.44269504088896340735992468100);
// 2^t is exactly 0 from here on down; a finite floor, so that 0 * t is 0 also for a logit of -inf.
template <typename T>
inline constexpr T kLowestExponent = sizeof(T) == 8 ? T(-1080) : T(-150);

EK_HOST_DEVICE float exp2_of(float t) {
#if defined(__CUDA_ARCH__)
  float e;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(t));  // 2 ulp, one instruction
  return e;
#elif defined(EK_EMULATED_EXP2)  // with the errors of that instruction, for tests
  return EK_EMULATED_EXP2(t);
#else
  return std::exp2(t);
#endif
}
EK_HOST_DEVICE double exp2_of(double t) { return std::exp2(t); }

EK_HOST_DEVICE float larger_or_nan(float a, float b) {
#if defined(__CUDA_ARCH__)
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
#else
  return max_or_nan(a, b);
#endif
}
EK_HOST_DEVICE double larger_or_nan(double a, double b) { return max_or_nan(a, b); }

// (z - m) / T in bits: log2 e / T, where an infinite one would make NaN of 0 * inf.
template <typename T>
EK_HOST_DEVICE T bits_per_logit(T temperature) {
  return std::fmin(kLog2E<T> / temperature, T(1e36));
}

// Distance of z from the maximum in bits, no lower than where its exponential is 0. NaN stays.
template <typename T>
EK_HOST_DEVICE T exponent(T z, T m, T bits) {
  return larger_or_nan((z - m) * bits, kLowestExponent<T>);
}

template <typename T>
struct Softcap {
  T cap, inverse;

  explicit EK_HOST_DEVICE Softcap(T softcap) : cap(softcap), inverse(T(1) / softcap) {}

  EK_HOST_DEVICE T operator()(T z) const { return cap * std::tanh(z * inverse); }
  // 1 - tanh², without its cancellation: 4u / (1 + u)², u = e^{-2|z| / softcap}.
  EK_HOST_DEVICE T derivative(T z) const {
    const T u = exp2_of(-2 * kLog2E<T> * std::fabs(z * inverse));
    return 4 * u / ((1 + u) * (1 + u));
  }
};

// A product up to here is off by half a bit at most, and the exponents that contain it are too.
template <typename T>
inline constexpr T kFoldable = sizeof(T) == 8 ? T(1LL << 40) : T(1 << 22);

// The running state of one thread. Until `state` restates them, w and w2 are in bits, and exponents count from `scaled`,
// the rounded m * bits, which lets one multiply-add yield one: t = z * bits - scaled. Sums of a tile are added among
// themselves first, so that no term is lost in a long row.
template <typename T, bool kSecondMoments>
struct Lane {
  SoftmaxState<T> running = SoftmaxState<T>::identity();
  T bits;
  T base = 0;            // what is subtracted from a logit: m, once there is a finite one
  T scaled = 0;          // base * bits, rounded; NaN where that is too large to be subtracted
  T offset = 0;          // base * bits - scaled, exactly: the exponent of the maximum
  bool careful = false;  // a tile of this row held -inf or NaN, or the exponents need the difference of logits

  explicit EK_HOST_DEVICE Lane(T temperature) : bits(bits_per_logit(temperature)) {}

  struct Sums {
    T s = 0, w = 0, s2 = 0, w2 = 0;

    // Careless of -inf, which makes w NaN.
    EK_HOST_DEVICE void add(T z, const Lane& lane) { add_power(std::fma(z, lane.bits, -lane.scaled)); }
    EK_HOST_DEVICE void add_carefully(T z, const Lane& lane) {
      add_power(exponent(z, lane.base, lane.bits) + lane.offset);
    }

   private:
    EK_HOST_DEVICE void add_power(T t) {
      const T e = exp2_of(t);
      s += e;
      w = std::fma(-t, e, w);
      if constexpr (kSecondMoments) {
        const T square = e * e;
        s2 += square;
        w2 = std::fma(-t, square, w2);
      }
    }
  };

  // To be called with the largest of some logits before they are added; it may have skipped NaN among them.
  EK_HOST_DEVICE void raise(T top) {
    if (!(top > running.m)) return;
    const T before = offset;
    count_from(top);
    const T delta = (top - running.m) * bits + (before - offset);  // inf for the first one: the sums are 0, or NaN
    rescale(running, delta, exp2_of(-delta));
    if constexpr (!kSecondMoments) running.s2 = running.w2 = 0;
    running.m = top;
  }

  // Goes on with the running state of another lane of the same row.
  EK_HOST_DEVICE void resume(const SoftmaxState<T>& other) {
    running = other;
    base = scaled = offset = 0;
    if (other.m > -kInfinity<T>) count_from(other.m);
  }

  EK_HOST_DEVICE void add(const Sums& sums) {
    running.s += sums.s;
    running.w += sums.w;
    if constexpr (kSecondMoments) {
      running.s2 += sums.s2;
      running.w2 += sums.w2;
    }
  }

  EK_HOST_DEVICE SoftmaxState<T> state() const {
    // Divided by what the maximum has added: where there is nothing else, s is exactly 1 and w exactly 0.
    const T unit = exp2_of(offset);
    SoftmaxState<T> state = running;
    state.w = larger_or_nan(running.w + offset * running.s, T(0)) / unit * kLn2<T>;  // rounding may leave less than 0
    state.s = running.s / unit;
    if constexpr (kSecondMoments) {
      state.w2 = larger_or_nan(running.w2 + offset * running.s2, T(0)) / (unit * unit) * kLn2<T>;
      state.s2 = running.s2 / (unit * unit);
    }
    return state;
  }

 private:
  EK_HOST_DEVICE void count_from(T m) {
    base = m;
    scaled = m * bits;
    offset = std::fma(m, bits, -scaled);
    if (!(std::fabs(scaled) < kFoldable<T>)) {
      scaled = kNaN<T>;
      offset = 0;
    }
  }
};

// The gradient of one logit, from GradientCoefficients.
template <typename T>
struct LogitGradient {
  T m, bits, constant, linear, quadratic;  // linear per bit
  T own;                                   // the target's own term
  Softcap<T> softcap;

  EK_HOST_DEVICE LogitGradient(const SoftmaxState<T>& state, T temperature, T softcap_, const TokenStats<T>& grads)
      : m(state.m), bits(bits_per_logit(temperature)), own(grads[kLogprob] / temperature), softcap(softcap_) {
    const GradientCoefficients<T> c = gradient_coefficients(state, temperature, grads);
    // the forward pass said NaN of such a row, however finite its sums are
    constant = temperature > 0 ? c.constant : kNaN<T>;
    linear = c.linear * kLn2<T>;
    quadratic = c.quadratic;
  }

  // One that is not the target's.
  template <bool kSoftcap>
  EK_HOST_DEVICE T at(T z) const {
    return sum<kSoftcap>(z, 0);
  }
  // The target's: both terms are added before the one rounding.
  template <bool kSoftcap>
  EK_HOST_DEVICE T at_target(T z) const {
    return sum<kSoftcap>(z, own);
  }

 private:
  template <bool kSoftcap>
  EK_HOST_DEVICE T sum(T z, T own_term) const {
    const T t = exponent(kSoftcap ? softcap(z) : z, m, bits);
    const T e = exp2_of(t);
    const T dz = std::fma(e, std::fma(quadratic, e, std::fma(linear, t, constant)), own_term);
    return kSoftcap ? dz * softcap.derivative(z) : dz;
  }
};

}  // namespace entropy_kernels::cuda

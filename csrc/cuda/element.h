// Dtypes of logits, 16 bytes at a time. Host + device; on the host bit for bit what the device does.
#pragma once

#include <cstdint>
#include <cstring>

#include "../common/element.h"
#include "../common/host_device.h"
#include "../common/softmax_state.h"

namespace entropy_kernels::cuda {

constexpr int element_size(Element element) {
  return element == Element::kFloat64 ? 8 : element == Element::kFloat32 ? 4 : 2;
}

// What one load or store moves.
struct alignas(16) Words {
  std::uint32_t word[4];
};

template <typename To, typename From>
EK_HOST_DEVICE To bits_as(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To result;
  memcpy(&result, &value, sizeof(To));
  return result;
}

EK_HOST_DEVICE float larger(float a, float b) { return std::fmax(a, b); }  // the other one if one is NaN
EK_HOST_DEVICE double larger(double a, double b) { return std::fmax(a, b); }

// Two 16-bit logits share a word; Half says how one converts and compares.
template <class Half>
struct Pairs {
  using Storage = std::uint16_t;
  using Accumulator = float;
  static constexpr int kPerVector = 8;

  static EK_HOST_DEVICE Words minus_infinity() {
    return {{Half::kMinusInfinity, Half::kMinusInfinity, Half::kMinusInfinity, Half::kMinusInfinity}};
  }
  static EK_HOST_DEVICE void unpack(const Words& words, float (&z)[8]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) Half::widen(words.word[i], z[2 * i], z[2 * i + 1]);
  }
  static EK_HOST_DEVICE Words pack(const float (&z)[8]) {
    Words words;
#pragma unroll
    for (int i = 0; i < 4; ++i) words.word[i] = Half::round(z[2 * i], z[2 * i + 1]);
    return words;
  }
  static EK_HOST_DEVICE float widen(Storage z) {
    float low, high;
    Half::widen(z, low, high);
    return low;
  }
  static EK_HOST_DEVICE Storage round(float z) { return static_cast<Storage>(Half::round(z, 0.0f)); }
  // The largest logit, which 16 bits hold exactly: two comparisons for the price of one. NaN is skipped.
  template <int kVectors>
  static EK_HOST_DEVICE float top(const Words (&words)[kVectors]) {
    std::uint32_t pair = words[0].word[0];
#pragma unroll
    for (int i = 1; i < 4 * kVectors; ++i) pair = Half::larger(pair, words[i / 4].word[i % 4]);
    float low, high;
    Half::widen(pair, low, high);
    return larger(low, high);
  }
};

// The larger of each half of two pairs, where there is no instruction for it.
template <class Pair>
EK_HOST_DEVICE std::uint32_t larger_by_halves(std::uint32_t a, std::uint32_t b) {
  float a_low, a_high, b_low, b_high;
  Pair::widen(a, a_low, a_high);
  Pair::widen(b, b_low, b_high);
  return Pair::round(larger(a_low, b_low), larger(a_high, b_high));
}

struct BFloat16Pair {
  static constexpr std::uint32_t kMinusInfinity = 0xff80ff80u;
  static EK_HOST_DEVICE void widen(std::uint32_t pair, float& low, float& high) {
    low = bits_as<float>(pair << 16);
    high = bits_as<float>(pair & 0xffff0000u);
  }
  static EK_HOST_DEVICE std::uint32_t round(float low, float high) {
#if defined(__CUDA_ARCH__)
    std::uint32_t pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
#else
    const auto nearest_even = [](float z) -> std::uint32_t {
      const std::uint32_t bits = bits_as<std::uint32_t>(z);
      return is_nan(z) ? 0x7fffu : (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    };
    return nearest_even(low) | nearest_even(high) << 16;
#endif
  }
  static EK_HOST_DEVICE std::uint32_t larger(std::uint32_t a, std::uint32_t b) {
#if defined(__CUDA_ARCH__)
    std::uint32_t pair;
    asm("max.bf16x2 %0, %1, %2;" : "=r"(pair) : "r"(a), "r"(b));
    return pair;
#else
    return larger_by_halves<BFloat16Pair>(a, b);
#endif
  }
};

#if defined(__CUDACC__) || defined(__FLT16_MANT_DIG__)  // the host compiler may lack the type
struct Float16Pair {
  static constexpr std::uint32_t kMinusInfinity = 0xfc00fc00u;
  static EK_HOST_DEVICE void widen(std::uint32_t pair, float& low, float& high) {
#if defined(__CUDA_ARCH__)
    asm("{ .reg .b16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h; }"
        : "=f"(low), "=f"(high)
        : "r"(pair));
#else
    low = static_cast<float>(bits_as<_Float16>(static_cast<std::uint16_t>(pair)));
    high = static_cast<float>(bits_as<_Float16>(static_cast<std::uint16_t>(pair >> 16)));
#endif
  }
  static EK_HOST_DEVICE std::uint32_t round(float low, float high) {
#if defined(__CUDA_ARCH__)
    std::uint32_t pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
#else
    return bits_as<std::uint16_t>(static_cast<_Float16>(low)) |
           static_cast<std::uint32_t>(bits_as<std::uint16_t>(static_cast<_Float16>(high))) << 16;
#endif
  }
  static EK_HOST_DEVICE std::uint32_t larger(std::uint32_t a, std::uint32_t b) {
#if defined(__CUDA_ARCH__)
    std::uint32_t pair;
    asm("max.f16x2 %0, %1, %2;" : "=r"(pair) : "r"(a), "r"(b));
    return pair;
#else
    return larger_by_halves<Float16Pair>(a, b);
#endif
  }
};
#endif

template <typename T>
struct Wide {  // logits of the accumulator's own type
  using Storage = T;
  using Accumulator = T;
  static constexpr int kPerVector = 16 / sizeof(T);

  static EK_HOST_DEVICE Words minus_infinity() {
    T z[kPerVector];
#pragma unroll
    for (int i = 0; i < kPerVector; ++i) z[i] = -kInfinity<T>;
    return pack(z);
  }
  static EK_HOST_DEVICE void unpack(const Words& words, T (&z)[kPerVector]) { memcpy(z, &words, sizeof(words)); }
  static EK_HOST_DEVICE Words pack(const T (&z)[kPerVector]) {
    Words words;
    memcpy(&words, z, sizeof(words));
    return words;
  }
  static EK_HOST_DEVICE T widen(T z) { return z; }
  static EK_HOST_DEVICE T round(T z) { return z; }
  template <int kVectors>
  static EK_HOST_DEVICE T top(const Words (&words)[kVectors]) {
    T result = -kInfinity<T>;
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
      T z[kPerVector];
      unpack(words[k], z);
#pragma unroll
      for (int i = 0; i < kPerVector; ++i) result = larger(result, z[i]);
    }
    return result;
  }
};

using BFloat16 = Pairs<BFloat16Pair>;
#if defined(__CUDACC__) || defined(__FLT16_MANT_DIG__)
using Float16 = Pairs<Float16Pair>;
#endif
using Float32 = Wide<float>;
using Float64 = Wide<double>;

}  // namespace entropy_kernels::cuda

// Which instruction set the CPU kernels use: the best that this CPU has, unless ENTROPY_KERNELS_CPU_CAPABILITY names
// another. The variable is read at every call, so one process can compare them. Header-only and torch-free.
#pragma once

#include <cstdlib>
#include <stdexcept>
#include <string>
#include <string_view>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace entropy_kernels::cpu {

enum class Capability { kDefault = 0, kAvx2 = 1, kAvx512 = 2 };

inline constexpr const char* kCapabilityNames[] = {"default", "avx2", "avx512"};
inline constexpr const char* kCapabilityVariable = "ENTROPY_KERNELS_CPU_CAPABILITY";

inline const char* capability_name(Capability capability) { return kCapabilityNames[static_cast<int>(capability)]; }

inline Capability detect_capability() {
#if defined(__x86_64__)
  // __builtin_cpu_supports also asks whether the operating system saves the registers.
  __builtin_cpu_init();
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  const bool f16c = __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C);
  if (!f16c || !__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return Capability::kDefault;
  return __builtin_cpu_supports("avx512f") ? Capability::kAvx512 : Capability::kAvx2;
#else
  return Capability::kDefault;
#endif
}

inline Capability detected_capability() {
  static const Capability detected = detect_capability();
  return detected;
}

// Throws std::runtime_error if the variable names no instruction set, or one that this CPU lacks.
inline Capability selected_capability() {
  const Capability detected = detected_capability();
  const char* forced = std::getenv(kCapabilityVariable);
  if (forced == nullptr || *forced == '\0') return detected;
  for (int i = 0; i <= static_cast<int>(detected); ++i) {
    if (std::string_view(forced) == kCapabilityNames[i]) return static_cast<Capability>(i);
  }
  std::string message = std::string(kCapabilityVariable) + ": expected one of";
  for (int i = 0; i <= static_cast<int>(detected); ++i) message += std::string(i ? ", " : " ") + kCapabilityNames[i];
  throw std::runtime_error(message + " (what this CPU has), got " + forced);
}

}  // namespace entropy_kernels::cpu

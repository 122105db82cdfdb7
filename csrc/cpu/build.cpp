// What Python asks of _ops.so beside its operators, through ctypes: no symbol of Python's, so that one binary serves
// every version. backends/native.py reads the answers, which live until the thread's next call.
#include <exception>
#include <string>

#include "cpu/capability.h"

#define EK_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

thread_local std::string answer;

}  // namespace

// "compiler\tC++ standard"
EK_EXPORT const char* entropy_kernels_cpu_build() {
  answer = std::string(__VERSION__) + '\t' + std::to_string(__cplusplus);
  return answer.c_str();
}

// "selected\tall that this CPU has, the best last", or "\twhat is wrong with the variable that selects".
EK_EXPORT const char* entropy_kernels_cpu_capability() {
  using namespace entropy_kernels::cpu;
  try {
    answer = capability_name(selected_capability());
    for (int i = 0; i <= static_cast<int>(detected_capability()); ++i) answer += '\t' + std::string(kCapabilityNames[i]);
  } catch (const std::exception& error) {
    answer = '\t' + std::string(error.what());
  }
  return answer.c_str();
}

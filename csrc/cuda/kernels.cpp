#include "cuda/kernels.h"

#include <exception>
#include <string>

#include "cuda/launch.h"
#include "cuda/selection.h"
#include "cuda/switches.h"

// For Python, through ctypes.
#define EK_EXPORT extern "C" __attribute__((visibility("default")))

namespace entropy_kernels::cuda {
namespace {

// The text that `write` returns, or what went wrong.
template <class Write>
const char* report(const Write& write) {
  static thread_local std::string text;
  try {
    text = write();
  } catch (const std::exception& error) {
    text = error.what();
  }
  return text.c_str();
}

}  // namespace

// A line per kernel of name, registers, static shared memory, local memory and PTX version as the current device has
// them, separated by tabs.
EK_EXPORT const char* entropy_kernels_cuda_kernels() {
  return report([] {
    std::string text;
    for (const auto& kernels :
         {forward_kernels(), backward_kernels(), selection_kernels(), selection_step_kernels(), budget_kernels()}) {
      for (const Kernel& kernel : kernels) {
        cudaFuncAttributes a;
        check(cudaFuncGetAttributes(&a, kernel.function), "cudaFuncGetAttributes");
        text += kernel.name;
        for (const long value : {long(a.numRegs), long(a.sharedSizeBytes), long(a.localSizeBytes), long(a.ptxVersion)}) {
          text += "\t" + std::to_string(value);
        }
        text += "\n";
      }
    }
    return text;
  });
}

// Blocks of the largest cluster that the current device grants the covariance kernel, 0 where it has none.
EK_EXPORT const char* entropy_kernels_cuda_largest_cluster() {
  return report([] { return std::to_string(largest_covariance_cluster(current_device())); });
}

// See set_switch.
EK_EXPORT std::int64_t entropy_kernels_cuda_switch(const char* name, std::int64_t value) {
  return set_switch(name, value);
}

}  // namespace entropy_kernels::cuda

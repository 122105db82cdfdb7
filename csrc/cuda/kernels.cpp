#include "cuda/kernels.h"

#include <exception>
#include <string>

#include "cuda/launch.h"

namespace entropy_kernels::cuda {

// For Python, through ctypes: a line per kernel of name, registers, static shared memory, local memory and PTX version as
// the current device has them, separated by tabs; or one line that says what went wrong.
extern "C" __attribute__((visibility("default"))) const char* entropy_kernels_cuda_kernels() {
  static thread_local std::string report;
  report.clear();
  try {
    for (const auto& kernels : {forward_kernels(), backward_kernels(), selection_kernels(), selection_step_kernels(),
                                policy_loss_kernels()}) {
      for (const Kernel& kernel : kernels) {
        cudaFuncAttributes a;
        check(cudaFuncGetAttributes(&a, kernel.function), "cudaFuncGetAttributes");
        report += kernel.name;
        for (const long value : {long(a.numRegs), long(a.sharedSizeBytes), long(a.localSizeBytes), long(a.ptxVersion)}) {
          report += "\t" + std::to_string(value);
        }
        report += "\n";
      }
    }
  } catch (const std::exception& error) {
    report = error.what();
  }
  return report.c_str();
}

}  // namespace entropy_kernels::cuda

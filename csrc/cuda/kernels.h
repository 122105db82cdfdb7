// Every compiled kernel and a name for it; each .cu lists its own.
#pragma once

#include <string>
#include <vector>

namespace entropy_kernels::cuda {

struct Kernel {
  std::string name;
  const void* function;
};

std::vector<Kernel> forward_kernels();
std::vector<Kernel> backward_kernels();
std::vector<Kernel> selection_kernels();
std::vector<Kernel> selection_step_kernels();
std::vector<Kernel> budget_kernels();

}  // namespace entropy_kernels::cuda

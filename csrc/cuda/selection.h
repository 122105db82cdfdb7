// What the selection operators hand to their kernels, free of torch.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "cuda/covariance_kernels.h"
#include "cuda/selection_kernels.h"

namespace entropy_kernels::cuda {

// How a batch is spread over blocks that work together.
struct TeamPlan {
  bool cluster;  // else a cooperative launch, and the kernel needs the exchange (and the keys) in global memory
  int blocks;
  int chunk;  // tokens per block
  std::size_t shared_bytes;  // dynamic, per block

  int64_t tokens() const { return int64_t{blocks} * chunk; }  // with the padding that keys in global memory need
};

TeamPlan plan_selection(int64_t tokens, int device);
TeamPlan plan_covariance(int64_t tokens, bool float64, int device);

// `arguments.chunk` is set here, from the plan.
void launch_selection(const TeamPlan& plan, SelectionArguments arguments, cudaStream_t stream);
template <class T>
void launch_covariance(const TeamPlan& plan, CovarianceArguments<T> arguments, cudaStream_t stream);

}  // namespace entropy_kernels::cuda

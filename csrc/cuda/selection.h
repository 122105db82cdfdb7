// What the selection operators hand to their kernels, free of torch.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "common/fixed_point.h"
#include "common/selection_steps.h"
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

// The single steps, for batches spread over ranks; at least one token.
template <class T>
struct CovarianceStep {
  const T* logprob;
  const T* advantages;
  const uint8_t* mask;
  const double* means;  // (2,)
  float* covariance;

  EK_HOST_DEVICE void operator()(int64_t i) const {
    covariance[i] =
        deviation_product(logprob[i], advantages[i], mask == nullptr || mask[i] != 0, means[0], means[1]);
  }
};

template <class Step>
void launch_token_step(const Step& step, int64_t tokens, cudaStream_t stream);
// Adds to bins (rows, kRadixBins).
template <class Digit>
void launch_digit_step(const Digit& digit, int64_t rows, int64_t tokens, int64_t* bins, cudaStream_t stream);
// out (3,) and sums (2,) hold zeros.
template <class T>
void launch_extremes(const T* logprob, const T* advantages, const uint8_t* mask, int64_t tokens, double* out,
                     cudaStream_t stream);
template <class T>
void launch_sums(const T* logprob, const T* advantages, const uint8_t* mask, const double* scales, int64_t tokens,
                 int64_t* sums, cudaStream_t stream);

}  // namespace entropy_kernels::cuda

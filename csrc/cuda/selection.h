// What the selection operators hand to their kernels, free of torch.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/fixed_point.h"
#include "common/selection_steps.h"
#include "cuda/covariance_kernels.h"
#include "cuda/launch_plan.h"
#include "cuda/selection_kernels.h"

namespace entropy_kernels::cuda {

TeamPlan plan_selection(int64_t tokens, int device);
int largest_selection_cluster(int device);  // blocks, 0: none
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

// What the selection operators hand to their kernels, free of torch.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/selection_steps.h"
#include "cuda/budget_kernels.h"
#include "cuda/covariance_kernels.h"
#include "cuda/launch_plan.h"
#include "cuda/selection_kernels.h"

namespace entropy_kernels::cuda {

GroupPlan plan_selection(int64_t tokens, int device);
int largest_covariance_cluster(int device);  // blocks, 0: none
GroupPlan plan_covariance(int64_t tokens, bool float64, int device);

// `arguments` has the plan's chunk and what it keeps.
void launch_selection(const GroupPlan& plan, SelectionArguments arguments, cudaStream_t stream);
template <class T>
void launch_covariance(const GroupPlan& plan, CovarianceArguments<T> arguments, cudaStream_t stream);

struct BudgetPlan {
  int blocks, chunk;
};
BudgetPlan plan_budget(int64_t tokens, int device);
// `arguments` has the plan's chunk.
void launch_budget(const BudgetPlan& plan, BudgetArguments arguments, cudaStream_t stream);

// The single steps, for batches spread over ranks; at least one token.
template <class Step>
void launch_token_step(const Step& step, int64_t tokens, cudaStream_t stream);
// Adds to bins (rows, kRadixBins).
template <class Digit>
void launch_digit_step(const Digit& digit, int64_t rows, int64_t tokens, int64_t* bins, cudaStream_t stream);
// out (3,) and sums (2,) hold zeros.
template <class T>
void launch_extremes(const TokenPairs<T>& pairs, double* out, cudaStream_t stream);
template <class T>
void launch_sums(const TokenPairs<T>& pairs, const double* scales, int64_t* sums, cudaStream_t stream);

}  // namespace entropy_kernels::cuda

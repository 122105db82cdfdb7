// What the selection operators ask of the CPU.
#pragma once

#include <cstdint>

#include "common/budget.h"
#include "common/selection.h"
#include "common/selection_steps.h"

namespace entropy_kernels::cpu {

// Write the whole mask, bool bytes.
void select(const Selection& selection, uint8_t* selected);
void select(const TokenView& view, const Budget& budget, uint8_t* selected);

// Into (N,); (3,): largest |logprob| and |advantage|, number of tokens that count; (2,) at (2,) scales.
template <class T>
void token_covariance(const TokenPairs<T>& pairs, float* out);
template <class T>
void covariance_extremes(const TokenPairs<T>& pairs, double* out);
template <class T>
void covariance_sums(const TokenPairs<T>& pairs, const double* scales, int64_t* out);

}  // namespace entropy_kernels::cpu

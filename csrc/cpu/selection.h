// Selection of the CPU backend for the operators that contain one.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "common/selection.h"
#include "cpu/selection_scan.h"

namespace entropy_kernels::cpu {

// (N,) fp32; logprob and advantages are flat, both fp32 or both fp64.
torch::stable::Tensor token_covariance(const torch::stable::Tensor& logprob, const torch::stable::Tensor& advantages,
                                       std::optional<torch::stable::Tensor> mask);

// Between low and high, or, if quantile, between the order statistics at these shares of the candidates.
Band clip_cov_band(const TokenView& view, double low, double high, bool quantile, bool closed);

// Write the whole mask, bool bytes: candidates in the band drawn at random, or those of largest covariance.
void select_at_random(const TokenView& view, Band band, const SelectionCount& request, int64_t seed,
                      uint8_t* selected);
void select_largest(const TokenView& view, const SelectionCount& request, uint8_t* selected);

}  // namespace entropy_kernels::cpu

// What the operators (token_stats.cpp) ask of the row kernels, which exist once per instruction set.
#pragma once

#include <cmath>
#include <cstdint>

#include "../common/element.h"
#include "../common/softmax_state.h"
#include "capability.h"

namespace entropy_kernels::cpu {

// A row of logits, or a part of one. Strides are in elements.
struct Row {
  const void* data;
  std::int64_t columns;
  std::int64_t stride;
};

// Where one row's gradient goes, and what it is made from (GradientCoefficients).
struct RowGradient {
  void* data;  // may be the row of logits itself
  std::int64_t stride;
  bool streaming;  // bypass the caches: the gradient is fresh memory, and too large to stay in them
  double m;
  double temperature;
  double softcap;  // 0: none
  GradientCoefficients<double> coefficients;
};

struct RowKernels {
  // State of a row part, without x_y; s2 and w2 only if `second_moments`.
  SoftmaxState<double> (*accumulate)(const Row& row, double temperature, double softcap, bool second_moments);
  // One logit after softcap, exactly as accumulate sees it: the target at the maximum has x_y == m.
  double (*capped)(double logit, double softcap);
  // The gradient of every column, without the target's own term.
  void (*gradient)(const Row& row, const RowGradient& gradient);
};

// d/dz of softcap * tanh(z / softcap) = 1 - tanh², without its cancellation: 4u / (1 + u)², u = e^{-2|z| / softcap}.
inline double capped_derivative(double logit, double softcap) {
  const double u = std::exp(-2 * std::fabs(logit) / softcap);
  return 4 * u / ((1 + u) * (1 + u));
}

// One set per instruction set, and one for double.
const RowKernels& row_kernels(Element element, Capability capability);

namespace portable {
const RowKernels& kernels(Element element);
}
namespace avx2 {
const RowKernels& kernels(Element element);
}
namespace avx512 {
const RowKernels& kernels(Element element);
}
namespace float64 {
const RowKernels& kernels();
}

}  // namespace entropy_kernels::cpu

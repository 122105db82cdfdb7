// token_stats for double, which only tests and gradcheck use: plain loops, the same blocks and the same state.
#include <cmath>
#include <limits>

#include "token_stats.h"

namespace entropy_kernels::cpu::float64 {
namespace {

constexpr std::int64_t kBlock = 1024;
constexpr double kInfinity = std::numeric_limits<double>::infinity();

double capped(double logit, double softcap) { return softcap * std::tanh(logit / softcap); }

SoftmaxState<double> accumulate(const Row& row, double temperature, double softcap, bool second_moments) {
  const double* p = static_cast<const double*>(row.data);
  SoftmaxState<double> state = SoftmaxState<double>::identity();
  double z[kBlock];
  for (std::int64_t begin = 0; begin < row.columns; begin += kBlock) {
    const std::int64_t count = row.columns - begin < kBlock ? row.columns - begin : kBlock;
    SoftmaxState<double> block = SoftmaxState<double>::identity();
    for (std::int64_t j = 0; j < count; ++j) {
      const double logit = p[(begin + j) * row.stride];
      z[j] = softcap > 0 ? capped(logit, softcap) : logit;
      block.m = max_or_nan(block.m, z[j]);
    }
    if (block.m == -kInfinity) continue;
    for (std::int64_t j = 0; j < count; ++j) {
      const double x = (z[j] - block.m) / temperature;
      const double e = std::exp(x);
      if (e == 0) continue;  // x may be -inf
      block.s += e;
      block.w -= x * e;
      if (second_moments) {
        block.s2 += e * e;
        block.w2 -= x * (e * e);
      }
    }
    state = merge(state, block, temperature);
  }
  return state;
}

void gradient(const Row& row, const RowGradient& g) {
  const double* in = static_cast<const double*>(row.data);
  double* out = static_cast<double*>(g.data);
  for (std::int64_t j = 0; j < row.columns; ++j) {
    const double logit = in[j * row.stride];
    const double z = g.softcap > 0 ? capped(logit, g.softcap) : logit;
    const double x = (z - g.m) / g.temperature;
    const double e = std::exp(x);
    double dz = e * (g.coefficients.constant + g.coefficients.linear * x + g.coefficients.quadratic * e);
    if (e == 0 && !is_nan(g.coefficients.constant)) dz = 0;  // x may be -inf
    if (g.softcap > 0) dz *= capped_derivative(logit, g.softcap);
    out[j * g.stride] = dz;
  }
}

}  // namespace

const RowKernels& kernels() {
  static constexpr RowKernels kernels = {accumulate, capped, gradient};
  return kernels;
}

}  // namespace entropy_kernels::cpu::float64

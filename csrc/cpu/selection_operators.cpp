// The selection operators on the CPU: selection.cpp, token_covariance.cpp, and the steps of common/selection_steps.h over
// all tokens on torch's threads.
#include "selection_operators.h"

#include <mutex>
#include <vector>

#include "cpu/parallel.h"
#include "cpu/selection.h"

namespace entropy_kernels::cpu {
namespace {

struct CpuHalf {
  explicit CpuHalf(const torch::stable::Tensor&) {}

  void select(const Selection& selection, uint8_t* out) const { cpu::select(selection, out); }
  void select(const TokenView& view, const Budget& budget, uint8_t* out) const { cpu::select(view, budget, out); }
  void covariance(const auto& pairs, float* out) const { token_covariance(pairs, out); }
  void extremes(const auto& pairs, double* out) const { covariance_extremes(pairs, out); }
  void sums(const auto& pairs, const double* scales, int64_t* out) const { covariance_sums(pairs, scales, out); }

  template <class Step>
  void for_each_token(const Step& step, int64_t tokens) const {
    over_tokens(tokens, [&](int64_t begin, int64_t end) {
      const Step mine = step;  // on this thread's stack, where no store can change it
      for (int64_t i = begin; i < end; ++i) {
        mine(i);
      }
    });
  }

  template <class Digit>
  void histogram(const Digit& digit, int64_t rows, int64_t tokens, int64_t* bins) const {
    std::mutex lock;
    over_tokens(tokens, [&](int64_t begin, int64_t end) {
      std::vector<uint64_t> mine(static_cast<size_t>(rows * kRadixBins));
      for (int64_t row = 0; row < rows; ++row) {
        for (int64_t i = begin; i < end; ++i) {
          const int bin = digit(row, i);
          if (bin >= 0) {
            mine[row * kRadixBins + bin] += digit.weight(i);
          }
        }
      }
      const std::lock_guard<std::mutex> guard(lock);
      for (size_t bin = 0; bin < mine.size(); ++bin) {
        bins[bin] = wrapping_sum(bins[bin], static_cast<int64_t>(mine[bin]));
      }
    });
  }
};

STABLE_TORCH_LIBRARY_IMPL(entropy_kernels_native, CompositeExplicitAutograd, m) {
  SelectionOperators<CpuHalf>::implement(m);
}

}  // namespace
}  // namespace entropy_kernels::cpu

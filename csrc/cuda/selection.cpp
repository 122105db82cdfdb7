// The selection operators on NVIDIA GPUs: memory, the current stream. What happens on the device is in
// selection_kernels.h, covariance_kernels.h and common/selection_steps.h.
#include "cuda/selection.h"

#include <torch/csrc/stable/accelerator.h>

#include "cuda/tensors.h"
#include "selection_operators.h"

namespace entropy_kernels::cuda {
namespace {

using torch::stable::Tensor;

struct CudaHalf {
  const Tensor& like;
  const int device;
  const torch::stable::accelerator::DeviceGuard guard;
  const cudaStream_t stream;

  explicit CudaHalf(const Tensor& tensor)
      : like(tensor),
        device(static_cast<int>(tensor.get_device())),
        guard(tensor.get_device()),
        stream(current_stream(tensor)) {}

  void select(const Selection& selection, uint8_t* out) const {
    const GroupPlan plan = plan_selection(selection.view.tokens, device);
    const bool stores = selection.drawn && plan.chunk > plan.kept * kQuad;
    const Tensor scratch = words(like, kSelectionExchange + (stores ? key_store_bytes(plan.tokens()) / 8 + 1 : 0));
    auto* const exchange = mutable_data<uint64_t>(scratch);
    const SelectionArguments arguments = {selection, plan.chunk, plan.kept, out,
                                          reinterpret_cast<uint32_t*>(exchange + kSelectionExchange), exchange};
    launch_selection(plan, arguments, stream);
  }

  void select(const TokenView& view, const Budget& budget, uint8_t* out) const {
    const BudgetPlan plan = plan_budget(view.tokens, device);
    const Tensor exchange = words(like, budget_exchange(plan.blocks));
    launch_budget(plan, {view, budget, plan.chunk, out, mutable_data<uint64_t>(exchange)}, stream);
  }

  template <class T>
  void covariance(const TokenPairs<T>& pairs, float* out) const {
    const GroupPlan plan = plan_covariance(pairs.tokens, sizeof(T) == 8, device);
    const Tensor exchange = words(like, plan.cluster ? 0 : kSumSlots * plan.blocks);
    const CovarianceArguments<T> arguments = {pairs, plan.chunk, plan.kept, out, mutable_data<uint64_t>(exchange)};
    launch_covariance(plan, arguments, stream);
  }

  void extremes(const auto& pairs, double* out) const { launch_extremes(pairs, out, stream); }
  void sums(const auto& pairs, const double* scales, int64_t* out) const { launch_sums(pairs, scales, out, stream); }
  void for_each_token(const auto& step, int64_t tokens) const { launch_token_step(step, tokens, stream); }
  void histogram(const auto& digit, int64_t rows, int64_t tokens, int64_t* bins) const {
    launch_digit_step(digit, rows, tokens, bins, stream);
  }
};

STABLE_TORCH_LIBRARY_IMPL(entropy_kernels_native, CUDA, m) { SelectionOperators<CudaHalf>::implement(m); }

}  // namespace
}  // namespace entropy_kernels::cuda

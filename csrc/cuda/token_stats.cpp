// The operators token_stats_forward and token_stats_backward on NVIDIA GPUs: arguments, memory, the current stream.
// What happens on the device is in token_stats_kernels.h.
#include "token_stats.h"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/device.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

#include "../token_stats_arguments.h"
#include "launch.h"
#include "row_plan.h"
#include "tensors.h"

namespace entropy_kernels::cuda {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr std::int64_t kMaxColumns = std::int64_t(1) << 30;  // columns are counted in 32 bits

Tensor empty_beside(const Tensor& tensor, std::initializer_list<std::int64_t> shape, ScalarType dtype) {
  const torch::stable::Device device(torch::headeronly::DeviceType::CUDA, tensor.get_device());
  return torch::stable::empty(shape, dtype, std::nullopt, device);
}

// Strides of dimensions of size 1 mean nothing: they must not look like ones that differ or are misaligned.
Rows rows_of(const Tensor& tensor, void* data) {
  const auto stride = [&](std::int64_t dim, std::int64_t alone) {
    return tensor.size(dim) > 1 ? tensor.stride(dim) : alone;
  };
  return {data, stride(0, 0), stride(1, 0), stride(2, 1)};
}

template <typename T>
Problem<T> problem_of(const Tensor& logits, const Tensor& target, const Tensor& temperature,
                      const RowOptions& options) {
  const std::int64_t rows = logits.size(0) * logits.size(1), vocab = logits.size(2);
  STD_TORCH_CHECK(rows <= kMaxBlocks && vocab <= kMaxColumns, "logits: expected at most ", kMaxBlocks, " rows of ",
                  kMaxColumns, " columns, got shape ", shape_of(logits));
  const bool number = temperature.is_cpu();
  return {rows_of(logits, const_cast<void*>(logits.const_data_ptr())),
          static_cast<int>(rows),
          static_cast<int>(logits.size(1)),
          static_cast<int>(vocab),
          static_cast<int>(options.columns(vocab)),
          labels_of(target),
          number ? nullptr : data<T>(temperature),
          temperature.numel() == 1 ? 0 : 1,
          number ? *data<T>(temperature) : T(0),
          options};
}

std::tuple<Tensor, Tensor> token_stats_forward(Tensor logits, Tensor target, Tensor temperature, double softcap,
                                               std::int64_t ignore_index, std::int64_t vocab_start,
                                               std::int64_t vocab_size, std::int64_t want) {
  const RowOptions options = {softcap, ignore_index, vocab_start, vocab_size};
  check_arguments(logits, target, temperature, options, want);
  const torch::stable::accelerator::DeviceGuard guard(logits.get_device());
  const ScalarType dtype = result_of(logits);
  const std::int64_t rows = target.numel();
  Tensor stats = empty_beside(logits, {statistics_in(want), rows}, dtype);
  Tensor state = empty_beside(logits, {state_rows(want), rows}, dtype);
  const auto run = [&]<typename T>(T) {
    const Problem<T> problem = problem_of<T>(logits, target, temperature, options);
    // with the strides of single rows and batches, so that a row alone is read as among others
    const bool vectors = reads_vectors(reinterpret_cast<std::intptr_t>(problem.logits.data), logits.stride(0),
                                       logits.stride(1), problem.logits.column_stride, logits.element_size());
    const ForwardArguments<T> arguments = {problem, outputs_of<T>(stats, state, want), 1, vectors, nullptr, nullptr};
    const Element element = element_of(logits);
    const ForwardPlan plan = plan_forward(element, problem, vectors, logits.get_device());
    // Freed when this returns; the allocator gives it to nothing that runs before the kernel on this stream.
    std::optional<Tensor> scratch;
    if (plan.scratch_bytes > 0) {
      scratch = empty_beside(logits, {static_cast<std::int64_t>(plan.scratch_bytes)}, ScalarType::Byte);
    }
    launch_forward(element, plan, arguments, scratch ? scratch->mutable_data_ptr() : nullptr, current_stream(logits));
  };
  if (rows > 0) dtype == ScalarType::Double ? run(double{}) : run(float{});
  return {stats, state};
}

void token_stats_backward(Tensor grad_stats, Tensor logits, Tensor target, Tensor temperature, Tensor state,
                          double softcap, std::int64_t ignore_index, std::int64_t vocab_start, std::int64_t vocab_size,
                          std::int64_t want, Tensor dlogits) {
  const RowOptions options = {softcap, ignore_index, vocab_start, vocab_size};
  check_arguments(logits, target, temperature, options, want);
  check_backward(grad_stats, logits, target, temperature, state, want, dlogits);
  if (logits.numel() == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(logits.get_device());
  const auto run = [&]<typename T>(T) {
    const BackwardArguments<T> arguments = {problem_of<T>(logits, target, temperature, options),
                                            upstream_of<T>(grad_stats, want),
                                            state_of<T>(state),
                                            rows_of(dlogits, dlogits.mutable_data_ptr()),
                                            1,
                                            false,
                                            false};
    launch_backward(element_of(logits), arguments, current_stream(logits));
  };
  result_of(logits) == ScalarType::Double ? run(double{}) : run(float{});
}

STABLE_TORCH_LIBRARY_IMPL(entropy_kernels_native, CUDA, m) {
  m.impl("token_stats_forward", TORCH_BOX(&token_stats_forward));
  m.impl("token_stats_backward", TORCH_BOX(&token_stats_backward));
}

}  // namespace

}  // namespace entropy_kernels::cuda

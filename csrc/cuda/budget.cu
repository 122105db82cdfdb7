// Selection by a budget on NVIDIA GPUs: one cooperative launch without a value read by the host.
#include "cuda/budget_kernels.h"

#include <stdexcept>

#include "cuda/cooperating_thread.h"
#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "cuda/once_per_device.h"
#include "cuda/selection.h"

namespace entropy_kernels::cuda {
namespace {

using Thread = CooperatingThread;
constexpr int64_t kBudgetTokens = 1024;  // of a block, while there are multiprocessors to spare

__global__ void __launch_bounds__(Thread::kThreads, 1) budget_grid(const __grid_constant__ BudgetArguments arguments) {
  __shared__ BudgetShared shared;
  Thread thread;
  BudgetSelector<Thread>(thread, shared, arguments).run();
}

const void* pointer() { return reinterpret_cast<const void*>(&budget_grid); }

}  // namespace

BudgetPlan plan_budget(int64_t tokens, int device) {
  static OncePerDevice<int> resident;
  const int64_t most = resident.of(pointer(), device, [&] {
    int multiprocessors = 0, blocks = 0;
    check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, pointer(), Thread::kThreads, 0),
          "cudaOccupancyMaxActiveBlocksPerMultiprocessor");
    return multiprocessors * blocks;
  });
  const int64_t wanted = (tokens + kBudgetTokens - 1) / kBudgetTokens, blocks = wanted < most ? wanted : most;
  const int64_t chunk = (tokens + blocks - 1) / blocks;
  if (chunk > kMaxChunk) {
    throw std::runtime_error("selection: too many tokens");
  }
  return {static_cast<int>(blocks), static_cast<int>(chunk)};
}

void launch_budget(const BudgetPlan& plan, BudgetArguments arguments, cudaStream_t stream) {
  void* parameters[] = {&arguments};
  check(cudaLaunchCooperativeKernel(pointer(), dim3(plan.blocks), dim3(Thread::kThreads), parameters, 0, stream),
        "selection: launch");
}

std::vector<Kernel> budget_kernels() { return {{"budget_grid", pointer()}}; }

}  // namespace entropy_kernels::cuda

// Covariance, selection and policy loss on NVIDIA GPUs in one launch: see policy_loss_kernels.h.
#include "cuda/policy_loss.h"

#include "cuda/kernels.h"
#include "cuda/team_launch.h"

namespace entropy_kernels::cuda {
namespace {

using Thread = CooperatingThread;

__global__ void __launch_bounds__(Thread::kThreads, 1)
    policy_loss_cluster(const __grid_constant__ PolicyLossArguments arguments) {
#if __CUDA_ARCH__ >= 900
  __shared__ TeamShared team_shared;
  __shared__ SearchShared search_shared;
  __shared__ PolicyLossShared loss_shared;
  extern __shared__ uint32_t keys[];
  Thread thread;
  Cluster<Thread> team(thread, team_shared);
  const KeyStore store = {keys, keys + arguments.covariance.chunk};
  policy_loss_block(team, search_shared, loss_shared, arguments, store);
  team.finish();
#endif
}

__global__ void __launch_bounds__(Thread::kThreads, 1)
    policy_loss_grid(const __grid_constant__ PolicyLossArguments arguments) {
  __shared__ TeamShared team_shared;
  __shared__ SearchShared search_shared;
  __shared__ PolicyLossShared loss_shared;
  Thread thread;
  Grid<Thread> team(thread, team_shared, arguments.covariance.exchange, kSelectionExchange);
  const int64_t begin = int64_t{thread.block()} * arguments.covariance.chunk;
  const KeyStore store = {arguments.selection.keys + begin, arguments.selection.candidates + begin / kLanes};
  policy_loss_block(team, search_shared, loss_shared, arguments, store);
}

const void* pointer(void (*kernel)(PolicyLossArguments)) { return reinterpret_cast<const void*>(kernel); }

}  // namespace

TeamPlan plan_policy_loss(int64_t tokens, int device) {
  return plan_team(tokens, limits_of(pointer(policy_loss_cluster), pointer(policy_loss_grid), true, device), true);
}

void launch_policy_loss(const TeamPlan& plan, PolicyLossArguments arguments, cudaStream_t stream) {
  arguments.covariance.chunk = arguments.selection.chunk = plan.chunk;
  launch_team(plan, plan.cluster ? pointer(policy_loss_cluster) : pointer(policy_loss_grid), arguments, stream);
}

std::vector<Kernel> policy_loss_kernels() {
  return {{"policy_loss_cluster", pointer(policy_loss_cluster)}, {"policy_loss_grid", pointer(policy_loss_grid)}};
}

}  // namespace entropy_kernels::cuda

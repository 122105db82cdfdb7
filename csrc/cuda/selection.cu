// Selection and token covariance on NVIDIA GPUs, each one launch without a value read by the host.
//
// A mask's blocks keep histograms in shared memory and meet once per digit to add them in global memory, in a cooperative
// launch. A covariance's meet twice, to add five numbers: as one cluster if the batch is small (sm_90 and later), else
// cooperatively too.
#include "cuda/selection.h"

#include "cuda/group_launch.h"
#include "cuda/kernels.h"

namespace entropy_kernels::cuda {
namespace {

using Thread = CooperatingThread;

__device__ __forceinline__ unsigned char* bytes_of(uint4* memory) { return reinterpret_cast<unsigned char*>(memory); }

__global__ void __launch_bounds__(Thread::kThreads, 1)
    selection_grid(const __grid_constant__ SelectionArguments arguments) {
  extern __shared__ uint4 kept[];
  __shared__ CountsShared counts_shared;
  __shared__ SearchShared search_shared;
  Thread thread;
  GridCounts<Thread> counts(thread, counts_shared, arguments.exchange, kSelectionWords);
  Selector<Thread>(counts, search_shared, arguments, bytes_of(kept)).run();
}

template <class T>
__global__ void __launch_bounds__(Thread::kThreads, 1)
    covariance_cluster(const __grid_constant__ CovarianceArguments<T> arguments) {
#if __CUDA_ARCH__ >= 900
  extern __shared__ uint4 kept[];
  __shared__ SumsShared sums_shared;
  Thread thread;
  thread.wait_for_launches_before();
  ClusterSums<Thread> sums(thread, sums_shared);
  covariance_block(sums, arguments, bytes_of(kept));
  sums.finish();
#endif
}

template <class T>
__global__ void __launch_bounds__(Thread::kThreads, 1)
    covariance_grid(const __grid_constant__ CovarianceArguments<T> arguments) {
  extern __shared__ uint4 kept[];
  __shared__ SumsShared sums_shared;
  Thread thread;
  GridSums<Thread> sums(thread, sums_shared, arguments.exchange);
  covariance_block(sums, arguments, bytes_of(kept));
}

const void* selection_pointer() { return reinterpret_cast<const void*>(selection_grid); }
template <class T>
const void* pointer(void (*kernel)(CovarianceArguments<T>)) {
  return reinterpret_cast<const void*>(kernel);
}

template <class T>
Limits covariance_limits(int device) {
  return limits_of(pointer(covariance_cluster<T>), pointer(covariance_grid<T>), device);
}

}  // namespace

GroupPlan plan_selection(int64_t tokens, int device) {
  return plan_group(tokens, limits_of(nullptr, selection_pointer(), device), KeyKeep<0>::kBytes);
}

int largest_covariance_cluster(int device) { return covariance_limits<float>(device).cluster; }

GroupPlan plan_covariance(int64_t tokens, bool float64, int device) {
  return float64 ? plan_group(tokens, covariance_limits<double>(device), PairKeep<double, 0>::kBytes)
                 : plan_group(tokens, covariance_limits<float>(device), PairKeep<float, 0>::kBytes);
}

void launch_selection(const GroupPlan& plan, SelectionArguments arguments, cudaStream_t stream) {
  launch_group(plan, selection_pointer(), arguments, stream);
}

template <class T>
void launch_covariance(const GroupPlan& plan, CovarianceArguments<T> arguments, cudaStream_t stream) {
  launch_group(plan, plan.cluster ? pointer(covariance_cluster<T>) : pointer(covariance_grid<T>), arguments, stream);
}
template void launch_covariance(const GroupPlan&, CovarianceArguments<float>, cudaStream_t);
template void launch_covariance(const GroupPlan&, CovarianceArguments<double>, cudaStream_t);

std::vector<Kernel> selection_kernels() {
  return {{"selection_grid", selection_pointer()},
          {"covariance_cluster fp32", pointer(covariance_cluster<float>)},
          {"covariance_cluster fp64", pointer(covariance_cluster<double>)},
          {"covariance_grid fp32", pointer(covariance_grid<float>)},
          {"covariance_grid fp64", pointer(covariance_grid<double>)}};
}

}  // namespace entropy_kernels::cuda

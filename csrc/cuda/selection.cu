// Selection and token covariance on NVIDIA GPUs, each one launch without a value read by the host.
//
// Blocks keep histograms in shared memory and meet once per digit to add them: as one cluster where the keys of all
// tokens fit its shared memory (sm_90 and later), else as a cooperative launch through global memory.
#include <array>
#include <atomic>
#include <limits>
#include <stdexcept>
#include <string>

#include "cuda/cooperating_thread.h"
#include "cuda/launch.h"
#include "cuda/selection.h"

namespace entropy_kernels::cuda {
namespace {

using Thread = CooperatingThread;

constexpr int kMaxCluster = 16;  // more than 8 is not promised: the occupancy is asked for
constexpr int64_t kTokensPerBlock = 4 * Thread::kThreads;
constexpr int64_t kClusterTokens = 512 * 1024;  // beyond them 16 multiprocessors are too few

__global__ void __launch_bounds__(Thread::kThreads, 1)
    selection_cluster(const __grid_constant__ SelectionArguments arguments) {
#if __CUDA_ARCH__ >= 900
  __shared__ TeamShared team_shared;
  __shared__ SearchShared search_shared;
  extern __shared__ uint32_t keys[];
  Thread thread;
  Cluster<Thread> team(thread, team_shared);
  Selector<Cluster<Thread>>(team, search_shared, arguments, {keys, keys + arguments.chunk}).run();
#endif
}

__global__ void __launch_bounds__(Thread::kThreads, 1)
    selection_grid(const __grid_constant__ SelectionArguments arguments) {
  __shared__ TeamShared team_shared;
  __shared__ SearchShared search_shared;
  Thread thread;
  Grid<Thread> team(thread, team_shared, arguments.exchange, kSelectionExchange);
  const int64_t begin = int64_t{thread.block()} * arguments.chunk;
  const KeyStore store = {arguments.keys + begin, arguments.candidates + begin / kLanes};
  Selector<Grid<Thread>>(team, search_shared, arguments, store).run();
}

template <class T>
__global__ void __launch_bounds__(Thread::kThreads, 1)
    covariance_cluster(const __grid_constant__ CovarianceArguments<T> arguments) {
#if __CUDA_ARCH__ >= 900
  __shared__ TeamShared team_shared;
  Thread thread;
  Cluster<Thread> team(thread, team_shared);
  covariance_block(team, arguments);
#endif
}

template <class T>
__global__ void __launch_bounds__(Thread::kThreads, 1)
    covariance_grid(const __grid_constant__ CovarianceArguments<T> arguments) {
  __shared__ TeamShared team_shared;
  Thread thread;
  Grid<Thread> team(thread, team_shared, arguments.exchange, kTeamSlots);
  covariance_block(team, arguments);
}

// A launch with one attribute: a cluster of all its blocks, or cooperative.
struct Launch {
  cudaLaunchConfig_t config = {};
  cudaLaunchAttribute attribute = {};

  Launch(bool cluster, int blocks, std::size_t shared_bytes, cudaStream_t stream) {
    config.gridDim = dim3(blocks);
    config.blockDim = dim3(Thread::kThreads);
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    if (cluster) {
      attribute.id = cudaLaunchAttributeClusterDimension;
      attribute.val.clusterDim.x = blocks;
      attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    } else {
      attribute.id = cudaLaunchAttributeCooperative;
      attribute.val.cooperative = 1;
    }
    config.attrs = &attribute;
    config.numAttrs = 1;
  }
  Launch(const Launch&) = delete;
};

// What a kernel may use of a device; asked once.
struct Limits {
  int cluster;                     // blocks of the largest cluster, 0: none
  int64_t cluster_tokens_per_block;  // whose keys fit its shared memory
  int grid;                        // blocks of the largest cooperative launch
};

Limits ask_limits(const void* cluster_kernel, const void* grid_kernel, bool keys, int device) {
  Limits limits = {0, kClusterTokens, 0};
  int multiprocessors = 0, per_multiprocessor = 0, shared_bytes = 0;
  check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
  check(cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
        "cudaDeviceGetAttribute");
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_multiprocessor, grid_kernel, Thread::kThreads, 0),
        "cudaOccupancyMaxActiveBlocksPerMultiprocessor");
  limits.grid = multiprocessors * per_multiprocessor;

  cudaFuncAttributes attributes;
  check(cudaFuncGetAttributes(&attributes, cluster_kernel), "cudaFuncGetAttributes");
  if (attributes.ptxVersion < 90) {
    return limits;  // an older GPU, or one for which the driver compiled the PTX of sm_80, where the kernel is empty
  }
  std::size_t dynamic_bytes = 0;
  if (keys) {
    dynamic_bytes = shared_bytes - attributes.sharedSizeBytes;
    limits.cluster_tokens_per_block = dynamic_bytes / key_store_bytes(kLanes) * kLanes;
    check(cudaFuncSetAttribute(cluster_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, dynamic_bytes),
          "cudaFuncSetAttribute");
  }
  check(cudaFuncSetAttribute(cluster_kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1),
        "cudaFuncSetAttribute");
  for (int blocks = kMaxCluster; blocks > 0 && limits.cluster == 0; blocks /= 2) {
    const Launch launch(true, blocks, dynamic_bytes, nullptr);
    int clusters = 0;
    if (cudaOccupancyMaxActiveClusters(&clusters, cluster_kernel, &launch.config) != cudaSuccess) {
      cudaGetLastError();
    } else if (clusters > 0) {
      limits.cluster = blocks;
    }
  }
  return limits;
}

// Per device: threads that ask at the same time find the same answer.
class LimitsOfDevices {
 public:
  LimitsOfDevices(const void* cluster_kernel, const void* grid_kernel, bool keys)
      : cluster_kernel_(cluster_kernel), grid_kernel_(grid_kernel), keys_(keys) {}

  Limits of(int device) {
    if (device >= kMaxDevices) {
      return ask_limits(cluster_kernel_, grid_kernel_, keys_, device);
    }
    if (!known_[device].load(std::memory_order_acquire)) {
      const Limits limits = ask_limits(cluster_kernel_, grid_kernel_, keys_, device);
      limits_[device].store(limits, std::memory_order_relaxed);
      known_[device].store(true, std::memory_order_release);
    }
    return limits_[device].load(std::memory_order_relaxed);
  }

 private:
  static constexpr int kMaxDevices = 64;
  const void* cluster_kernel_;
  const void* grid_kernel_;
  bool keys_;
  std::array<std::atomic<bool>, kMaxDevices> known_ = {};
  std::array<std::atomic<Limits>, kMaxDevices> limits_ = {};
};

TeamPlan plan(int64_t tokens, const Limits& limits, bool keys) {
  const int64_t wanted = (tokens + kTokensPerBlock - 1) / kTokensPerBlock;
  const auto chunk_of = [&](int64_t blocks) {
    return ((tokens + blocks - 1) / blocks + kLanes - 1) / kLanes * kLanes;
  };
  int blocks = 1;
  while (blocks < wanted && blocks < limits.cluster) {
    blocks *= 2;
  }
  if (limits.cluster > 0 && tokens <= kClusterTokens && chunk_of(blocks) <= limits.cluster_tokens_per_block) {
    const auto chunk = static_cast<int>(chunk_of(blocks));
    return {true, blocks, chunk, keys ? static_cast<std::size_t>(key_store_bytes(chunk)) : 0};
  }
  blocks = static_cast<int>(wanted < 1 ? 1 : wanted < limits.grid ? wanted : limits.grid);
  const int64_t chunk = chunk_of(blocks);
  if (chunk > std::numeric_limits<int>::max() / 2) {
    throw std::runtime_error("selection: too many tokens");
  }
  return {false, blocks, static_cast<int>(chunk), 0};
}

template <class Arguments>
void launch(const TeamPlan& plan, const void* kernel, Arguments& arguments, cudaStream_t stream) {
  arguments.chunk = plan.chunk;
  const Launch launch(plan.cluster, plan.blocks, plan.shared_bytes, stream);
  void* parameters[] = {&arguments};
  check(cudaLaunchKernelExC(&launch.config, kernel, parameters), "selection: launch");
}

const void* pointer(void (*kernel)(SelectionArguments)) { return reinterpret_cast<const void*>(kernel); }
template <class T>
const void* pointer(void (*kernel)(CovarianceArguments<T>)) {
  return reinterpret_cast<const void*>(kernel);
}

}  // namespace

TeamPlan plan_selection(int64_t tokens, int device) {
  static LimitsOfDevices limits(pointer(selection_cluster), pointer(selection_grid), true);
  return plan(tokens, limits.of(device), true);
}

TeamPlan plan_covariance(int64_t tokens, bool float64, int device) {
  static LimitsOfDevices single(pointer(covariance_cluster<float>), pointer(covariance_grid<float>), false);
  static LimitsOfDevices wide(pointer(covariance_cluster<double>), pointer(covariance_grid<double>), false);
  return plan(tokens, float64 ? wide.of(device) : single.of(device), false);
}

void launch_selection(const TeamPlan& plan, SelectionArguments arguments, cudaStream_t stream) {
  launch(plan, plan.cluster ? pointer(selection_cluster) : pointer(selection_grid), arguments, stream);
}

template <class T>
void launch_covariance(const TeamPlan& plan, CovarianceArguments<T> arguments, cudaStream_t stream) {
  launch(plan, plan.cluster ? pointer(covariance_cluster<T>) : pointer(covariance_grid<T>), arguments, stream);
}
template void launch_covariance(const TeamPlan&, CovarianceArguments<float>, cudaStream_t);
template void launch_covariance(const TeamPlan&, CovarianceArguments<double>, cudaStream_t);

}  // namespace entropy_kernels::cuda

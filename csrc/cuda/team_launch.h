// Launching kernels whose blocks work together (team.h): as one cluster where the GPU has them and the keys fit its
// shared memory, else cooperatively.
#pragma once

#include <cstddef>
#include <limits>
#include <map>
#include <mutex>
#include <stdexcept>

#include "cuda/cooperating_thread.h"
#include "cuda/launch.h"
#include "cuda/selection.h"

namespace entropy_kernels::cuda {

constexpr int64_t kTokensPerBlock = 4 * CooperatingThread::kThreads;
constexpr int64_t kClusterTokens = 512 * 1024;  // beyond them 16 multiprocessors are too few

// A launch with one attribute: a cluster of all its blocks, or cooperative.
struct Launch {
  cudaLaunchConfig_t config = {};
  cudaLaunchAttribute attribute = {};

  Launch(bool cluster, int blocks, std::size_t shared_bytes, cudaStream_t stream) {
    config.gridDim = dim3(blocks);
    config.blockDim = dim3(CooperatingThread::kThreads);
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
  int cluster;                       // blocks of the largest cluster, 0: none
  int64_t cluster_tokens_per_block;  // whose keys fit its shared memory
  int grid;                          // blocks of the largest cooperative launch
};

inline Limits ask_limits(const void* cluster_kernel, const void* grid_kernel, bool keys, int device) {
  Limits limits = {0, kClusterTokens, 0};
  int multiprocessors = 0, per_multiprocessor = 0, shared_bytes = 0;
  check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
  check(cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
        "cudaDeviceGetAttribute");
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_multiprocessor, grid_kernel, CooperatingThread::kThreads, 0),
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

// Per device, asked once.
class LimitsOfDevices {
 public:
  LimitsOfDevices(const void* cluster_kernel, const void* grid_kernel, bool keys)
      : cluster_kernel_(cluster_kernel), grid_kernel_(grid_kernel), keys_(keys) {}

  Limits of(int device) {
    const std::lock_guard<std::mutex> guard(lock_);
    const auto known = limits_.find(device);
    return known != limits_.end()
               ? known->second
               : limits_.emplace(device, ask_limits(cluster_kernel_, grid_kernel_, keys_, device)).first->second;
  }

 private:
  const void* cluster_kernel_;
  const void* grid_kernel_;
  bool keys_;
  std::mutex lock_;
  std::map<int, Limits> limits_;
};

inline TeamPlan plan_team(int64_t tokens, const Limits& limits, bool keys) {
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

// `arguments` holds the plan's chunk.
template <class Arguments>
void launch_team(const TeamPlan& plan, const void* kernel, Arguments& arguments, cudaStream_t stream) {
  const Launch launch(plan.cluster, plan.blocks, plan.shared_bytes, stream);
  void* parameters[] = {&arguments};
  check(cudaLaunchKernelExC(&launch.config, kernel, parameters), "selection: launch");
}

}  // namespace entropy_kernels::cuda

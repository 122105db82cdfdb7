// Launching kernels whose blocks work together (block_group.h): as one cluster where the GPU has them and the keys fit
// its shared memory, else cooperatively.
#pragma once

#include <cstddef>

#include "cuda/cooperating_thread.h"
#include "cuda/launch.h"
#include "cuda/launch_plan.h"
#include "cuda/once_per_device.h"

namespace entropy_kernels::cuda {

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

inline Limits ask_limits(const void* cluster_kernel, const void* grid_kernel, bool keys, int device) {
  Limits limits = {0, kMaxChunk, 0};
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
    set_attribute(cluster_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(dynamic_bytes));
  }
  set_attribute(cluster_kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
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

inline Limits limits_of(const void* cluster_kernel, const void* grid_kernel, bool keys, int device) {
  static OncePerDevice<Limits> limits;
  return limits.of(cluster_kernel, device, [&] { return ask_limits(cluster_kernel, grid_kernel, keys, device); });
}

// `arguments` holds the plan's chunk.
template <class Arguments>
void launch_group(const GroupPlan& plan, const void* kernel, Arguments& arguments, cudaStream_t stream) {
  const Launch launch(plan.cluster, plan.blocks, plan.shared_bytes, stream);
  void* parameters[] = {&arguments};
  check(cudaLaunchKernelExC(&launch.config, kernel, parameters), "selection: launch");
}

}  // namespace entropy_kernels::cuda

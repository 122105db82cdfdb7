// Launching kernels whose blocks work together: as one cluster, or cooperatively.
#pragma once

#include <cstddef>

#include "cuda/cooperating_thread.h"
#include "cuda/launch.h"
#include "cuda/launch_plan.h"
#include "cuda/once_per_device.h"

namespace entropy_kernels::cuda {

// A launch as a cluster of all its blocks, which begins while the launch before it ends, or cooperative.
struct Launch {
  cudaLaunchConfig_t config = {};
  cudaLaunchAttribute attributes[2] = {};

  Launch(bool cluster, int blocks, std::size_t shared_bytes, cudaStream_t stream) {
    config.gridDim = dim3(blocks);
    config.blockDim = dim3(CooperatingThread::kThreads);
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    config.attrs = attributes;
    config.numAttrs = cluster ? 2 : 1;
    if (cluster) {
      attributes[0].id = cudaLaunchAttributeClusterDimension;
      attributes[0].val.clusterDim.x = blocks;
      attributes[0].val.clusterDim.y = attributes[0].val.clusterDim.z = 1;
      attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
      attributes[1].val.programmaticStreamSerializationAllowed = 1;
    } else {
      attributes[0].id = cudaLaunchAttributeCooperative;
      attributes[0].val.cooperative = 1;
    }
  }
  Launch(const Launch&) = delete;
};

// `cluster_kernel` is null where there is none.
inline Limits ask_limits(const void* cluster_kernel, const void* grid_kernel, int device) {
  Limits limits = {0, 0, 0};
  int multiprocessors = 0, per_multiprocessor = 0, shared_bytes = 0;
  check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
  check(cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
        "cudaDeviceGetAttribute");
  cudaFuncAttributes attributes;
  check(cudaFuncGetAttributes(&attributes, grid_kernel), "cudaFuncGetAttributes");
  limits.shared = shared_bytes - static_cast<int>(attributes.sharedSizeBytes);
  set_attribute(grid_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, limits.shared);
  // With all its shared memory one block fits a multiprocessor, and a launch has as many blocks, however much it uses
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_multiprocessor, grid_kernel, CooperatingThread::kThreads,
                                                      limits.shared),
        "cudaOccupancyMaxActiveBlocksPerMultiprocessor");
  limits.grid = multiprocessors * per_multiprocessor;

  if (cluster_kernel == nullptr) {
    return limits;
  }
  check(cudaFuncGetAttributes(&attributes, cluster_kernel), "cudaFuncGetAttributes");
  if (attributes.ptxVersion < 90) {
    return limits;  // an older GPU, or one for which the driver compiled the PTX of sm_80, where the kernel is empty
  }
  set_attribute(cluster_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, limits.shared);
  set_attribute(cluster_kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  for (int blocks = kMaxCluster; blocks > 0 && limits.cluster == 0; blocks /= 2) {
    const Launch launch(true, blocks, limits.shared, nullptr);
    int clusters = 0;
    if (cudaOccupancyMaxActiveClusters(&clusters, cluster_kernel, &launch.config) != cudaSuccess) {
      cudaGetLastError();
    } else if (clusters > 0) {
      limits.cluster = blocks;
    }
  }
  return limits;
}

inline Limits limits_of(const void* cluster_kernel, const void* grid_kernel, int device) {
  static OncePerDevice<Limits> limits;
  return limits.of(grid_kernel, device, [&] { return ask_limits(cluster_kernel, grid_kernel, device); });
}

// `arguments` holds the plan's chunk and what it keeps.
template <class Arguments>
void launch_group(const GroupPlan& plan, const void* kernel, Arguments& arguments, cudaStream_t stream) {
  const Launch launch(plan.cluster, plan.blocks, plan.shared_bytes, stream);
  void* parameters[] = {&arguments};
  check(cudaLaunchKernelExC(&launch.config, kernel, parameters), "selection: launch");
}

}  // namespace entropy_kernels::cuda

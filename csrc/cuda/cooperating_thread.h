// A thread on the device whose block works with others of its launch: see block_sums.h and grid_counts.h.
#pragma once

#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace entropy_kernels::cuda {

struct CooperatingThread {
  static constexpr int kThreads = 1024;  // per block

  __device__ __forceinline__ int index() const { return static_cast<int>(threadIdx.x); }
  __device__ __forceinline__ int block() const { return static_cast<int>(blockIdx.x); }
  __device__ __forceinline__ int blocks() const { return static_cast<int>(gridDim.x); }

  __device__ __forceinline__ void barrier() const { __syncthreads(); }
  __device__ __forceinline__ uint32_t ballot(bool value) const { return __ballot_sync(kWarp, value); }
  template <class T>
  __device__ __forceinline__ T shuffle(T value, int lane) const {
    return __shfl_sync(kWarp, value, lane);
  }
  template <class T>
  __device__ __forceinline__ T shuffle_up(T value, int distance) const {
    return __shfl_up_sync(kWarp, value, distance);
  }
  template <class T>
  __device__ __forceinline__ T shuffle_xor(T value, int mask) const {
    return __shfl_xor_sync(kWarp, value, mask);
  }

  __device__ __forceinline__ uint32_t warp_maximum(uint32_t value) const { return __reduce_max_sync(kWarp, value); }
  __device__ __forceinline__ uint32_t warp_sum(uint32_t value) const { return __reduce_add_sync(kWarp, value); }

  __device__ __forceinline__ void add(uint32_t* shared, uint32_t value) const { atomicAdd(shared, value); }
  __device__ __forceinline__ uint32_t fetch_add(uint32_t* shared, uint32_t value) const {
    return atomicAdd(shared, value);
  }
  __device__ __forceinline__ uint64_t fetch_add_global(uint64_t* to, uint64_t value) const {
    return atomicAdd(word(to), value);
  }
  __device__ __forceinline__ void add_global(uint64_t* to, uint64_t value) const { atomicAdd(word(to), value); }
  // What other blocks of this launch have written: not from this multiprocessor's L1.
  __device__ __forceinline__ uint64_t read_fresh(const uint64_t* from) const { return __ldcg(word(from)); }

  __device__ __forceinline__ void grid_sync() const { cooperative_groups::this_grid().sync(); }
  // Its two halves: each waits for the arrival of all.
  __device__ __forceinline__ void grid_arrive() { arrival_ = cooperative_groups::this_grid().barrier_arrive(); }
  __device__ __forceinline__ void grid_wait() {
    cooperative_groups::this_grid().barrier_wait(static_cast<Arrival&&>(arrival_));
  }
  // What comes behind it is not before the end of the launches before this one, which may have started beside them.
  __device__ __forceinline__ void wait_for_launches_before() const {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;\n\tgriddepcontrol.wait;" ::: "memory");
#endif
  }
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  // What the block has written before it, every thread of the cluster sees behind it. One warp releases it for all:
  // 32 fences at a time would queue up.
  __device__ __forceinline__ void cluster_sync() const {
    __syncthreads();
    if (threadIdx.x < 32) {
      asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
    } else {
      asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
    }
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
  }
  // What another block of the cluster, which is the whole grid, has in the place of this block's shared memory.
  template <class T>
  __device__ __forceinline__ T read_in_block(const T* shared, int block) const {
    uint32_t address;
    T value;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;"
                 : "=r"(address)
                 : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(shared))), "r"(block));
    if constexpr (sizeof(T) == 8) {
      asm volatile("ld.shared::cluster.u64 %0, [%1];" : "=l"(value) : "r"(address) : "memory");
    } else {
      asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(value) : "r"(address) : "memory");
    }
    return value;
  }
#endif

 private:
  using Arrival = cooperative_groups::grid_group::arrival_token;
  Arrival arrival_;

  static constexpr unsigned kWarp = 0xffffffffu;
  // atomics know no uint64_t where that is unsigned long
  static __device__ __forceinline__ unsigned long long* word(uint64_t* p) {
    return reinterpret_cast<unsigned long long*>(p);
  }
  static __device__ __forceinline__ const unsigned long long* word(const uint64_t* p) {
    return reinterpret_cast<const unsigned long long*>(p);
  }
};

}  // namespace entropy_kernels::cuda

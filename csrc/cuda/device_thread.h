// A thread on the device: what the kernels ask of it, in PTX where CUDA C++ has no word for it.
#pragma once

#include <cuda_runtime.h>

#include "problem.h"

namespace entropy_kernels::cuda {

struct DeviceThread {
  __device__ __forceinline__ int index() const { return static_cast<int>(threadIdx.x); }
  __device__ __forceinline__ int count() const { return static_cast<int>(blockDim.x); }
  __device__ __forceinline__ int block() const { return static_cast<int>(blockIdx.x); }

  __device__ __forceinline__ void barrier() const { __syncthreads(); }
  template <typename T>
  __device__ __forceinline__ T shuffle_xor(T value, int mask) const {
    return __shfl_xor_sync(0xffffffffu, value, mask);
  }

  // Logits that nothing writes during the launch; L1 would only be filled with what is not read again.
  __device__ __forceinline__ Words read(const Words* p) const {
    Words v;
    asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
        : "l"(p));
    return v;
  }
  // Logits that this launch may overwrite, and gradients: each of them is touched once.
  __device__ __forceinline__ Words read_once(const Words* p) const {
    return bits_as<Words>(*reinterpret_cast<const uint4*>(p));
  }
  __device__ __forceinline__ void write(Words* p, Words v) const {
    *reinterpret_cast<uint4*>(p) = bits_as<uint4>(v);
  }
  // What other blocks of this launch have written: not from this multiprocessor's L1.
  template <typename T>
  __device__ __forceinline__ SoftmaxState<T> read_fresh(const SoftmaxState<T>& s) const {
    return {__ldcg(&s.m), __ldcg(&s.s), __ldcg(&s.w), __ldcg(&s.x_y), __ldcg(&s.s2), __ldcg(&s.w2)};
  }
  // Counts this block in after everything it has written; who counts the last one in sees what all have written.
  __device__ __forceinline__ unsigned count_up(unsigned* counter) const {
    __threadfence();
    const unsigned before = atomicAdd(counter, 1u);
    __threadfence();
    return before;
  }

  using Barrier = std::uint64_t;  // an mbarrier in shared memory

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  static __device__ __forceinline__ std::uint32_t address(const void* shared) {
    return static_cast<std::uint32_t>(__cvta_generic_to_shared(shared));
  }
  __device__ __forceinline__ void initialise(Barrier& barrier, int arrivals) const {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address(&barrier)), "r"(arrivals) : "memory");
  }
  // Shows initialised barriers to the copy engine.
  __device__ __forceinline__ void publish_barriers() const {
    asm volatile("fence.mbarrier_init.release.cluster; fence.proxy.async.shared::cta;" ::: "memory");
  }
  __device__ __forceinline__ void arrive(Barrier& barrier) const {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(address(&barrier)) : "memory");
  }
  __device__ __forceinline__ void wait(Barrier& barrier, int parity) const {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;\n"
        "}\n" ::"r"(address(&barrier)),
        "r"(parity)
        : "memory");
  }
  // Orders reads of shared memory that this thread has waited for before its next copy over them: no barrier does that by
  // itself, as copies are of another proxy.
  __device__ __forceinline__ void reads_before_copies() const {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  }
  // Copies from global to this block's shared memory; the barrier's one arrival, complete when the bytes are there.
  __device__ __forceinline__ void copy(Words* to, const Words* from, int bytes, Barrier& barrier) const {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address(&barrier)), "r"(bytes)
                 : "memory");
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     address(to)),
                 "l"(from), "r"(bytes), "r"(address(&barrier))
                 : "memory");
  }

  // Says that this block runs, and nothing about its memory: no fence that everything in flight has to pass.
  __device__ __forceinline__ void cluster_arrive_relaxed() const {
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
  }
  __device__ __forceinline__ void cluster_arrive() const {
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
  }
  __device__ __forceinline__ void cluster_wait() const {
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
  }
  // The same object of this block's shared memory in another block of the cluster.
  template <typename T>
  __device__ __forceinline__ T* in_block(T* shared, unsigned rank) const {
    T* there;
    asm("mapa.u64 %0, %1, %2;" : "=l"(there) : "l"(shared), "r"(rank));
    return there;
  }
#endif
};

}  // namespace entropy_kernels::cuda

// Statistics of softmax rows on NVIDIA GPUs, from one read of the logits.
//
// A block reads a row, or one of several parts of it where rows are few. Each thread keeps a state of its own over tiles
// of four 16-byte vectors (the tile's maximum first, then one exponential per logit), states meet once, at the end.
//   everywhere  plain loads, the next tile's in flight; the block that is done last merges the parts
//   from sm_90  bulk copies through shared memory; parts are blocks of a cluster and merge through its shared memory
#include "device_thread.h"
#include "kernels.h"
#include "launch.h"
#include "once_per_device.h"
#include "row_plan.h"
#include "token_stats.h"
#include "token_stats_kernels.h"

namespace entropy_kernels::cuda {
namespace {

constexpr int kMaxCluster = 8;  // what every GPU with clusters can do

// Blocks that have to fit on a multiprocessor together; doubles need more registers than two leave them.
template <class E>
constexpr int kBlocks = sizeof(typename E::Accumulator) == 8 ? 1 : 3;

template <class E, bool kSecondMoments, bool kSoftcap>
__global__ void __launch_bounds__(kMaxThreads, kBlocks<E>)
    token_stats_forward(const __grid_constant__ ForwardArguments<typename E::Accumulator> arguments) {
  __shared__ ForwardShared<typename E::Accumulator> shared;
  DeviceThread thread;
  forward_block<E, kSecondMoments, kSoftcap, DirectSource<E, DeviceThread>>(thread, arguments, shared, nullptr);
}

// Eight blocks of bulk copies: while one starts or ends, the others have copies in flight. The hyperbolic tangent needs
// more registers than eight leave it.
template <bool kSoftcap>
constexpr int kBulkBlocks = kSoftcap ? 6 : 8;

template <class E, bool kSecondMoments, bool kSoftcap>
__global__ void __launch_bounds__(kBulkThreads, kBulkBlocks<kSoftcap>)
    token_stats_forward_bulk(const __grid_constant__ ForwardArguments<typename E::Accumulator> arguments) {
#if __CUDA_ARCH__ >= 900
  using Source = BulkSource<E, DeviceThread>;
  __shared__ ForwardShared<typename E::Accumulator> shared;
  extern __shared__ __align__(128) unsigned char dynamic[];
  DeviceThread thread;
  forward_block<E, kSecondMoments, kSoftcap, Source>(thread, arguments, shared,
                                                     reinterpret_cast<typename Source::Shared*>(dynamic));
#endif
}

using Stages = BulkSource<Float32, DeviceThread>::Shared;  // the same size for every dtype

template <class E>
const void* kernel(bool bulk, bool second_moments, bool softcap) {
  const auto choose = [&]<bool kSecondMoments, bool kSoftcap>() -> const void* {
    if constexpr (sizeof(typename E::Accumulator) == 4) {
      if (bulk) return reinterpret_cast<const void*>(&token_stats_forward_bulk<E, kSecondMoments, kSoftcap>);
    }
    return reinterpret_cast<const void*>(&token_stats_forward<E, kSecondMoments, kSoftcap>);
  };
  if (second_moments) {
    return softcap ? choose.template operator()<true, true>() : choose.template operator()<true, false>();
  }
  return softcap ? choose.template operator()<false, true>() : choose.template operator()<false, false>();
}

// Whether the bulk kernels are more than empty: on a GPU for which there is neither sm_90a nor sm_100a code that fits,
// the driver compiles the PTX of sm_80.
bool has_bulk_copies(int device) {
  static OncePerDevice<bool> known;
  const void* any = kernel<BFloat16>(true, false, false);
  return known.of(any, device, [&] {
    cudaFuncAttributes attributes;
    check(cudaFuncGetAttributes(&attributes, any), "cudaFuncGetAttributes");
    return attributes.ptxVersion >= 90;
  });
}

// Room for the stages of a bulk kernel, of which a multiprocessor holds as many as fit.
void allow_stages(const void* function) {
  static OncePerDevice<bool> allowed;
  allowed.of(function, current_device(), [&] {
    set_attribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(Stages));
    // the logits pass L1, and shared memory is what limits the blocks of a multiprocessor
    set_attribute(function, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
    return true;
  });
}

}  // namespace

template <typename T>
ForwardPlan plan_forward(Element element, const Problem<T>& problem, bool vectors, int device) {
  const auto bytes = static_cast<std::int64_t>(problem.columns) * element_size(element);
  const bool bulk = sizeof(T) == 4 && vectors && bytes >= kTileBytes && has_bulk_copies(device);
  int multiprocessors = 0;
  check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
  // So many blocks keep as many bytes in flight as the memory's latency asks for, and enough warps busy with them.
  const std::int64_t enough = 2 * multiprocessors;
  const int parts = forward_parts(problem.rows, bytes, enough, bulk ? kMaxCluster : kMaxParts, kTileBytes / 2);
  ForwardPlan plan = {bulk, bulk ? kBulkThreads : threads_for(problem.columns, element), parts, 0, 0};
  if (!bulk && parts > 1) {
    plan.counter_offset = sizeof(SoftmaxState<T>) * problem.rows * parts;
    plan.scratch_bytes = plan.counter_offset + sizeof(unsigned) * problem.rows;
  }
  return plan;
}

template <typename T>
void launch_forward(Element element, const ForwardPlan& plan, ForwardArguments<T> arguments, void* scratch,
                    cudaStream_t stream) {
  arguments.parts = plan.parts;
  if (plan.scratch_bytes > 0) {
    arguments.part_states = static_cast<SoftmaxState<T>*>(scratch);
    arguments.counters = reinterpret_cast<unsigned*>(static_cast<char*>(scratch) + plan.counter_offset);
    check(cudaMemsetAsync(arguments.counters, 0, plan.scratch_bytes - plan.counter_offset, stream), "cudaMemsetAsync");
  }
  const void* function = for_element<T>(element, [&]<class E>(E) {
    return kernel<E>(plan.bulk, arguments.outputs.second_order(), arguments.problem.options.softcap > 0);
  });
  cudaLaunchConfig_t config = {};
  config.gridDim = grid(arguments.problem.rows, plan.parts);
  config.blockDim = dim3(static_cast<unsigned>(plan.threads));
  config.stream = stream;
  cudaLaunchAttribute cluster;
  if (plan.bulk) {
    config.dynamicSmemBytes = sizeof(Stages);
    allow_stages(function);
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim = {static_cast<unsigned>(plan.parts), 1, 1};
    config.attrs = &cluster;
    config.numAttrs = plan.parts > 1 ? 1 : 0;
  }
  void* pointers[] = {&arguments};
  check(cudaLaunchKernelExC(&config, function, pointers), "token_stats_forward");
}

std::vector<Kernel> forward_kernels() {
  std::vector<Kernel> kernels;
  for (const Element element : kElements) {
    for (int i = 0; i < 8; ++i) {
      const bool bulk = i & 4, second_moments = i & 2, softcap = i & 1;
      if (bulk && element == Element::kFloat64) continue;
      const auto choose = [&]<class E>(E) { return kernel<E>(bulk, second_moments, softcap); };
      const void* function =
          element == Element::kFloat64 ? for_element<double>(element, choose) : for_element<float>(element, choose);
      kernels.push_back({std::string("token_stats_forward") + (bulk ? "_bulk " : " ") + element_name(element) +
                             (second_moments ? ", second moments" : "") + (softcap ? ", softcap" : ""),
                         function});
    }
  }
  return kernels;
}

template ForwardPlan plan_forward(Element, const Problem<float>&, bool, int);
template ForwardPlan plan_forward(Element, const Problem<double>&, bool, int);
template void launch_forward(Element, const ForwardPlan&, ForwardArguments<float>, void*, cudaStream_t);
template void launch_forward(Element, const ForwardPlan&, ForwardArguments<double>, void*, cudaStream_t);

}  // namespace entropy_kernels::cuda

// The gradient of token_stats on NVIDIA GPUs: one read of the logits and one write, which may go to the same place.
//
// A block has a stretch of one row: four 16-byte vectors per thread and step. Other blocks' loads are in flight meanwhile.
#include <algorithm>

#include "device_thread.h"
#include "kernels.h"
#include "launch.h"
#include "switches.h"
#include "token_stats.h"
#include "token_stats_kernels.h"

namespace entropy_kernels::cuda {
namespace {

// Of logits, per block: few enough for an even end, and enough to pay for its start.
constexpr std::int64_t kBlockBytes = 8 * 1024;

// Blocks of kMaxThreads that a multiprocessor has registers for.
template <class E, bool kSoftcap>
constexpr int kBlocks = sizeof(typename E::Accumulator) == 8 ? 2 : kSoftcap ? 3 : 4;

template <class E, bool kSoftcap>
__global__ void __launch_bounds__(kMaxThreads, kBlocks<E, kSoftcap>)
    token_stats_backward(const __grid_constant__ BackwardArguments<typename E::Accumulator> arguments) {
  DeviceThread thread;
  backward_block<E, kSoftcap>(thread, arguments);
}

template <class E>
const void* kernel(bool softcap) {
  return softcap ? reinterpret_cast<const void*>(&token_stats_backward<E, true>)
                 : reinterpret_cast<const void*>(&token_stats_backward<E, false>);
}

// Every row of both is contiguous, and as far from a multiple of 16 bytes in one as in the other.
bool equally_aligned(const Rows& a, const Rows& b, int element_size) {
  const auto offset = [](const void* data) { return reinterpret_cast<std::uintptr_t>(data) & 15; };
  const auto same = [&](std::int64_t x, std::int64_t y) { return (x - y) * element_size % 16 == 0; };
  return a.column_stride == 1 && b.column_stride == 1 && offset(a.data) == offset(b.data) &&
         same(a.batch_stride, b.batch_stride) && same(a.length_stride, b.length_stride);
}

}  // namespace

template <typename T>
void launch_backward(Element element, BackwardArguments<T> arguments, cudaStream_t stream) {
  const Problem<T>& problem = arguments.problem;
  const int size = element_size(element);
  const std::int64_t bytes = static_cast<std::int64_t>(problem.vocab) * size;
  arguments.vectors = equally_aligned(problem.logits, arguments.dlogits, size);
  arguments.reversed = backward_reversed.get() != 0;
  int multiprocessors = 0;
  check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, current_device()),
        "cudaDeviceGetAttribute");
  const std::int64_t enough = (2 * multiprocessors + problem.rows - 1) / problem.rows;
  const int threads = std::min(threads_for(problem.vocab, element), kBackwardThreads);
  const std::int64_t tile = std::int64_t{threads} * kVectors * 16, block = std::max(tile, kBlockBytes);
  const std::int64_t large = (bytes + block - 1) / block, small = (bytes + tile - 1) / tile;
  arguments.parts = static_cast<int>(std::max(large, std::min(enough, small)));
  const void* function = for_element<T>(element, [&]<class E>(E) { return kernel<E>(problem.options.softcap > 0); });
  cudaLaunchConfig_t config = {};
  config.gridDim = grid(problem.rows, arguments.parts);
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.stream = stream;
  void* pointers[] = {&arguments};
  check(cudaLaunchKernelExC(&config, function, pointers), "token_stats_backward");
}

std::vector<Kernel> backward_kernels() {
  std::vector<Kernel> kernels;
  for (const Element element : kElements) {
    for (const bool softcap : {false, true}) {
      const auto choose = [&]<class E>(E) { return kernel<E>(softcap); };
      const void* function =
          element == Element::kFloat64 ? for_element<double>(element, choose) : for_element<float>(element, choose);
      kernels.push_back({"token_stats_backward " + element_name(element) + (softcap ? ", softcap" : ""), function});
    }
  }
  return kernels;
}

template void launch_backward(Element, BackwardArguments<float>, cudaStream_t);
template void launch_backward(Element, BackwardArguments<double>, cudaStream_t);

}  // namespace entropy_kernels::cuda

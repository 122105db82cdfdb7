// torch's parallel_for over std::thread, for ThreadSanitizer (tools/sanitize.py): it cannot see how torch's own threads,
// which are not built for it, wait for each other. Linked into _ops.so in torch's place. Even a few tokens are shared.
#include <torch/csrc/stable/c/shim.h>

#include <algorithm>
#include <thread>
#include <vector>

constexpr int64_t kThreads = 4;

extern "C" __attribute__((visibility("default"))) AOTITorchError torch_parallel_for(int64_t begin, int64_t end,
                                                                                   int64_t /* grain_size */,
                                                                                   ParallelFunc func, void* ctx) {
  const int64_t step = std::max<int64_t>(1, (end - begin + kThreads - 1) / kThreads);
  std::vector<std::thread> threads;
  for (int64_t first = begin; first < end; first += step) {
    threads.emplace_back([=] { func(first, std::min(first + step, end), ctx); });
  }
  for (std::thread& thread : threads) thread.join();
  return AOTI_TORCH_SUCCESS;
}

extern "C" __attribute__((visibility("default"))) AOTITorchError torch_get_num_threads(uint32_t* out_num_threads) {
  *out_num_threads = kThreads;
  return AOTI_TORCH_SUCCESS;
}

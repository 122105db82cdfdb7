// Work sharing among torch's threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

namespace entropy_kernels::cpu {

// While it lives, this thread's fp32 results below 2^-126 become 0: e^2x of far logits would otherwise be subnormal,
// which costs an order of magnitude on some CPUs and is nothing beside the maximum's 1. Conversion to fp16 keeps its
// subnormals.
class FlushSubnormals {
 public:
#if defined(__SSE2__)
  FlushSubnormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | _MM_FLUSH_ZERO_ON); }
  ~FlushSubnormals() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#else
  FlushSubnormals() {}
  ~FlushSubnormals() {}
#endif
  FlushSubnormals(const FlushSubnormals&) = delete;
  FlushSubnormals& operator=(const FlushSubnormals&) = delete;
};

// Calls run(i) for every i in [0, tasks). Threads fetch tasks as they finish, because tasks differ (ignored rows cost
// nothing) and so do cores; which thread runs a task must not matter to its result. `run` must not throw.
template <class Run>
void parallel_tasks(std::int64_t tasks, std::int64_t elements_per_task, const Run& run) {
  // Below this many elements (about 20 us) waking a thread costs more than it saves.
  constexpr std::int64_t kElementsPerThread = 1 << 15;
  const std::int64_t worth = tasks * std::max<std::int64_t>(elements_per_task, 1) / kElementsPerThread;
  const std::int64_t threads = std::min<std::int64_t>({torch::stable::get_num_threads(), worth, tasks});
  if (threads <= 1) {
    for (std::int64_t i = 0; i < tasks; ++i) run(i);
    return;
  }
  // Small tasks are fetched several at a time: the shared counter must not become the work.
  const std::int64_t step = std::clamp<std::int64_t>(
      (1 << 13) / std::max<std::int64_t>(elements_per_task, 1), 1, (tasks + threads - 1) / threads);
  std::atomic<std::int64_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](std::int64_t, std::int64_t) {
    for (std::int64_t begin; (begin = next.fetch_add(step, std::memory_order_relaxed)) < tasks;) {
      const std::int64_t end = std::min(begin + step, tasks);
      for (std::int64_t i = begin; i < end; ++i) run(i);
    }
  });
}

// Calls run(begin, end) for stretches of tokens, of each of which little is asked.
template <class Run>
void over_tokens(std::int64_t tokens, const Run& run) {
  torch::stable::parallel_for(0, tokens, 32768, run);
}

}  // namespace entropy_kernels::cpu

// The parts of csrc/cuda that run on the host and call no CUDA, for tests/test_cuda_host.py.
#include <atomic>
#include <chrono>
#include <stdexcept>
#include <thread>
#include <vector>

#include "cuda/launch_plan.h"
#include "cuda/once_per_device.h"
#include "cuda/row_plan.h"

using namespace entropy_kernels::cuda;

extern "C" int64_t host_switch(const char* name, int64_t value) { return set_switch(name, value); }

// cluster, blocks, chunk, kept quads, shared bytes; null, or what went wrong.
extern "C" const char* host_plan(int64_t tokens, int cluster, int grid, int shared, int bytes, int64_t* plan) {
  try {
    const GroupPlan p = plan_group(tokens, {cluster, grid, shared}, bytes);
    plan[0] = p.cluster, plan[1] = p.blocks, plan[2] = p.chunk, plan[3] = p.kept;
    plan[4] = static_cast<int64_t>(p.shared_bytes);
    return nullptr;
  } catch (const std::runtime_error&) {
    return "too many tokens";
  }
}

extern "C" int host_forward_parts(int64_t rows, int64_t bytes, int64_t enough, int most, int64_t least) {
  return forward_parts(rows, bytes, enough, most, least);
}

extern "C" int host_reads_vectors(int64_t address, int64_t batch, int64_t length, int64_t column, int size) {
  return reads_vectors(static_cast<std::intptr_t>(address), batch, length, column, size);
}

// Each thread asks for every kernel on every device, several times. Returns how often an answer was not known yet, or
// -1 where it was of another kernel or device.
extern "C" int host_once(int threads, int kernels, int devices) {
  OncePerDevice<int> known;
  std::atomic<int> asked = 0;
  std::atomic<bool> wrong = false;
  std::vector<char> addresses(kernels);
  const auto ask_all = [&] {
    for (int i = 0; i < 3 * kernels * devices; ++i) {
      const int kernel = i % kernels, device = i / kernels % devices;
      const int answer = known.of(&addresses[kernel], device, [&] {
        ++asked;
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
        return kernel * devices + device;
      });
      if (answer != kernel * devices + device) wrong = true;
    }
  };
  std::vector<std::thread> all;
  for (int i = 0; i < threads; ++i) all.emplace_back(ask_all);
  for (std::thread& thread : all) thread.join();
  return wrong ? -1 : asked.load();
}

// How often a question is asked that fails the first time.
extern "C" int host_once_after_error() {
  OncePerDevice<bool> known;
  int asked = 0;
  for (int i = 0; i < 4; ++i) {
    try {
      known.of(&known, 0, [&] {
        if (++asked == 1) throw std::runtime_error("no memory");
        return true;
      });
    } catch (const std::runtime_error&) {
    }
  }
  return asked;
}

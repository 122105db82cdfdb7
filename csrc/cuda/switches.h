// What a measurement may change in a running process (native.set_cuda_switch): each launch reads it, an atomic load. A
// CUDA graph keeps what it was captured with.
#pragma once

#include <atomic>
#include <cstdint>
#include <string_view>

namespace entropy_kernels::cuda {

struct Switch {
  const char* name;
  std::atomic<std::int64_t> value;

  std::int64_t get() const { return value.load(std::memory_order_relaxed); }
};

// Tokens up to which a covariance runs as one cluster, where there are any, and not as a cooperative grid: on an H200 it
// is faster up to there.
inline Switch cluster_tokens = {"cluster_tokens", 96 * 1024};
// 1: the gradient begins with the last row. The forward pass has read that one last, so the L2 may still hold it.
inline Switch backward_reversed = {"backward_reversed", 0};
// 1: how the forward pass cuts a row does not depend on how many there are; Python sets it where the environment has
// ENTROPY_KERNELS_ROW_INVARIANT=1.
inline Switch row_invariant = {"row_invariant", 0};

// Returns the value before, or -1 if there is no such switch.
inline std::int64_t set_switch(std::string_view name, std::int64_t value) {
  for (Switch* known : {&cluster_tokens, &backward_reversed, &row_invariant}) {
    if (name == known->name) return known->value.exchange(value, std::memory_order_relaxed);
  }
  return -1;
}

}  // namespace entropy_kernels::cuda

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

// Tokens up to which a selection runs as one cluster, if it can hold them, and not as a cooperative grid.
// The default is a guess of where 16 multiprocessors are too few.
inline Switch cluster_tokens = {"cluster_tokens", 512 * 1024};
// Tokens of a block up to which a group gets no further block: as one cluster, and as a grid.
inline Switch cluster_block_tokens = {"cluster_block_tokens", 4096};
inline Switch grid_block_tokens = {"grid_block_tokens", 4096};
// 0: what no register holds is read again instead of kept in shared memory.
inline Switch keep_in_shared = {"keep_in_shared", 1};
// 1: a cluster's launch begins while the launch before it ends.
inline Switch early_launch = {"early_launch", 0};
// 1: the gradient begins with the last row. The forward pass has read that one last, so the L2 may still hold it.
inline Switch backward_reversed = {"backward_reversed", 0};
// 1: how the forward pass cuts a row does not depend on how many there are; Python sets it where the environment has
// ENTROPY_KERNELS_ROW_INVARIANT=1.
inline Switch row_invariant = {"row_invariant", 0};

// Returns the value before, or -1 if there is no such switch.
inline std::int64_t set_switch(std::string_view name, std::int64_t value) {
  for (Switch* known : {&cluster_tokens, &cluster_block_tokens, &grid_block_tokens, &keep_in_shared, &early_launch, &backward_reversed, &row_invariant}) {
    if (name == known->name) return known->value.exchange(value, std::memory_order_relaxed);
  }
  return -1;
}

}  // namespace entropy_kernels::cuda

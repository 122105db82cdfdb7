// How a batch is spread over blocks that work together (block_sums.h, grid_counts.h), free of CUDA.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <stdexcept>

#include "cuda/selection_kernels.h"
#include "cuda/switches.h"

namespace entropy_kernels::cuda {

constexpr int kHeldOfBlock = kHeldQuads * kBlockThreads;            // quads in registers
constexpr int64_t kMaxChunk = std::numeric_limits<int>::max() / 2;  // a block counts its tokens in 32 bits
// Tokens of a block up to which a cluster, or a grid, gets no further block. Within a cluster all threads hold tokens;
// a grid has multiprocessors to spare.
constexpr int64_t kClusterBlockTokens = kHeldOfBlock * kQuad, kGridBlockTokens = 1024;

// What a kernel may use of a device.
struct Limits {
  int cluster;  // blocks of the largest cluster, 0: none
  int grid;     // blocks of the largest cooperative launch
  int shared;   // bytes of dynamic memory per block
};

struct GroupPlan {
  bool cluster;  // else a cooperative launch, and the kernel needs the exchange in global memory
  int blocks;
  int chunk;  // tokens per block
  int kept;   // quads per block in registers and shared memory
  std::size_t shared_bytes;

  int64_t tokens() const { return int64_t{blocks} * chunk; }
};

// `bytes`: of a quad in shared memory.
inline GroupPlan plan_group(int64_t tokens, const Limits& limits, int bytes) {
  constexpr int64_t kWarp = kLanes * kQuad;
  const auto blocks_for = [&](int64_t each) { return (tokens + each - 1) / each; };
  const auto plan = [&](bool cluster, int64_t blocks) {
    const int64_t each = (tokens + blocks - 1) / blocks, chunk = (each + kWarp - 1) / kWarp * kWarp;
    if (chunk > kMaxChunk) {
      throw std::runtime_error("selection: too many tokens");
    }
    const int64_t room = limits.shared / bytes, beyond = chunk / kQuad - kHeldOfBlock;
    const int64_t kept = beyond < 0 ? 0 : beyond < room ? beyond : room;
    return GroupPlan{cluster, static_cast<int>(cluster ? blocks : blocks_for(chunk)), static_cast<int>(chunk),
                     static_cast<int>(kHeldOfBlock + kept), static_cast<std::size_t>(kept * bytes)};
  };
  if (limits.cluster > 0 && tokens <= cluster_tokens.get() && tokens <= kMaxChunk) {
    int64_t blocks = 1;
    while (blocks < blocks_for(kClusterBlockTokens) && blocks < limits.cluster) {
      blocks *= 2;
    }
    return plan(true, blocks);
  }
  const int64_t wanted = blocks_for(kGridBlockTokens);
  return plan(false, wanted < 1 ? 1 : wanted < limits.grid ? wanted : limits.grid);
}

}  // namespace entropy_kernels::cuda

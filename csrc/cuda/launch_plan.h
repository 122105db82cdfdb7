// How a batch is spread over blocks that work together (block_group.h), free of CUDA.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <stdexcept>

#include "cuda/selection_kernels.h"
#include "cuda/switches.h"

namespace entropy_kernels::cuda {

constexpr int kHeldOfBlock = kHeldQuads * kBlockThreads;  // quads in registers
constexpr int64_t kMaxChunk = std::numeric_limits<int>::max() / 2;          // a block counts its tokens in 32 bits

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
  const auto plan = [&](bool cluster, int blocks, int64_t chunk) {
    const int64_t room = keep_in_shared.get() != 0 ? limits.shared / bytes : 0, beyond = chunk / kQuad - kHeldOfBlock;
    const int64_t kept = beyond < 0 ? 0 : beyond < room ? beyond : room;
    return GroupPlan{cluster, blocks, static_cast<int>(chunk), static_cast<int>(kHeldOfBlock + kept),
                     static_cast<std::size_t>(kept * bytes)};
  };
  const auto blocks_for = [&](int64_t each) { return (tokens + each - 1) / each; };
  const auto chunk_of = [&](int64_t blocks) {
    constexpr int64_t kWarp = kLanes * kQuad;
    return ((tokens + blocks - 1) / blocks + kWarp - 1) / kWarp * kWarp;
  };
  int blocks = 1;
  while (blocks < blocks_for(cluster_block_tokens.get()) && blocks < limits.cluster) {
    blocks *= 2;
  }
  if (limits.cluster > 0 && tokens <= cluster_tokens.get() && tokens <= kMaxChunk) {
    return plan(true, blocks, chunk_of(blocks));
  }
  const int64_t wanted = blocks_for(grid_block_tokens.get());
  blocks = static_cast<int>(wanted < 1 ? 1 : wanted < limits.grid ? wanted : limits.grid);
  const int64_t chunk = chunk_of(blocks);
  if (chunk > kMaxChunk) {
    throw std::runtime_error("selection: too many tokens");
  }
  return plan(false, blocks, chunk);
}

}  // namespace entropy_kernels::cuda

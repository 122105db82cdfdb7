// How a batch is spread over blocks that work together (block_group.h), free of CUDA.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <stdexcept>

#include "cuda/selection_kernels.h"
#include "cuda/switches.h"

namespace entropy_kernels::cuda {

constexpr int64_t kTokensPerBlock = 4096;  // 4 per thread
constexpr int64_t kMaxChunk = std::numeric_limits<int>::max() / 2;  // a block counts its tokens in 32 bits

// What a kernel may use of a device.
struct Limits {
  int cluster;                       // blocks of the largest cluster, 0: none
  int64_t cluster_tokens_per_block;  // whose keys fit its shared memory
  int grid;                          // blocks of the largest cooperative launch
};

struct GroupPlan {
  bool cluster;  // else a cooperative launch, and the kernel needs the exchange (and the keys) in global memory
  int blocks;
  int chunk;  // tokens per block
  std::size_t shared_bytes;  // dynamic, per block

  int64_t tokens() const { return int64_t{blocks} * chunk; }  // with the padding that keys in global memory need
};

inline GroupPlan plan_group(int64_t tokens, const Limits& limits, bool keys) {
  const int64_t wanted = (tokens + kTokensPerBlock - 1) / kTokensPerBlock;
  const auto chunk_of = [&](int64_t blocks) {
    return ((tokens + blocks - 1) / blocks + kLanes - 1) / kLanes * kLanes;
  };
  int blocks = 1;
  while (blocks < wanted && blocks < limits.cluster) {
    blocks *= 2;
  }
  if (limits.cluster > 0 && tokens <= cluster_tokens.get() && chunk_of(blocks) <= limits.cluster_tokens_per_block) {
    const auto chunk = static_cast<int>(chunk_of(blocks));
    return {true, blocks, chunk, keys ? static_cast<std::size_t>(key_store_bytes(chunk)) : 0};
  }
  blocks = static_cast<int>(wanted < 1 ? 1 : wanted < limits.grid ? wanted : limits.grid);
  const int64_t chunk = chunk_of(blocks);
  if (chunk > kMaxChunk) {
    throw std::runtime_error("selection: too many tokens");
  }
  return {false, blocks, static_cast<int>(chunk), 0};
}

}  // namespace entropy_kernels::cuda

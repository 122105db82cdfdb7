// Blocks of a cooperative launch that count together: how they add their histograms, and the list that all can read.
// Thread is as in block_sums.h.
#pragma once

#include <cstdint>

#include "common/host_device.h"
#include "common/radix_select.h"
#include "cuda/token_quads.h"

namespace entropy_kernels::cuda {

struct CountsShared {
  alignas(16) uint32_t words[2 * kRadixBins];  // this block's histograms
};

// Of a list: a key, and the token's place in the batch.
struct Listed {
  uint32_t key;
  int64_t position;
};

template <class Thread_>
class GridCounts {
 public:
  using Thread = Thread_;
  static constexpr int kThreads = Thread::kThreads;
  static constexpr int kInFlight = 2;       // quads that a thread loads before it looks at one, beyond those it holds
  static constexpr int kListed = kThreads;  // entries of the list at most

  // `exchange` holds whatever it may: `words`, as many as `sum` will be asked for, 1 for the length of the list, and
  // 2 kListed.
  EK_HOST_DEVICE GridCounts(Thread& thread_, CountsShared& shared_, uint64_t* exchange, int words)
      : thread(thread_), shared(shared_), exchange_(exchange), listed_(exchange + words) {
    for (int i = thread.index(); i < 2 * kRadixBins; i += kThreads) {
      shared.words[i] = 0;
    }
    const int all = thread.blocks() * kThreads;
    for (int i = thread.block() * kThreads + thread.index(); i < words + 1; i += all) {
      exchange[i] = 0;
    }
    thread.grid_arrive();
    thread.barrier();
  }
  // Before the first `sum`: all blocks have cleared their part. What a block does between it and its construction does
  // not wait for others.
  EK_HOST_DEVICE void begin() { thread.grid_wait(); }

  EK_HOST_DEVICE void count(int word, uint32_t number = 1) { thread.add(shared.words + word, number); }

  // Adds the first `count` words over the blocks, for `word` to read, and clears them. Who counts again passes a
  // barrier of the block first.
  EK_HOST_DEVICE void sum(int count) {
    thread.barrier();
    begin_ = next_;
    next_ += count;
    for (int i = thread.index(); i < count; i += kThreads) {
      if (shared.words[i] != 0) {
        thread.add_global(exchange_ + begin_ + i, shared.words[i]);
        shared.words[i] = 0;
      }
    }
    thread.grid_sync();
  }
  EK_HOST_DEVICE int64_t word(int i) const { return static_cast<int64_t>(thread.read_fresh(exchange_ + begin_ + i)); }

  // Place of the first of so many entries, for `list`; once a sum was made, which is after the list was cleared.
  EK_HOST_DEVICE uint64_t reserve(uint32_t entries) { return thread.fetch_add_global(listed_, entries); }
  EK_HOST_DEVICE void list(uint64_t place, const Listed& entry) {
    uint64_t* to = listed_ + 1 + 2 * place;
    to[0] = entry.key;
    to[1] = static_cast<uint64_t>(entry.position);
  }
  // Behind it all blocks' entries can be read.
  EK_HOST_DEVICE void share_list() { thread.grid_sync(); }
  EK_HOST_DEVICE Listed entry(int place) const {
    const uint64_t* from = listed_ + 1 + 2 * place;
    return {static_cast<uint32_t>(thread.read_fresh(from)), static_cast<int64_t>(thread.read_fresh(from + 1))};
  }

  Thread& thread;
  CountsShared& shared;

 private:
  uint64_t* exchange_;
  uint64_t* listed_;  // how many, and they
  int begin_ = 0, next_ = 0;
};

}  // namespace entropy_kernels::cuda

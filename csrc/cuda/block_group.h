// Blocks of one launch that work on a batch together: how they add histograms and small sums, which are integers, so
// that the order in which blocks come does not matter.
//   Cluster  up to 16 blocks that read one another's shared memory (sm_90 and later)
//   Grid     any number of blocks that are resident together (a cooperative launch), by way of global memory
// Thread is one thread of the launch: cooperating_thread.h on the device, an emulated one in the tests.
#pragma once

#include <cstdint>

#include "common/host_device.h"
#include "common/radix_select.h"

namespace entropy_kernels::cuda {

constexpr int kLanes = 32;
constexpr int kGroupWords = 2 * kRadixBins;
constexpr int kGroupSlots = 8;
constexpr int kMaxCluster = 16;  // blocks; more than 8 is not promised: the occupancy is asked for

struct GroupShared {
  uint32_t words[kGroupWords];           // this block's histograms
  uint32_t slice[kGroupWords];           // Cluster: those words of all blocks together that this block adds up
  uint64_t warps[kGroupSlots][kLanes];   // maxima and sums of this block's warps
  uint64_t slots[kGroupSlots];           // this block's
  uint64_t totals[kGroupSlots];          // those of all blocks
};

// The smallest n with value <= 2^n, of a value from 1 on.
EK_HOST_DEVICE int bits_below(uint32_t value) {
#if defined(__CUDA_ARCH__)
  return 32 - __clz(static_cast<int>(value - 1));
#else
  return value == 1 ? 0 : 32 - __builtin_clz(value - 1);
#endif
}

// What both have: the block's own shared memory.
template <class Thread_>
class BlockGroup {
 public:
  using Thread = Thread_;
  static constexpr int kThreads = Thread::kThreads;

  EK_HOST_DEVICE BlockGroup(Thread& thread_, GroupShared& shared_) : thread(thread_), shared(shared_) {
    clear_words(kGroupWords);
    thread.barrier();
  }
  EK_HOST_DEVICE int lane() const { return thread.index() % kLanes; }
  EK_HOST_DEVICE int warp() const { return thread.index() / kLanes; }

  EK_HOST_DEVICE void count(int word) { thread.add(shared.words + word, 1u); }
  // The warp's largest value, and the warp's sum, go to a slot. They are not added there by atomics: those of 64 bits
  // are loops in shared memory, in which all warps would wait for one another. Sums of 32 bits are of a block's tokens.
  EK_HOST_DEVICE void add_maximum(int slot, uint64_t value) { give(slot, combined(value, true)); }
  EK_HOST_DEVICE void add_maximum(int slot, uint32_t value) { give(slot, thread.warp_maximum(value)); }
  EK_HOST_DEVICE void add_sum(int slot, uint64_t value) { give(slot, combined(value, false)); }
  EK_HOST_DEVICE void add_sum(int slot, uint32_t value) { give(slot, thread.warp_sum(value)); }

  Thread& thread;
  GroupShared& shared;

 protected:
  EK_HOST_DEVICE void clear_words(int count) {
    for (int i = thread.index(); i < count; i += kThreads) {
      shared.words[i] = 0;
    }
  }
  // The lanes' largest, or their sum, in every lane.
  EK_HOST_DEVICE uint64_t combined(uint64_t value, bool maximum) const {
    for (int mask = kLanes / 2; mask > 0; mask /= 2) {
      const uint64_t other = thread.shuffle_xor(value, mask);
      value = !maximum ? value + other : other > value ? other : value;
    }
    return value;
  }
  // The block's slots from those of its warps; a barrier comes behind it.
  EK_HOST_DEVICE void combine_warps(int first, int maxima, int sums) {
    thread.barrier();
#pragma unroll 1
    for (int i = warp(); i < maxima + sums; i += kThreads / kLanes) {
      const uint64_t value = lane() < kThreads / kLanes ? shared.warps[first + i][lane()] : 0;
      const uint64_t all = combined(value, i < maxima);
      if (lane() == 0) {
        shared.slots[first + i] = all;
      }
    }
  }

 private:
  EK_HOST_DEVICE void give(int slot, uint64_t value) {
    if (lane() == 0) {
      shared.warps[slot][warp()] = value;
    }
  }
};

template <class Thread>
class Cluster : public BlockGroup<Thread> {
 public:
  using BlockGroup<Thread>::shared;
  using BlockGroup<Thread>::thread;

  EK_HOST_DEVICE Cluster(Thread& thread_, GroupShared& shared_) : BlockGroup<Thread>(thread_, shared_) {}

  // Adds the first `count` words over the blocks, for `word` to read, and clears them. Who counts again passes a
  // barrier of the block first.
  EK_HOST_DEVICE void sum_words(int count) {
    const int blocks = thread.blocks();
    slice_bits_ = bits_below((count + blocks - 1) / blocks);
    const int begin = thread.block() << slice_bits_, slice = 1 << slice_bits_;
    const int end = begin + slice < count ? begin + slice : count;
    thread.cluster_sync();
    for (int i = begin + thread.index(); i < end; i += Thread::kThreads) {
      uint32_t sum = 0;
#pragma unroll
      for (int block = 0; block < kMaxCluster; ++block) {  // all on their way together
        sum += block < blocks ? *thread.in_block(shared.words + i, block) : 0;
      }
      shared.slice[i - begin] = sum;
    }
    thread.cluster_sync();  // from here on no other block reads the words
    this->clear_words(count);
  }
  EK_HOST_DEVICE int64_t word(int i) const {
    return *thread.in_block(shared.slice + (i & ((1 << slice_bits_) - 1)), i >> slice_bits_);
  }

  // Combines slots [first, first + maxima) by their maximum, the `sums` after them by addition. No slot twice.
  EK_HOST_DEVICE void combine_slots(int first, int maxima, int sums) {
    this->combine_warps(first, maxima, sums);
    thread.cluster_sync();
    const int rank = this->lane();
#pragma unroll 1
    for (int i = this->warp(); i < maxima + sums; i += Thread::kThreads / kLanes) {
      const uint64_t value = rank < thread.blocks() ? *thread.in_block(shared.slots + first + i, rank) : 0;
      const uint64_t all = this->combined(value, i < maxima);
      if (rank == 0) {
        shared.totals[first + i] = all;
      }
    }
    thread.barrier();
  }

  EK_HOST_DEVICE void finish() { thread.cluster_sync(); }  // a block's shared memory ends with it

 private:
  int slice_bits_ = 0;  // every block adds up so many words, a power of two: `word` needs no division
};

template <class Thread>
class Grid : public BlockGroup<Thread> {
 public:
  using BlockGroup<Thread>::shared;
  using BlockGroup<Thread>::thread;

  // `exchange` has `size` words, whatever they hold: kGroupSlots and as many as sum_words will be asked for.
  EK_HOST_DEVICE Grid(Thread& thread_, GroupShared& shared_, uint64_t* exchange, int size)
      : BlockGroup<Thread>(thread_, shared_), exchange_(exchange) {
    const int all = thread.blocks() * Thread::kThreads;
    for (int i = thread.block() * Thread::kThreads + thread.index(); i < size; i += all) {
      exchange[i] = 0;
    }
  }

  EK_HOST_DEVICE void sum_words(int count) {
    begin_ = next_;
    next_ += count;
    sync_once();
    for (int i = thread.index(); i < count; i += Thread::kThreads) {
      if (shared.words[i] != 0) {
        thread.add_global(exchange_ + begin_ + i, shared.words[i]);
        shared.words[i] = 0;
      }
    }
    thread.grid_sync();
  }
  EK_HOST_DEVICE int64_t word(int i) const { return static_cast<int64_t>(thread.read_fresh(exchange_ + begin_ + i)); }

  EK_HOST_DEVICE void combine_slots(int first, int maxima, int sums) {
    this->combine_warps(first, maxima, sums);
    sync_once();
    const int slot = first + thread.index();
    const bool mine = thread.index() < maxima + sums;
    if (mine && thread.index() < maxima) {
      thread.maximum_global(exchange_ + slot, shared.slots[slot]);
    } else if (mine) {
      thread.add_global(exchange_ + slot, shared.slots[slot]);
    }
    thread.grid_sync();
    if (mine) {
      shared.totals[slot] = thread.read_fresh(exchange_ + slot);
    }
    thread.barrier();
  }

 private:
  // Before the first addition the whole exchange has to be 0, later on this block's words have to be complete.
  EK_HOST_DEVICE void sync_once() {
    if (cleared_) {
      thread.barrier();
    } else {
      thread.grid_sync();
      cleared_ = true;
    }
  }

  uint64_t* exchange_;
  int begin_ = 0, next_ = kGroupSlots;
  bool cleared_ = false;
};

// The tokens of a block: a chunk of the batch.
struct TokenShare {
  int64_t begin;
  int tokens;

  EK_HOST_DEVICE TokenShare(int block, int chunk, int64_t all) {
    const int64_t first = static_cast<int64_t>(block) * chunk;
    begin = first < all ? first : all;
    tokens = all - begin < chunk ? static_cast<int>(all - begin) : chunk;
  }
};

// use(token, load(token)) for tokens [0, tokens) of a block, a warp's lanes together: use also runs for a lane beyond
// the last token, with the value-initialised load. A thread loads kInFlight tokens before it looks at the first.
template <class Group, class Load, class Use>
EK_HOST_DEVICE void for_tokens(const Group& group, int tokens, const Load& load, const Use& use) {
  constexpr int kInFlight = 4;
  for (int first = group.warp() * kLanes; first < tokens; first += kInFlight * Group::kThreads) {
    decltype(load(0)) loaded[kInFlight] = {};
#pragma unroll
    for (int j = 0; j < kInFlight; ++j) {
      const int i = first + j * Group::kThreads + group.lane();
      if (i < tokens) {
        loaded[j] = load(i);
      }
    }
#pragma unroll
    for (int j = 0; j < kInFlight; ++j) {
      if (first + j * Group::kThreads < tokens) {
        use(first + j * Group::kThreads + group.lane(), loaded[j]);
      }
    }
  }
}

}  // namespace entropy_kernels::cuda

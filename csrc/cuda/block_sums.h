// Blocks of one launch that work on a batch together: how they combine small sums and maxima. Those are of integers, so
// that the order in which blocks come does not matter.
//   ClusterSums  up to 16 blocks that read one another's shared memory (sm_90 and later)
//   GridSums     any number of blocks that are resident together (a cooperative launch), by way of global memory
// Thread is one thread of the launch: cooperating_thread.h on the device, an emulated one in the tests.
#pragma once

#include <cstdint>

#include "common/host_device.h"
#include "cuda/token_quads.h"

namespace entropy_kernels::cuda {

constexpr int kSumSlots = 8;
constexpr int kMaxCluster = 16;  // blocks; more than 8 is not promised: the occupancy is asked for

struct SumsShared {
  uint64_t warps[kSumSlots][kLanes];  // maxima and sums of this block's warps
  uint64_t slots[kSumSlots];          // this block's
  uint64_t totals[kSumSlots];         // those of all blocks
};

// What both have: the block's own.
template <class Thread_>
class BlockSums {
 public:
  using Thread = Thread_;
  static constexpr int kThreads = Thread::kThreads;

  EK_HOST_DEVICE BlockSums(Thread& thread_, SumsShared& shared_) : thread(thread_), shared(shared_) {}

  // The warp's largest value, and the warp's sum, go to a slot. They are not added there by atomics: those of 64 bits
  // are loops in shared memory, in which all warps would wait for one another. Sums of 32 bits are of a block's tokens.
  EK_HOST_DEVICE void add_maximum(int slot, uint64_t value) { give(slot, combined(value, true)); }
  EK_HOST_DEVICE void add_maximum(int slot, uint32_t value) { give(slot, thread.warp_maximum(value)); }
  EK_HOST_DEVICE void add_sum(int slot, uint64_t value) { give(slot, combined(value, false)); }
  EK_HOST_DEVICE void add_sum(int slot, uint32_t value) { give(slot, thread.warp_sum(value)); }

  Thread& thread;
  SumsShared& shared;

 protected:
  EK_HOST_DEVICE int lane() const { return thread.index() % kLanes; }
  EK_HOST_DEVICE int warp() const { return thread.index() / kLanes; }
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
class ClusterSums : public BlockSums<Thread> {
 public:
  using BlockSums<Thread>::BlockSums, BlockSums<Thread>::shared, BlockSums<Thread>::thread;

  static constexpr int kInFlight = 1;  // quads that a thread reads before it looks at one, beyond those it holds

  // Combines slots [first, first + maxima) by their maximum, the `sums` after them by addition. No slot twice.
  EK_HOST_DEVICE void combine_slots(int first, int maxima, int sums) {
    this->combine_warps(first, maxima, sums);
    thread.cluster_sync();
    const int rank = this->lane();
#pragma unroll 1
    for (int i = this->warp(); i < maxima + sums; i += Thread::kThreads / kLanes) {
      const uint64_t value = rank < thread.blocks() ? thread.read_in_block(shared.slots + first + i, rank) : 0;
      const uint64_t all = this->combined(value, i < maxima);
      if (rank == 0) {
        shared.totals[first + i] = all;
      }
    }
    thread.barrier();
  }

  EK_HOST_DEVICE void finish() { thread.cluster_sync(); }  // a block's shared memory ends with it
};

template <class Thread>
class GridSums : public BlockSums<Thread> {
 public:
  using BlockSums<Thread>::shared, BlockSums<Thread>::thread;

  static constexpr int kInFlight = 2;

  // `exchange` holds whatever it may: kSumSlots words for each block.
  EK_HOST_DEVICE GridSums(Thread& thread_, SumsShared& shared_, uint64_t* exchange)
      : BlockSums<Thread>(thread_, shared_), exchange_(exchange) {}

  EK_HOST_DEVICE void combine_slots(int first, int maxima, int sums) {
    this->combine_warps(first, maxima, sums);
    thread.barrier();
    if (thread.index() < maxima + sums) {
      exchange_[(first + thread.index()) * thread.blocks() + thread.block()] = shared.slots[first + thread.index()];
    }
    thread.grid_sync();
#pragma unroll 1
    for (int i = this->warp(); i < maxima + sums; i += Thread::kThreads / kLanes) {
      uint64_t value = 0;
      for (int block = this->lane(); block < thread.blocks(); block += kLanes) {
        const uint64_t other = thread.read_fresh(exchange_ + (first + i) * thread.blocks() + block);
        value = i >= maxima ? value + other : other > value ? other : value;
      }
      const uint64_t all = this->combined(value, i < maxima);
      if (this->lane() == 0) {
        shared.totals[first + i] = all;
      }
    }
    thread.barrier();
  }

 private:
  uint64_t* exchange_;
};

}  // namespace entropy_kernels::cuda

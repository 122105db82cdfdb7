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
constexpr int kQuad = 4;         // consecutive tokens that a thread takes side by side
constexpr int kHeldQuads = 1;    // of a thread, in its registers
constexpr int kBlockThreads = 1024;

// Of a list that a group gathers: a key, and the token's place in the whole batch.
struct Listed {
  uint32_t key;
  int64_t position;  // -1: none
};

// Shared memory for what is made of the quads that no register holds, of 16 bytes at least at an address of 16.
struct KeptMemory {
  unsigned char* memory;
  int quads;  // of a block, those in registers among them
};

struct GroupShared {
  uint32_t words[kGroupWords];           // this block's histograms; the second row is also its part of a list
  uint32_t listed;                       // how many that part holds
  uint32_t list_begin;                   // Grid: where it lies in the whole list
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
    if (thread.index() == 0) {
      shared.listed = 0;
    }
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

  // Adds a token of this block to the list, which holds at most kThreads tokens of all blocks together. `offset` counts
  // from the block's first token.
  EK_HOST_DEVICE void list(uint32_t key, uint32_t offset) {
    uint32_t* entry = shared.words + kRadixBins + 2 * thread.fetch_add(&shared.listed, 1u);
    entry[0] = key;
    entry[1] = offset;
  }
  // A count of this block alone, which becomes 0: for the thread that reads it.
  EK_HOST_DEVICE int32_t take_own_word(int i) {
    const auto value = static_cast<int32_t>(shared.words[i]);
    shared.words[i] = 0;
    return value;
  }

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

  static constexpr int kInFlight = 1;  // quads that a thread loads before it looks at one, beyond those it holds

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
        sum += block < blocks ? thread.read_in_block(shared.words + i, block) : 0;
      }
      shared.slice[i - begin] = sum;
    }
    thread.cluster_sync();  // from here on no other block reads the words
    this->clear_words(count);
  }
  EK_HOST_DEVICE int32_t word(int i) const {
    const uint32_t* place = shared.slice + (i & ((1 << slice_bits_) - 1));
    return static_cast<int32_t>(thread.read_in_block(place, i >> slice_bits_));
  }

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

  // The list's entry number index() of `count`, the same in every block. `chunk` is that of TokenShare.
  EK_HOST_DEVICE Listed gather(int, int chunk) {
    thread.cluster_sync();
    const int lane = this->lane(), blocks = thread.blocks();
    const uint32_t mine = lane < blocks ? thread.read_in_block(&shared.listed, lane) : 0;
    uint32_t up_to = mine;
    for (int distance = 1; distance < kMaxCluster; distance *= 2) {
      const uint32_t other = thread.shuffle_up(up_to, distance);
      up_to += lane >= distance ? other : 0;
    }
    const auto index = static_cast<uint32_t>(thread.index());
    uint32_t before = 0;
    int from = 0;
#pragma unroll 4
    for (int block = 0; block < kMaxCluster; ++block) {
      const uint32_t end = thread.shuffle(up_to, block);
      from += end <= index ? 1 : 0;
      before = end <= index ? end : before;
    }
    if (from >= blocks) {
      return {0, -1};
    }
    const uint32_t* entry = shared.words + kRadixBins + 2 * (index - before);
    return {thread.read_in_block(entry, from), int64_t{from} * chunk + thread.read_in_block(entry + 1, from)};
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

  static constexpr int kInFlight = 2;

  // `exchange` holds whatever it may: `words`, as many as sum_words will be asked for, and behind them kGroupSlots for
  // each block, and 2 kBlockThreads + 1 for a list.
  EK_HOST_DEVICE Grid(Thread& thread_, GroupShared& shared_, uint64_t* exchange, int words)
      : BlockGroup<Thread>(thread_, shared_), exchange_(exchange), words_(words), cleared_(words == 0) {
    const int all = thread.blocks() * Thread::kThreads;
    for (int i = thread.block() * Thread::kThreads + thread.index(); i < words; i += all) {
      exchange[i] = 0;
    }
    if (words != 0) {
      thread.grid_arrive();  // and waits where the first word is added: blocks read their tokens in between
    }
  }

  EK_HOST_DEVICE void sum_words(int count) {
    begin_ = next_;
    next_ += count;
    thread.barrier();
    if (!cleared_) {
      thread.grid_wait();
      cleared_ = true;
    }
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
    uint64_t* slots = exchange_ + words_;
    this->combine_warps(first, maxima, sums);
    thread.barrier();
    if (thread.index() < maxima + sums) {
      slots[(first + thread.index()) * thread.blocks() + thread.block()] = shared.slots[first + thread.index()];
    }
    thread.grid_sync();
#pragma unroll 1
    for (int i = this->warp(); i < maxima + sums; i += Thread::kThreads / kLanes) {
      uint64_t value = 0;
      for (int block = this->lane(); block < thread.blocks(); block += kLanes) {
        const uint64_t other = thread.read_fresh(slots + (first + i) * thread.blocks() + block);
        value = i >= maxima ? value + other : other > value ? other : value;
      }
      const uint64_t all = this->combined(value, i < maxima);
      if (this->lane() == 0) {
        shared.totals[first + i] = all;
      }
    }
    thread.barrier();
  }

  // As Cluster's. Its counter is the last of the words.
  EK_HOST_DEVICE Listed gather(int count, int chunk) {
    uint64_t* list = exchange_ + words_;
    thread.barrier();
    const uint32_t mine = shared.listed;
    if (thread.index() == 0 && mine != 0) {
      shared.list_begin = static_cast<uint32_t>(thread.fetch_add_global(exchange_ + words_ - 1, mine));
    }
    thread.barrier();
    const auto index = static_cast<uint32_t>(thread.index());
    if (index < mine) {
      const uint32_t* entry = shared.words + kRadixBins + 2 * index;
      uint64_t* to = list + 2 * (shared.list_begin + index);
      to[0] = entry[0];
      to[1] = static_cast<uint64_t>(int64_t{thread.block()} * chunk + entry[1]);
    }
    thread.grid_sync();
    if (thread.index() >= count) {
      return {0, -1};
    }
    return {static_cast<uint32_t>(thread.read_fresh(list + 2 * index)),
            static_cast<int64_t>(thread.read_fresh(list + 2 * index + 1))};
  }

 private:
  uint64_t* exchange_;
  int words_, begin_ = 0, next_ = 0;
  bool cleared_;
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

// Consecutive values of a tensor, which one load fetches where the address allows it.
template <class T>
struct alignas(sizeof(T) * kQuad > 16 ? 16 : sizeof(T) * kQuad) Quad {
  T value[kQuad];

  static EK_HOST_DEVICE bool at(const T* address) { return reinterpret_cast<uintptr_t>(address) % alignof(Quad) == 0; }
  EK_HOST_DEVICE bool operator[](int j) const { return value[j] != 0; }
};
// The values from `at` on: `vector`: a whole quad at a fit address; else `count` of them, and 0 beyond.
template <class T>
EK_HOST_DEVICE Quad<T> read_quad(const T* values, int64_t at, int count, bool vector) {
  if (vector) {
    return *reinterpret_cast<const Quad<T>*>(values + at);
  }
  Quad<T> quad = {};
#pragma unroll
  for (int j = 0; j < kQuad; ++j) {
    if (j < count) {
      quad.value[j] = values[at + j];
    }
  }
  return quad;
}
template <class T>
EK_HOST_DEVICE void write_quad(T* values, int64_t at, int count, bool vector, const Quad<T>& quad) {
  if (vector) {
    *reinterpret_cast<Quad<T>*>(values + at) = quad;
    return;
  }
#pragma unroll
  for (int j = 0; j < kQuad; ++j) {
    if (j < count) {
      values[at + j] = quad.value[j];
    }
  }
}
// Bool bytes; those of a mask that is not given are `otherwise`.
EK_HOST_DEVICE Quad<uint8_t> read_mask(const uint8_t* mask, int64_t at, int count, bool vector, uint8_t otherwise) {
  Quad<uint8_t> quad = {{otherwise, otherwise, otherwise, otherwise}};
  if (mask != nullptr) {
    quad = read_quad(mask, at, count, vector);
  }
  return quad;
}

// The quads of a thread. What is made of the first kHeld stays in its registers and of those up to keep.quads() in the
// block's shared memory; others are loaded whenever they are used.
//   Keep::Held   what is made of a quad
//   keep.put(quad, held), keep.get(quad)   each thread its own
template <class Keep, int kHeld, class Group>
class ThreadQuads {
 public:
  using Held = typename Keep::Held;
  static constexpr int kThreads = Group::kThreads, kInFlight = sizeof(Held) > 48 ? 1 : Group::kInFlight;

  // `vectors`: all quads but the last of the batch lie at fit addresses.
  EK_HOST_DEVICE ThreadQuads(const Group& group, const Keep& keep, int tokens, bool vectors)
      : keep_(keep), first_(group.thread.index()), quads_((tokens + kQuad - 1) / kQuad),
        kept_(keep.quads() < quads_ ? keep.quads() : quads_), whole_(vectors ? tokens / kQuad : 0) {}

  // make(quad, load(quad, vector)) of all quads, then use(quad, what was made, which it may change).
  template <class Load, class Make, class Use>
  EK_HOST_DEVICE void take(const Load& load, const Make& make, const Use& use) {
#pragma unroll
    for (int j = 0; j < kHeld; ++j) {
      if (number(j) < quads_) {
        held_[j] = make(number(j), load(number(j), number(j) < whole_));
      }
    }
    use_held(use);
    use_loaded(number(kHeld), load, make, use);
  }
  // Again. `load` and `make` are for those that are not kept.
  template <bool kChanges = false, class Load, class Make, class Use>
  EK_HOST_DEVICE void each(const Load& load, const Make& make, const Use& use) {
    use_held(use);
    int quad = number(kHeld);
#pragma unroll 2
    for (; quad < kept_; quad += kThreads) {
      Held held = keep_.get(quad);
      use(quad, held);
      if constexpr (kChanges) {
        keep_.put(quad, held);
      }
    }
    use_loaded(quad, load, make, use);
  }
  EK_HOST_DEVICE bool whole(int quad) const { return quad < whole_; }
  EK_HOST_DEVICE bool kept(int quad) const { return quad < kHeld * kThreads || quad < kept_; }

 private:
  EK_HOST_DEVICE int number(int j) const { return first_ + j * kThreads; }

  template <class Use>
  EK_HOST_DEVICE void use_held(const Use& use) {
#pragma unroll
    for (int j = 0; j < kHeld; ++j) {
      if (number(j) < quads_) {
        use(number(j), held_[j]);
      }
    }
  }
  template <class Load, class Make, class Use>
  EK_HOST_DEVICE void use_loaded(int quad, const Load& load, const Make& make, const Use& use) {
    const auto use_one = [&](int number, const auto& loaded) {
      Held made = make(number, loaded);
      use(number, made);
      if (number < kept_) {
        keep_.put(number, made);
      }
    };
#pragma unroll 1
    for (; quad + (kInFlight - 1) * kThreads < whole_; quad += kInFlight * kThreads) {
      decltype(load(0, true)) loaded[kInFlight];
#pragma unroll
      for (int j = 0; j < kInFlight; ++j) {
        loaded[j] = load(quad + j * kThreads, true);
      }
#pragma unroll
      for (int j = 0; j < kInFlight; ++j) {
        use_one(quad + j * kThreads, loaded[j]);
      }
    }
#pragma unroll 1
    for (; quad < quads_; quad += kThreads) {
      use_one(quad, load(quad, quad < whole_));
    }
  }

  Keep keep_;
  int first_, quads_, kept_, whole_;
  Held held_[kHeld];
};

}  // namespace entropy_kernels::cuda

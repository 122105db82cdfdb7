// The tokens of a launch whose blocks work together: each block has a chunk of the batch, each thread every so many quads
// of it, of which the first stay in its registers and the next in shared memory.
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace entropy_kernels::cuda {

constexpr int kLanes = 32;
constexpr int kQuad = 4;       // consecutive tokens that a thread takes side by side
constexpr int kHeldQuads = 1;  // of a thread, in its registers
constexpr int kBlockThreads = 1024;

// Shared memory for what is made of the quads that no register holds, of 16 bytes at least at an address of 16.
struct KeptMemory {
  unsigned char* memory;
  int quads;  // of a block, those in registers among them
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
//   Blocks       block_sums.h's or grid_counts.h's
template <class Keep, int kHeld, class Blocks>
class ThreadQuads {
 public:
  using Held = typename Keep::Held;
  static constexpr int kThreads = Blocks::kThreads, kInFlight = sizeof(Held) > 48 ? 1 : Blocks::kInFlight;

  // `vectors`: all quads but the last of the batch lie at fit addresses.
  EK_HOST_DEVICE ThreadQuads(const Blocks& blocks, const Keep& keep, int tokens, bool vectors)
      : keep_(keep), first_(blocks.thread.index()), quads_((tokens + kQuad - 1) / kQuad),
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
    use_loaded<kInFlight, true>(number(kHeld), load, make, use);
  }
  // Again. `load` and `make` are for those that are not kept.
  template <bool kChanges = false, class Load, class Make, class Use>
  EK_HOST_DEVICE void each(const Load& load, const Make& make, const Use& use) {
    use_held(use);
    int quad = number(kHeld);
#pragma unroll kInFlight
    for (; quad < kept_; quad += kThreads) {
      Held held = keep_.get(quad);
      use(quad, held);
      if constexpr (kChanges) {
        keep_.put(quad, held);
      }
    }
    use_loaded<1, false>(quad, load, make, use);
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
  template <int kAtOnce, bool kPuts, class Load, class Make, class Use>
  EK_HOST_DEVICE void use_loaded(int quad, const Load& load, const Make& make, const Use& use) {
    const auto use_one = [&](int number, const auto& loaded) {
      Held made = make(number, loaded);
      use(number, made);
      if (kPuts && number < kept_) {
        keep_.put(number, made);
      }
    };
#pragma unroll 1
    for (; kAtOnce > 1 && quad + (kAtOnce - 1) * kThreads < whole_; quad += kAtOnce * kThreads) {
      decltype(load(0, true)) loaded[kAtOnce];
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        loaded[j] = load(quad + j * kThreads, true);
      }
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
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

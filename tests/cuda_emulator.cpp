// The kernels of csrc/cuda on the CPU, for tests (cuda_emulator.py): a fiber per thread, resumed in random order, copies
// that arrive at random times. A barrier too few, an index too far or a stage refilled too early gives wrong numbers.
// What it cannot show: memory ordering between threads, the PTX of device_thread.h, and speed.
#include <algorithm>
#include <bit>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

// ex2.approx.ftz.f32, off by so many ulps. Exact is only 2^0; what is below the smallest normal number is 0.
static int exp2_ulps = 0;
static float emulated_exp2(float t) {
  const float e = std::exp2(t);
  if (e < FLT_MIN) return 0;
  return t == 0 || !std::isfinite(e) ? e : std::bit_cast<float>(std::bit_cast<std::int32_t>(e) + exp2_ulps);
}
#define EK_EMULATED_EXP2 emulated_exp2

#include "cuda/token_stats_kernels.h"
#include "cuda_fibers.h"

namespace entropy_kernels::cuda {
namespace {

struct Mbarrier {
  int expected, pending;
  long bytes;
  long phase;
  bool published;

  void settle() {
    if (pending > 0 || bytes > 0) return;
    pending = expected;
    ++phase;
  }
};

struct Warp {
  Rendezvous rendezvous{kWarp};
  double slots[2][kWarp];
};

struct Group;

struct Block {
  Group& group;
  Rendezvous rendezvous;
  std::vector<Warp> warps;
  std::vector<unsigned char> shared;

  Block(Group& group_, int threads, std::size_t shared_bytes)
      : group(group_), rendezvous{threads}, warps(threads / kWarp), shared(shared_bytes + 16, 0xff) {}
  unsigned char* memory() {
    return shared.data() + (16 - reinterpret_cast<std::uintptr_t>(shared.data()) % 16) % 16;
  }
};

struct Group {
  Scheduler scheduler;
  Rendezvous cluster;
  std::vector<std::unique_ptr<Block>> blocks;

  Group(std::mt19937_64& random, int blocks_, int threads, std::size_t shared_bytes)
      : scheduler(random, blocks_, threads), cluster{blocks_ * threads} {
    for (int i = 0; i < blocks_; ++i) blocks.push_back(std::make_unique<Block>(*this, threads, shared_bytes));
  }
};

class HostThread {
 public:
  using Barrier = Mbarrier;

  HostThread(Block& block, int block_index, int index, int count)
      : block_(block), block_index_(block_index), index_(index), count_(count) {}

  int index() const { return index_; }
  int count() const { return count_; }
  int block() const { return block_index_; }

  void barrier() { meet(block_.rendezvous); }
  template <typename T>
  T shuffle_xor(T value, int mask) {
    double* slots = warp().slots[shuffles_++ % 2];
    slots[index_ % kWarp] = value;
    meet(warp().rendezvous);
    return static_cast<T>(slots[index_ % kWarp ^ mask]);
  }

  Words read(const Words* p) const { return read_once(p); }
  Words read_once(const Words* p) const {
    require(reinterpret_cast<std::uintptr_t>(p) % 16 == 0, "a vector load from a misaligned address");
    return *p;
  }
  void write(Words* p, Words v) const {
    require(reinterpret_cast<std::uintptr_t>(p) % 16 == 0, "a vector store to a misaligned address");
    *p = v;
  }
  template <typename T>
  SoftmaxState<T> read_fresh(const SoftmaxState<T>& s) const {
    return s;
  }
  unsigned count_up(unsigned* counter) const { return (*counter)++; }

  void initialise(Barrier& barrier, int arrivals) const { barrier = {arrivals, arrivals, 0, 0, false}; }
  void publish_barriers() { published_ = true; }
  void arrive(Barrier& barrier) const {
    require(barrier.pending > 0, "more arrivals than the barrier expects");
    --barrier.pending;
    barrier.settle();
  }
  void wait(Barrier& barrier, int parity) {
    block_.group.scheduler.wait([&barrier, parity] { return (barrier.phase & 1) != parity; });
  }
  void reads_before_copies() { ordered_ = true; }
  void copy(Words* to, const Words* from, int bytes, Barrier& barrier) {
    require(published_, "a copy before the barriers were published");
    require(barrier.phase == 0 || ordered_, "a copy over what was read, without a fence behind the reads");
    ordered_ = false;
    require(bytes > 0 && bytes % 16 == 0 && reinterpret_cast<std::uintptr_t>(to) % 16 == 0 &&
                reinterpret_cast<std::uintptr_t>(from) % 16 == 0,
            "a bulk copy of an odd size or from or to a misaligned address");
    require(barrier.pending > 0, "a second copy into a stage that is not there yet");
    barrier.bytes += bytes;
    --barrier.pending;
    block_.group.scheduler.later([=, &barrier] {
      memcpy(to, from, bytes);
      barrier.bytes -= bytes;
      barrier.settle();
    });
  }

  void cluster_arrive_relaxed() { cluster_arrive(); }
  void cluster_arrive() { arrived_at_ = block_.group.cluster.arrive(); }
  void cluster_wait() {
    const Rendezvous& cluster = block_.group.cluster;
    block_.group.scheduler.wait([this, &cluster] { return cluster.generation > arrived_at_; });
  }
  template <typename T>
  T* in_block(T* shared, unsigned rank) {
    require(block_.group.cluster.generation > 0, "another block's shared memory before it is known to run");
    const std::ptrdiff_t offset = reinterpret_cast<unsigned char*>(shared) - block_.memory();
    return reinterpret_cast<T*>(block_.group.blocks[rank]->memory() + offset);
  }

 private:
  Warp& warp() { return block_.warps[index_ / kWarp]; }
  void meet(Rendezvous& rendezvous) {
    const long mine = rendezvous.arrive();
    block_.group.scheduler.wait([&rendezvous, mine] { return rendezvous.generation > mine; });
  }

  Block& block_;
  int block_index_, index_, count_;
  unsigned shuffles_ = 0;
  bool published_ = false, ordered_ = false;
  long arrived_at_ = 0;
};

// Runs body(thread, shared memory) for every thread of the grid, `together` blocks at a time, in random order.
template <class Body>
void launch(int blocks, int together, int threads, std::size_t shared_bytes, std::uint64_t seed, const Body& body) {
  std::mt19937_64 random(seed);
  std::vector<int> groups(blocks / together);
  std::iota(groups.begin(), groups.end(), 0);
  std::shuffle(groups.begin(), groups.end(), random);
  for (const int g : groups) {
    Group group(random, together, threads, shared_bytes);
    std::vector<HostThread> all;
    all.reserve(together * threads);
    for (int b = 0; b < together; ++b) {
      for (int i = 0; i < threads; ++i) {
        all.emplace_back(*group.blocks[b], g * together + b, i, threads);
        HostThread& thread = all.back();
        group.scheduler.add([&thread, &body, memory = group.blocks[b]->memory()] { body(thread, memory); });
      }
    }
    group.scheduler.run();
  }
}

template <class E, bool kSecondMoments, bool kSoftcap, class Source>
void forward(const ForwardArguments<typename E::Accumulator>& arguments, int threads, std::uint64_t seed) {
  using Shared = ForwardShared<typename E::Accumulator>;
  constexpr std::size_t kOffset = (sizeof(Shared) + 15) / 16 * 16;
  std::size_t bytes = kOffset;
  if constexpr (Source::kBulk) bytes += sizeof(typename Source::Shared);
  launch(arguments.problem.rows * arguments.parts, Source::kBulk ? arguments.parts : 1, threads, bytes, seed,
         [&](HostThread& thread, unsigned char* memory) {
           forward_block<E, kSecondMoments, kSoftcap, Source>(
               thread, arguments, *reinterpret_cast<Shared*>(memory),
               reinterpret_cast<typename Source::Shared*>(memory + kOffset));
         });
}

struct Call {  // mirrored by cuda_emulator.py
  std::int32_t element, bulk, threads, parts, vectors, reversed;
  std::int32_t blocks;  // of a backward pass that run, the first ones
  std::uint64_t seed;
  void* logits;
  std::int64_t batch_stride, length_stride, column_stride;
  std::int32_t rows, length, vocab, columns;
  const void* target;
  std::int32_t wide_target, temperature_stride;
  const void* temperature;
  std::int32_t number;  // the temperature is handed over by value
  RowOptions options;
  std::int64_t want;
  void* stats;
  const void* grad_stats;
  std::int64_t statistic_stride, grad_row_stride;
  void* state;
  std::int64_t field_stride, row_stride;
  void* dlogits;
  std::int64_t out_batch_stride, out_length_stride, out_column_stride;
};

template <typename T>
Problem<T> problem_of(const Call& c) {
  return {{c.logits, c.batch_stride, c.length_stride, c.column_stride},
          c.rows, c.length, c.vocab, c.columns, {c.target, c.wide_target != 0},
          c.number != 0 ? nullptr : static_cast<const T*>(c.temperature), c.temperature_stride,
          c.number != 0 ? *static_cast<const T*>(c.temperature) : T(0), c.options};
}

template <class E>
void forward_call(const Call& c) {
  using T = typename E::Accumulator;
  std::vector<SoftmaxState<T>> part_states(static_cast<std::size_t>(c.rows) * c.parts);
  std::vector<unsigned> counters(c.rows, 0);
  const RowOutputs<T> outputs = {static_cast<T*>(c.stats), static_cast<T*>(c.state), c.rows, c.want};
  const ForwardArguments<T> arguments = {problem_of<T>(c), outputs,           c.parts, c.vectors != 0,
                                         part_states.data(), counters.data()};
  const auto run = [&]<bool kSecondMoments, bool kSoftcap>() {
    c.bulk ? forward<E, kSecondMoments, kSoftcap, BulkSource<E, HostThread>>(arguments, c.threads, c.seed)
           : forward<E, kSecondMoments, kSoftcap, DirectSource<E, HostThread>>(arguments, c.threads, c.seed);
  };
  if (outputs.second_order()) {
    c.options.softcap > 0 ? run.template operator()<true, true>() : run.template operator()<true, false>();
  } else {
    c.options.softcap > 0 ? run.template operator()<false, true>() : run.template operator()<false, false>();
  }
}

template <class E>
void backward_call(const Call& c) {
  using T = typename E::Accumulator;
  const BackwardArguments<T> arguments = {
      problem_of<T>(c),
      {static_cast<const T*>(c.grad_stats), c.statistic_stride, c.grad_row_stride, c.want},
      {static_cast<const T*>(c.state), c.field_stride, c.row_stride},
      {c.dlogits, c.out_batch_stride, c.out_length_stride, c.out_column_stride},
      c.parts,
      c.vectors != 0,
      c.reversed != 0};
  launch(c.blocks, 1, c.threads, 0, c.seed, [&](HostThread& thread, unsigned char*) {
    c.options.softcap > 0 ? backward_block<E, true>(thread, arguments) : backward_block<E, false>(thread, arguments);
  });
}

template <class Run>
const char* for_element(const Call& call, const Run& run) {
  return guarded([&] {
    switch (static_cast<Element>(call.element)) {
      case Element::kFloat32:
        run(Float32{});
        break;
      case Element::kBFloat16:
        run(BFloat16{});
        break;
      case Element::kFloat16:
        run(Float16{});
        break;
      case Element::kFloat64:
        run(Float64{});
    }
  });
}

}  // namespace
}  // namespace entropy_kernels::cuda

extern "C" void emulate_exp2_ulps(int ulps) { exp2_ulps = ulps; }

// Both return null, or what went wrong.
extern "C" const char* emulate_forward(const entropy_kernels::cuda::Call* call) {
  return entropy_kernels::cuda::for_element(*call, [&]<class E>(E) { entropy_kernels::cuda::forward_call<E>(*call); });
}
extern "C" const char* emulate_backward(const entropy_kernels::cuda::Call* call) {
  return entropy_kernels::cuda::for_element(*call, [&]<class E>(E) { entropy_kernels::cuda::backward_call<E>(*call); });
}

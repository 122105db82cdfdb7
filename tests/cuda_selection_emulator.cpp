// The selection kernels of csrc/cuda on the CPU, for tests (cuda_selection_emulator.py): a fiber per thread, resumed in
// random order. A barrier too few gives wrong numbers; memory ordering, PTX and speed do not show.
#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <memory>
#include <numeric>
#include <string>
#include <vector>

#include "cuda/budget_kernels.h"
#include "cuda/covariance_kernels.h"
#include "cuda/selection_kernels.h"
#include "cuda_fibers.h"

namespace entropy_kernels::cuda {
namespace {

constexpr int kEmulatedThreads = 64;

struct Warp {
  Rendezvous rendezvous{kLanes};
  std::array<std::array<uint64_t, kLanes>, 2> slots;
};

// A block's shared memory, and behind it room for what is kept of its tokens.
struct Block {
  Rendezvous rendezvous{kEmulatedThreads};
  std::array<Warp, kEmulatedThreads / kLanes> warps;
  std::vector<unsigned char> shared;
};

struct Launch {
  Scheduler scheduler;
  Rendezvous rendezvous;
  std::vector<Block> blocks;

  Launch(std::mt19937_64& random, int count, std::size_t shared_bytes)
      : scheduler(random, count, kEmulatedThreads), rendezvous{count * kEmulatedThreads}, blocks(count) {
    for (Block& block : blocks) block.shared.assign(shared_bytes, 0xff);
  }
};

class EmulatedThread {
 public:
  static constexpr int kThreads = kEmulatedThreads;

  EmulatedThread(Launch& launch, int block, int index) : launch_(launch), block_(block), index_(index) {}

  int index() const { return index_; }
  int block() const { return block_; }
  int blocks() const { return static_cast<int>(launch_.blocks.size()); }

  void barrier() { meet(own().rendezvous); }
  void cluster_sync() { meet(launch_.rendezvous); }
  void grid_sync() { meet(launch_.rendezvous); }
  void grid_arrive() { arrival_ = launch_.rendezvous.arrive(); }
  void grid_wait() {
    launch_.scheduler.wait([this] { return launch_.rendezvous.generation > arrival_; });
  }

  uint32_t ballot(bool value) {
    const auto& slots = exchange(value);
    uint32_t bits = 0;
    for (int lane = 0; lane < kLanes; ++lane) bits |= static_cast<uint32_t>(slots[lane]) << lane;
    return bits;
  }
  template <class T>
  T shuffle(T value, int lane) {
    require(lane >= 0 && lane < kLanes, "a shuffle from no lane");
    return static_cast<T>(exchange(static_cast<uint64_t>(value))[lane]);  // of whole numbers
  }
  template <class T>
  T shuffle_up(T value, int distance) {
    const int lane = index_ % kLanes;
    return shuffle(value, lane < distance ? lane : lane - distance);
  }
  template <class T>
  T shuffle_xor(T value, int mask) {
    return shuffle(value, index_ % kLanes ^ mask);
  }

  uint32_t warp_maximum(uint32_t value) {
    const auto& slots = exchange(value);
    return static_cast<uint32_t>(*std::max_element(slots.begin(), slots.end()));
  }
  uint32_t warp_sum(uint32_t value) {
    const auto& slots = exchange(value);
    return static_cast<uint32_t>(std::accumulate(slots.begin(), slots.end(), uint64_t{0}));
  }

  void add(uint32_t* shared, uint32_t value) {
    require_own(shared);
    *shared += value;
  }
  uint32_t fetch_add(uint32_t* shared, uint32_t value) {
    add(shared, value);
    return *shared - value;
  }
  void add_global(uint64_t* to, uint64_t value) { *to += value; }
  uint64_t fetch_add_global(uint64_t* to, uint64_t value) {
    *to += value;
    return *to - value;
  }
  template <class T>
  T read_fresh(const T* from) {
    return *from;
  }

  template <class T>
  T read_in_block(const T* shared, int block) {
    require(launch_.rendezvous.generation > 0, "another block's shared memory before it is known to run");
    require(block >= 0 && block < blocks(), "shared memory of no block");
    const auto offset = reinterpret_cast<const unsigned char*>(shared) - own().shared.data();
    return *reinterpret_cast<const T*>(launch_.blocks[block].shared.data() + offset);
  }

 private:
  Block& own() { return launch_.blocks[block_]; }
  void require_own(const void* shared) {
    const auto offset = static_cast<const unsigned char*>(shared) - own().shared.data();
    require(offset >= 0 && offset < static_cast<std::ptrdiff_t>(own().shared.size()), "not this block's shared memory");
  }
  void meet(Rendezvous& rendezvous) {
    const long mine = rendezvous.arrive();
    launch_.scheduler.wait([&rendezvous, mine] { return rendezvous.generation > mine; });
  }
  // What all lanes of the warp give. Two sets of slots: a lane may give again before others have read.
  const std::array<uint64_t, kLanes>& exchange(uint64_t value) {
    Warp& warp = own().warps[index_ / kLanes];
    auto& slots = warp.slots[exchanges_++ % 2];
    slots[index_ % kLanes] = value;
    meet(warp.rendezvous);
    return slots;
  }

  Launch& launch_;
  int block_, index_;
  unsigned exchanges_ = 0;
  long arrival_ = 0;
};

// Runs body(thread, shared memory) in every thread of blocks that are resident together.
template <class Body>
void run(int blocks, std::size_t shared_bytes, uint64_t seed, const Body& body) {
  std::mt19937_64 random(seed);
  Launch launch(random, blocks, shared_bytes);
  std::vector<EmulatedThread> threads;
  threads.reserve(blocks * kEmulatedThreads);
  for (int block = 0; block < blocks; ++block) {
    for (int i = 0; i < kEmulatedThreads; ++i) {
      EmulatedThread& thread = threads.emplace_back(launch, block, i);
      launch.scheduler.add([&, block] { body(thread, launch.blocks[block].shared.data()); });
    }
  }
  launch.scheduler.run();
}

struct SelectionShared {
  CountsShared counts;
  SearchShared search;
  alignas(16) unsigned char kept[kEmulatedThreads * 2 * KeyKeep<0>::kBytes];
};
template <class T>
struct CovarianceShared {
  SumsShared sums;
  alignas(16) unsigned char kept[kEmulatedThreads * 2 * PairKeep<T, 0>::kBytes];
};
// A quad of a thread is held, two are kept, and in large batches some are neither.
constexpr int kKept = (kHeldQuads + 2) * kEmulatedThreads;

struct Call {  // mirrored by cuda_selection_emulator.py
  int32_t cluster, blocks, chunk;  // cluster: of the covariance alone
  uint64_t order;
  const void *mask, *exclude, *index, *seed;
  int32_t seed_number;  // the seed is handed over by value
  int64_t tokens;
  double ratio;
  int64_t k;
  int32_t at_least_one;
  double low, high;
  int32_t quantile, closed;
  const void* numbers;
  const void *first, *second;  // covariance; or log-probs and advantages
  int32_t float64;
  void* out;
};

SelectionArguments selection_of(const Call& call) {
  const auto* numbers = static_cast<const double*>(call.numbers);
  const TokenView view = {static_cast<const float*>(call.first), static_cast<const uint8_t*>(call.mask),
                          static_cast<const uint8_t*>(call.exclude), static_cast<const int64_t*>(call.index),
                          call.tokens};
  const Count count = {call.ratio, call.k, call.at_least_one != 0, numbers};
  const auto* seed = static_cast<const int64_t*>(call.seed);
  // without a seed there are no bounds, and whoever reads them shall notice
  const auto* bounds = seed != nullptr ? numbers : reinterpret_cast<const double*>(8);
  const Band band = {call.low, call.high, call.quantile != 0, call.closed != 0, bounds};
  const Seed given = seed != nullptr && call.seed_number != 0 ? Seed{*seed, nullptr} : Seed{0, seed};
  const Selection selection = {view, count, seed != nullptr, given, band};
  return {selection, call.chunk, kKept, static_cast<uint8_t*>(call.out), nullptr, nullptr};
}

void select(const Call& call) {
  SelectionArguments a = selection_of(call);
  std::vector<uint64_t> keys(key_store_bytes(int64_t{call.blocks} * call.chunk) / 8 + 1, ~uint64_t{0});
  a.keys = reinterpret_cast<uint32_t*>(keys.data());
  std::vector<uint64_t> exchange(kSelectionExchange, ~uint64_t{0});
  a.exchange = exchange.data();
  run(call.blocks, sizeof(SelectionShared), call.order, [&](EmulatedThread& thread, unsigned char* memory) {
    auto& shared = *reinterpret_cast<SelectionShared*>(memory);
    GridCounts<EmulatedThread> counts(thread, shared.counts, a.exchange, kSelectionWords);
    Selector<EmulatedThread>(counts, shared.search, a, shared.kept).run();
  });
}

void select_by_budget(const Call& call) {
  std::vector<uint64_t> exchange(budget_exchange(call.blocks), ~uint64_t{0});
  const BudgetArguments a = {selection_of(call).selection.view, {0, 0, 0, static_cast<const double*>(call.numbers)}, call.chunk,
                             static_cast<uint8_t*>(call.out), exchange.data()};
  run(call.blocks, sizeof(BudgetShared), call.order, [&](EmulatedThread& thread, unsigned char* memory) {
    BudgetSelector<EmulatedThread>(thread, *reinterpret_cast<BudgetShared*>(memory), a).run();
  });
}

template <class T>
void covariance(const Call& call) {
  std::vector<uint64_t> exchange(kSumSlots * call.blocks, ~uint64_t{0});
  const TokenPairs<T> pairs = {static_cast<const T*>(call.first), static_cast<const T*>(call.second),
                               static_cast<const uint8_t*>(call.mask), call.tokens};
  const CovarianceArguments<T> a = {pairs, call.chunk, kKept, static_cast<float*>(call.out), exchange.data()};
  run(call.blocks, sizeof(CovarianceShared<T>), call.order, [&](EmulatedThread& thread, unsigned char* memory) {
    auto& shared = *reinterpret_cast<CovarianceShared<T>*>(memory);
    if (call.cluster != 0) {
      ClusterSums<EmulatedThread> sums(thread, shared.sums);
      covariance_block(sums, a, shared.kept);
      sums.finish();
    } else {
      GridSums<EmulatedThread> sums(thread, shared.sums, a.exchange);
      covariance_block(sums, a, shared.kept);
    }
  });
}

}  // namespace
}  // namespace entropy_kernels::cuda

// They return null, or what went wrong.
extern "C" const char* emulate_selection(const entropy_kernels::cuda::Call* call) {
  return entropy_kernels::cuda::guarded([&] { entropy_kernels::cuda::select(*call); });
}
extern "C" const char* emulate_budget(const entropy_kernels::cuda::Call* call) {
  return entropy_kernels::cuda::guarded([&] { entropy_kernels::cuda::select_by_budget(*call); });
}
extern "C" const char* emulate_covariance(const entropy_kernels::cuda::Call* call) {
  return entropy_kernels::cuda::guarded([&] {
    call->float64 ? entropy_kernels::cuda::covariance<double>(*call) : entropy_kernels::cuda::covariance<float>(*call);
  });
}

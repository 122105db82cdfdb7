// A mask by a budget in one launch: the rounds of backends/radix_select.py, with sums of 64 bits in the place of counts.
// Blocks that are resident together add them in global memory and meet once per round; all know the same search state, so
// they branch alike. A token is read again in every round, from L2 where the batch fits it. Nothing here depends on how
// tokens are spread over blocks. Thread: as in block_sums.h.
#pragma once

#include <cstdint>

#include "common/budget.h"
#include "common/radix_select.h"
#include "common/selection.h"
#include "cuda/token_quads.h"

namespace entropy_kernels::cuda {

struct BudgetArguments {
  TokenView view;
  Budget budget;
  int chunk;  // tokens per block
  uint8_t* selected;
  uint64_t* exchange;  // budget_exchange(blocks) words, whatever they hold
};

// Sums of three rounds for the keys, counts of one for each digit of a tie, the sum over all that counts; and the extremes
// of each block.
constexpr int kBudgetWords = (kKeyRounds + 6) * kRadixBins + 1;
constexpr int64_t budget_exchange(int64_t blocks) { return kBudgetWords + 2 * blocks; }

struct BudgetShared {
  uint32_t low[kRadixBins], high[kRadixBins];  // this block's sums
  uint64_t warps[kLanes];
  struct {
    uint32_t digit;
    int64_t above, equal;
  } found;
};

template <class Thread>
class BudgetSelector {
 public:
  static constexpr int kThreads = Thread::kThreads;

  EK_HOST_DEVICE BudgetSelector(Thread& thread, BudgetShared& shared, const BudgetArguments& arguments)
      : thread_(thread), shared_(shared), arguments_(arguments), view_(arguments.view), budget_(arguments.budget.read()),
        share_(thread.block(), arguments.chunk, view_.tokens) {}

  // Writes the mask of the block's tokens.
  EK_HOST_DEVICE void run() {
    clear();
    const int64_t exponent = find_exponent();
    scale_ = power_of_two(exponent);
    add_first_digits();
    Search search{0, 0, 0};
    next_digit(0, key_bits(0), search, [&](int64_t candidates) {
      const auto total = static_cast<int64_t>(thread_.read_fresh(arguments_.exchange + kTotal));
      const int64_t bound = budget_.of(exponent, total, candidates);
      return bound < candidates ? bound : candidates;
    });
    uint64_t last_tie = 0;
    const TieOrder order = view_.index != nullptr ? TieOrder::of_indices() : TieOrder::of_positions(view_.tokens);
    if (search.need > 0) {
#pragma unroll 1
      for (int round = 1; round < kKeyRounds; ++round) {
        add_digits(round, search.prefix);
        next_digit(round, key_bits(round), search, [&](int64_t) { return search.need; });
      }
      // Ties have one weight: from here on they are counted
      const int64_t weight = key_weight(static_cast<uint32_t>(search.prefix), scale_);
      const int64_t need = (search.need + weight - 1) / weight;
      if (need < search.equal / weight) {
        last_tie = find_last_tie(order, static_cast<uint32_t>(search.prefix), need);
      }
    }
    write(search.need > 0, static_cast<uint32_t>(search.prefix), order, last_tie);
  }

 private:
  static constexpr int kTotal = kBudgetWords - 1;

  // The digits found so far of the key that is searched, how much of what shares them is needed, how much there is.
  struct Search {
    uint64_t prefix;
    int64_t need, equal;
  };

  struct Token {
    float score;
    bool counts, kept;

    EK_HOST_DEVICE int32_t magnitude() const { return Magnitude<float>::of(score, counts); }
    EK_HOST_DEVICE bool finite() const { return counts && magnitude() < kInfinityBits; }
    EK_HOST_DEVICE bool candidate() const { return finite() && kept && score > 0.0f; }
    EK_HOST_DEVICE uint32_t key() const { return ordered_key(score); }
  };
  static constexpr int32_t kInfinityBits = 0x7f800000;

  EK_HOST_DEVICE int lane() const { return thread_.index() % kLanes; }
  EK_HOST_DEVICE int warp() const { return thread_.index() / kLanes; }
  EK_HOST_DEVICE int64_t token_index(int i) const { return view_.token_index(share_.begin + i); }

  EK_HOST_DEVICE Token load(int i) const {
    const int64_t position = share_.begin + i;
    return {view_.covariance[position], view_.mask == nullptr || view_.mask[position] != 0,
            view_.exclude == nullptr || view_.exclude[position] == 0};
  }
  // use(token of this block, what it is); a thread loads kInFlight before it looks at the first.
  template <class Use>
  EK_HOST_DEVICE void for_tokens(const Use& use) const {
    constexpr int kInFlight = 4;
#pragma unroll 1
    for (int first = thread_.index(); first < share_.tokens; first += kInFlight * kThreads) {
      Token loaded[kInFlight] = {};
#pragma unroll
      for (int j = 0; j < kInFlight; ++j) {
        if (first + j * kThreads < share_.tokens) {
          loaded[j] = load(first + j * kThreads);
        }
      }
#pragma unroll
      for (int j = 0; j < kInFlight; ++j) {
        if (first + j * kThreads < share_.tokens) {
          use(first + j * kThreads, loaded[j]);
        }
      }
    }
  }

  EK_HOST_DEVICE void clear() {
    for (int bin = thread_.index(); bin < kRadixBins; bin += kThreads) {
      shared_.low[bin] = shared_.high[bin] = 0;
    }
    const int all = thread_.blocks() * kThreads;
    for (int i = thread_.block() * kThreads + thread_.index(); i < kBudgetWords; i += all) {
      arguments_.exchange[i] = 0;
    }
  }

  // The sum over the block's threads, or their largest value, in all of them.
  EK_HOST_DEVICE uint64_t over_block(uint64_t value, bool maximum) {
    const auto over_warp = [&](uint64_t mine) {
      for (int mask = kLanes / 2; mask > 0; mask /= 2) {
        const uint64_t other = thread_.shuffle_xor(mine, mask);
        mine = !maximum ? mine + other : other > mine ? other : mine;
      }
      return mine;
    };
    value = over_warp(value);
    thread_.barrier();  // the last result has been read
    if (lane() == 0) {
      shared_.warps[warp()] = value;
    }
    thread_.barrier();
    return over_warp(lane() < kThreads / kLanes ? shared_.warps[lane()] : 0);
  }

  // The blocks meet for the first time.
  EK_HOST_DEVICE int64_t find_exponent() {
    uint64_t* const of_blocks = arguments_.exchange + kBudgetWords;
    uint64_t largest = 0, valid = 0;
    for_tokens([&](int, const Token& token) {
      const auto magnitude = static_cast<uint64_t>(token.finite() ? token.magnitude() : 0);
      largest = magnitude > largest ? magnitude : largest;
      valid += token.counts;
    });
    largest = over_block(largest, true);
    valid = over_block(valid, false);
    if (thread_.index() == 0) {
      of_blocks[2 * thread_.block()] = largest;
      of_blocks[2 * thread_.block() + 1] = valid;
    }
    thread_.grid_sync();
    largest = valid = 0;
    for (int block = thread_.index(); block < thread_.blocks(); block += kThreads) {
      const uint64_t other = thread_.read_fresh(of_blocks + 2 * block);
      largest = other > largest ? other : largest;
      valid += thread_.read_fresh(of_blocks + 2 * block + 1);
    }
    largest = over_block(largest, true);
    valid = over_block(valid, false);
    return fixed_point_exponent(Magnitude<float>::value(static_cast<int32_t>(largest)), static_cast<double>(valid));
  }

  // Two additions of 32 bits, of which the first tells the carry: one of 64 bits is a loop in shared memory.
  EK_HOST_DEVICE void add(uint32_t bin, int64_t value) {
    const auto low = static_cast<uint32_t>(value);
    const uint32_t carry = thread_.fetch_add(shared_.low + bin, low) > ~low;
    const uint32_t high = static_cast<uint32_t>(static_cast<uint64_t>(value) >> 32) + carry;
    if (high != 0) {
      thread_.fetch_add(shared_.high + bin, high);
    }
  }

  // Adds the block's sums to those of a round, and waits until all blocks have.
  EK_HOST_DEVICE void give(int round) {
    thread_.barrier();
    for (int bin = thread_.index(); bin < kRadixBins; bin += kThreads) {
      const uint64_t sum = uint64_t{shared_.high[bin]} << 32 | shared_.low[bin];
      if (sum != 0) {
        thread_.add_global(arguments_.exchange + round * kRadixBins + bin, sum);
        shared_.low[bin] = shared_.high[bin] = 0;
      }
    }
    thread_.grid_sync();
  }

  EK_HOST_DEVICE void add_first_digits() {
    const bool by_limit = budget_.by_limit();
    int64_t total = 0;
    for_tokens([&](int, const Token& token) {
      if (token.finite() && (by_limit || token.candidate())) {
        const int64_t weight = to_fixed_point(token.score, scale_);
        total += weight;
        if (token.candidate()) {
          add(radix_digit(token.key(), key_shift(0), key_bits(0)), weight);
        }
      }
    });
    if (by_limit) {
      const uint64_t sum = over_block(static_cast<uint64_t>(total), false);
      if (thread_.index() == 0) {
        thread_.add_global(arguments_.exchange + kTotal, sum);
      }
    }
    give(0);
  }

  EK_HOST_DEVICE void add_digits(int round, uint64_t prefix) {
    const int shift = key_shift(round), bits = key_bits(round);
    for_tokens([&](int, const Token& token) {
      if (token.candidate() && token.key() >> (shift + bits) == prefix) {
        add(radix_digit(token.key(), shift, bits), to_fixed_point(token.score, scale_));
      }
    });
    give(round);
  }

  // Inclusive sums over the lanes of a warp.
  EK_HOST_DEVICE int64_t sums_up_to(int64_t value) const {
    for (int distance = 1; distance < kLanes; distance *= 2) {
      const int64_t other = thread_.shuffle_up(value, distance);
      value += lane() >= distance ? other : 0;
    }
    return value;
  }

  // The digit at which the sums of a round, from the largest digit on, come to need_of(the sum of all).
  template <class NeedOf>
  EK_HOST_DEVICE void next_digit(int round, int bits, Search& search, const NeedOf& need_of) {
    constexpr int kBins = kRadixBins / kThreads;  // of a thread, the largest digits in thread 0
    const int top = kRadixBins - 1 - thread_.index() * kBins;
    int64_t sums[kBins], sum = 0;
#pragma unroll
    for (int j = 0; j < kBins; ++j) {
      sums[j] = static_cast<int64_t>(thread_.read_fresh(arguments_.exchange + round * kRadixBins + top - j));
      sum += sums[j];
    }
    const int64_t in_warp = sums_up_to(sum);
    if (lane() == kLanes - 1) {
      shared_.warps[warp()] = static_cast<uint64_t>(in_warp);
    }
    thread_.barrier();
    const int64_t warps = sums_up_to(lane() < kThreads / kLanes ? static_cast<int64_t>(shared_.warps[lane()]) : 0);
    const int64_t before = thread_.shuffle(warps, warp() == 0 ? 0 : warp() - 1);
    int64_t above = in_warp - sum + (warp() == 0 ? 0 : before);
    const int64_t need = need_of(thread_.shuffle(warps, kLanes - 1));
    if (above < need && need <= above + sum) {  // in one thread, or in none if nothing is needed
#pragma unroll
      for (int j = 0; j < kBins; ++j) {
        if (above < need && need <= above + sums[j]) {
          shared_.found = {static_cast<uint32_t>(top - j), above, sums[j]};
        }
        above += sums[j];
      }
    }
    thread_.barrier();
    search.need = 0;
    if (need > 0) {
      const auto& found = shared_.found;
      search = {search.prefix << bits | found.digit, need - found.above, found.equal};
    }
  }

  // Of the candidates with the threshold's key, the last tie key that is selected.
  EK_HOST_DEVICE uint64_t find_last_tie(const TieOrder& order, uint32_t threshold, int64_t need) {
    Search search{0, need, 0};
#pragma unroll 1
    for (int round = 0; round < order.rounds; ++round) {
      for_tokens([&](int i, const Token& token) {
        if (token.candidate() && token.key() == threshold) {
          const uint64_t tie = order.key(token_index(i));
          if (order.matches(tie, round, search.prefix)) {
            add(radix_digit(tie, order.shift(round), kRadixBits), 1);
          }
        }
      });
      give(kKeyRounds + round);
      next_digit(kKeyRounds + round, kRadixBits, search, [&](int64_t) { return search.need; });
    }
    return search.prefix;
  }

  EK_HOST_DEVICE void write(bool any, uint32_t threshold, const TieOrder& order, uint64_t last_tie) const {
    for_tokens([&](int i, const Token& token) {
      bool take = any && token.candidate() && token.key() >= threshold;
      if (take && token.key() == threshold && last_tie != 0) {
        take = order.key(token_index(i)) >= last_tie;
      }
      arguments_.selected[share_.begin + i] = take;
    });
  }

  // radix_select.h's arrays have no address on the device
  static constexpr int kShift0 = kKeyShift[0], kShift1 = kKeyShift[1], kShift2 = kKeyShift[2];
  static constexpr int kBits0 = kKeyBits[0], kBits1 = kKeyBits[1], kBits2 = kKeyBits[2];
  static EK_HOST_DEVICE int key_shift(int round) { return round == 0 ? kShift0 : round == 1 ? kShift1 : kShift2; }
  static EK_HOST_DEVICE int key_bits(int round) { return round == 0 ? kBits0 : round == 1 ? kBits1 : kBits2; }

  Thread& thread_;
  BudgetShared& shared_;
  const BudgetArguments& arguments_;
  const TokenView& view_;
  const Budget budget_;
  TokenShare share_;
  double scale_ = 0;
};

}  // namespace entropy_kernels::cuda

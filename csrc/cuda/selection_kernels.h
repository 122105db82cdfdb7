// Clip-Cov and KL-Cov masks in one launch: the n largest keys among the candidates, ties to the lower token index. The
// same rounds as backends/radix_select.py, in every block of a group at once; all blocks know the same search state, so
// they branch alike. Nothing here depends on how tokens are spread over blocks.
#pragma once

#include <cstdint>

#include "common/philox.h"
#include "common/radix_select.h"
#include "common/selection.h"
#include "cuda/block_group.h"

namespace entropy_kernels::cuda {

struct SelectionArguments {
  Selection selection;
  int chunk;  // tokens per block, a multiple of kLanes
  uint8_t* selected;
  // Grid only; the cluster's blocks hold their tokens' keys in shared memory
  uint32_t* keys;
  uint32_t* candidates;
  uint64_t* exchange;
};

// Words that a Grid exchanges at most: three rounds for the quantiles, two searches at a time, three for the keys (the
// first with the number of tokens that count), and one for each digit of a tie.
constexpr int kSelectionExchange = kGroupSlots + 2 * (kRadixBins + 1) + 4 * kRadixBins + 2 * kRadixBins + 6 * kRadixBins;

// The keys of a block's tokens, and a bit for each that is a candidate.
struct KeyStore {
  uint32_t* keys;
  uint32_t* candidates;
};
constexpr int64_t key_store_bytes(int64_t tokens) { return tokens * 4 + tokens / kLanes * 4; }

struct SearchShared {
  struct Found {
    uint32_t digit;
    int64_t above, equal;
  };
  int64_t warps[2][kLanes];
  Found found[2];
};

// The digits found so far of the key that is searched, how many keys that share them are needed, how many there are.
struct Search {
  uint64_t prefix;
  int64_t need, equal;
};

// Inclusive sums over the lanes of a warp.
template <class Thread>
EK_HOST_DEVICE int64_t sums_up_to(Thread& thread, int64_t value) {
  const int lane = thread.index() % kLanes;
  for (int distance = 1; distance < kLanes; distance *= 2) {
    const int64_t other = thread.shuffle_up(value, distance);
    value += lane >= distance ? other : 0;
  }
  return value;
}

template <class Group>
class Selector {
 public:
  static constexpr int kThreads = Group::kThreads;

  EK_HOST_DEVICE Selector(Group& group, SearchShared& shared, const SelectionArguments& arguments, KeyStore store)
      : group_(group), thread_(group.thread), shared_(shared), selection_(arguments.selection),
        view_(arguments.selection.view), selected_(arguments.selected), store_(store),
        share_(group.thread.block(), arguments.chunk, view_.tokens) {}

  // Writes the mask of the block's tokens.
  EK_HOST_DEVICE void run() {
    const bool random = selection_.drawn, of_quantiles = random && selection_.band.quantile;
    const uint64_t seed = random ? selection_.seed.read() : 0;
    KeyBand band = selection_.band.keys();
    take_tokens(random && !of_quantiles, band, seed);
    group_.sum_words(kRadixBins + 1);
    const int64_t valid = group_.word(kRadixBins);
    if (of_quantiles) {
      band = quantile_band();
      rekey(band, seed);
      group_.sum_words(kRadixBins);
    }
    Search search{0, 0, 0};
    first_digit(0, search, [&](int64_t total) {
      const int64_t wanted = selection_.count.of(valid);
      return wanted < total ? wanted : total;
    });
    const bool any = search.need > 0;
    uint64_t last_tie = 0;
    TieOrder order = view_.index != nullptr ? TieOrder::of_indices() : TieOrder::of_positions(view_.tokens);
    if (any) {
      Search searches[1] = {search};
      later_digits(searches);
      search = searches[0];
      if (search.need < search.equal) {
        last_tie = find_last_tie(order, static_cast<uint32_t>(search.prefix), search.need);
      }
    }
    write(any, static_cast<uint32_t>(search.prefix), order, last_tie);
  }

 private:
  struct Token {
    float value;
    bool counts, candidate;
  };
  struct Stored {
    uint32_t key;
    bool candidate;
  };

  // use(token of this block, its key), a warp's lanes together; a lane beyond the last token has no candidate.
  template <class Use>
  EK_HOST_DEVICE void for_stored(const Use& use) {
    for_tokens(
        group_, share_.tokens,
        [&](int i) {
          return Stored{store_.keys[i], (store_.candidates[i / kLanes] >> group_.lane() & 1u) != 0};
        },
        use);
  }

  EK_HOST_DEVICE int64_t token_index(int i) const { return view_.token_index(share_.begin + i); }

  // Stores a token's key and counts its first digit.
  EK_HOST_DEVICE void store(int i, uint32_t key, bool candidate) {
    const uint32_t candidates = thread_.ballot(candidate);
    store_.keys[i] = key;  // for a lane beyond the last token, too: there is room for it
    if (group_.lane() == 0) {
      store_.candidates[i / kLanes] = candidates;
    }
    if (candidate) {
      group_.count(static_cast<int>(radix_digit(key, kKeyShift0, kKeyBits0)));
    }
  }

  EK_HOST_DEVICE void take_tokens(bool random, KeyBand band, uint64_t seed) {
    uint32_t valid = 0;  // of the warp
    for_tokens(
        group_, share_.tokens,
        [&](int i) {
          const int64_t position = share_.begin + i;
          const bool counts = view_.mask == nullptr || view_.mask[position] != 0;
          const bool kept = view_.exclude == nullptr || view_.exclude[position] == 0;
          return Token{view_.covariance[position], counts, counts && kept};
        },
        [&](int i, const Token& token) {
          uint32_t key = ordered_key(token.value);
          bool candidate = token.candidate && token.value == token.value;
          if (random) {
            candidate = candidate && band.contains(key);
            key = candidate ? token_key(static_cast<uint64_t>(token_index(i)), seed) : 0;
          }
          valid += population(thread_.ballot(token.counts));
          store(i, key, candidate);
        });
    if (group_.lane() == 0 && valid != 0) {
      thread_.add(group_.shared.words + kRadixBins, valid);
    }
  }

  // Random keys in place of the covariances of the band.
  EK_HOST_DEVICE void rekey(KeyBand band, uint64_t seed) {
    for_stored([&](int i, const Stored& stored) {
      const bool candidate = stored.candidate && band.contains(stored.key);
      store(i, candidate ? token_key(static_cast<uint64_t>(token_index(i)), seed) : 0, candidate);
    });
  }

  EK_HOST_DEVICE KeyBand quantile_band() {
    const Band& band = selection_.band;
    Search searches[2] = {{0, 0, 0}, {0, 0, 0}};
    first_digit(0, searches[0], [&](int64_t total) { return quantile_rank(total, band.lower()); });
    first_digit(1, searches[1], [&](int64_t total) { return quantile_rank(total, band.upper()); });
    later_digits(searches);
    if (!(band.lower() < band.upper())) {
      return {1, 0};  // empty
    }
    return key_band(static_cast<uint32_t>(searches[0].prefix), static_cast<uint32_t>(searches[1].prefix), band.closed);
  }

  // The digit of the need_of(number of keys)-th largest, from the words of a row. `place` keeps two searches apart.
  template <class NeedOf>
  EK_HOST_DEVICE void next_digit(int row, int place, int bits, Search& search, const NeedOf& need_of) {
    constexpr int kBins = kRadixBins / kThreads;  // of a thread, the largest digits in thread 0
    const int top = kRadixBins - 1 - thread_.index() * kBins;
    int64_t counts[kBins], sum = 0;
#pragma unroll
    for (int j = 0; j < kBins; ++j) {
      counts[j] = group_.word(row * kRadixBins + top - j);
      sum += counts[j];
    }
    const int64_t in_warp = sums_up_to(thread_, sum);
    if (group_.lane() == kLanes - 1) {
      shared_.warps[place][group_.warp()] = in_warp;
    }
    thread_.barrier();
    const int64_t warps =
        sums_up_to(thread_, group_.lane() < kThreads / kLanes ? shared_.warps[place][group_.lane()] : 0);
    const int64_t total = thread_.shuffle(warps, kLanes - 1);
    const int64_t before = thread_.shuffle(warps, group_.warp() == 0 ? 0 : group_.warp() - 1);
    int64_t above = in_warp - sum + (group_.warp() == 0 ? 0 : before);
    const int64_t need = need_of(total);
    if (above < need && need <= above + sum) {  // in one thread, or in none if nothing is needed
#pragma unroll
      for (int j = 0; j < kBins; ++j) {
        if (above < need && need <= above + counts[j]) {
          shared_.found[place] = {static_cast<uint32_t>(top - j), above, counts[j]};
        }
        above += counts[j];
      }
    }
    thread_.barrier();
    if (need > 0) {
      const SearchShared::Found found = shared_.found[place];
      search = {search.prefix << bits | found.digit, need - found.above, found.equal};
    } else {
      search.need = 0;
    }
  }

  template <class NeedOf>
  EK_HOST_DEVICE void first_digit(int place, Search& search, const NeedOf& need_of) {
    next_digit(0, place, kKeyBits0, search, need_of);
  }

  template <int kRows>
  EK_HOST_DEVICE void later_digits(Search (&searches)[kRows]) {
#pragma unroll 1
    for (int round = 1; round < kKeyRounds; ++round) {
      const int shift = round == 1 ? kKeyShift1 : 0, bits = round == 1 ? kKeyBits1 : kKeyBits2;
      for_stored([&](int, const Stored& stored) {
#pragma unroll
        for (int row = 0; row < kRows; ++row) {
          if (stored.candidate && stored.key >> (shift + bits) == searches[row].prefix) {
            group_.count(row * kRadixBins + static_cast<int>(radix_digit(stored.key, shift, bits)));
          }
        }
      });
      group_.sum_words(kRows * kRadixBins);
#pragma unroll
      for (int row = 0; row < kRows; ++row) {
        next_digit(row, row, bits, searches[row], [&](int64_t) { return searches[row].need; });
      }
    }
  }

  // Of the candidates with the threshold's key, the last tie key that is selected.
  EK_HOST_DEVICE uint64_t find_last_tie(const TieOrder& order, uint32_t threshold, int64_t need) {
    Search search{0, need, 0};
#pragma unroll 1
    for (int round = 0; round < order.rounds; ++round) {
      for_stored([&](int i, const Stored& stored) {
        if (stored.candidate && stored.key == threshold) {
          const uint64_t tie = order.key(token_index(i));
          if (order.matches(tie, round, search.prefix)) {
            group_.count(static_cast<int>(radix_digit(tie, order.shift(round), kRadixBits)));
          }
        }
      });
      group_.sum_words(kRadixBins);
      next_digit(0, 0, kRadixBits, search, [&](int64_t) { return search.need; });
    }
    return search.prefix;
  }

  EK_HOST_DEVICE void write(bool any, uint32_t threshold, const TieOrder& order, uint64_t last_tie) {
    for_stored([&](int i, const Stored& stored) {
      bool selected = any && stored.candidate && stored.key >= threshold;
      if (selected && stored.key == threshold && last_tie != 0) {
        selected = order.key(token_index(i)) >= last_tie;
      }
      if (i < share_.tokens) {
        selected_[share_.begin + i] = selected;
      }
    });
  }

  static EK_HOST_DEVICE uint32_t population(uint32_t bits) {
#if defined(__CUDA_ARCH__)
    return static_cast<uint32_t>(__popc(bits));
#else
    return static_cast<uint32_t>(__builtin_popcount(bits));
#endif
  }

  // radix_select.h's arrays have no address on the device
  static constexpr int kKeyShift0 = kKeyShift[0], kKeyShift1 = kKeyShift[1];
  static constexpr int kKeyBits0 = kKeyBits[0], kKeyBits1 = kKeyBits[1], kKeyBits2 = kKeyBits[2];

  Group& group_;
  typename Group::Thread& thread_;
  SearchShared& shared_;
  const Selection& selection_;
  const TokenView& view_;
  uint8_t* selected_;
  KeyStore store_;
  TokenShare share_;
};

}  // namespace entropy_kernels::cuda

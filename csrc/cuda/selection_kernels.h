// Clip-Cov and KL-Cov masks in one launch: the n largest keys among the candidates, ties to the lower token index. The
// same rounds as backends/radix_select.py, in every block at once; all blocks know the same search state, so they branch
// alike. Once few tokens are undecided, each block compares its own with all of them. Nothing here depends on how tokens
// are spread over blocks.
#pragma once

#include <cstdint>

#include "common/philox.h"
#include "common/radix_select.h"
#include "common/selection.h"
#include "cuda/grid_counts.h"

namespace entropy_kernels::cuda {

struct SelectionArguments {
  Selection selection;
  int chunk;  // tokens per block, a multiple of kLanes * kQuad
  int kept;   // quads per block whose keys stay in registers and shared memory
  uint8_t* selected;
  uint32_t* keys;  // random ones of all others: key_store_bytes
  uint64_t* exchange;
};

// Words that the blocks add at most: three rounds for the quantiles, from the second on two searches at a time, three
// for the keys, and one for each digit of a tie. First rounds have the number of tokens that count behind them.
constexpr int kSelectionWords = (kRadixBins + 1) + 4 * kRadixBins + (kRadixBins + 1) + 2 * kRadixBins + 6 * kRadixBins;
constexpr int kSelectionExchange = kSelectionWords + 1 + 2 * kBlockThreads;

// A key per token, and a byte per quad.
constexpr int64_t key_store_bytes(int64_t tokens) { return tokens * 4 + tokens / kQuad; }

// Keys of consecutive tokens; a bit for each that is a candidate, and that counts.
struct QuadKeys {
  uint32_t key[kQuad];
  uint32_t candidates, counts;
};

// A thread's quads of keys, kept in shared memory.
template <int kFirst>
class KeyKeep {
 public:
  using Held = QuadKeys;
  static constexpr int kBytes = kQuad * 4 + 1;

  EK_HOST_DEVICE explicit KeyKeep(KeptMemory kept) : memory_(kept) {}
  EK_HOST_DEVICE int quads() const { return memory_.quads; }
  EK_HOST_DEVICE void put(int quad, const QuadKeys& keys) const {
    memcpy(&words()[quad - kFirst], keys.key, sizeof(keys.key));
    candidates()[quad - kFirst] = static_cast<uint8_t>(keys.candidates);
  }
  EK_HOST_DEVICE QuadKeys get(int quad) const {
    const Quad<uint32_t> words_of = words()[quad - kFirst];
    QuadKeys keys = {};
    memcpy(keys.key, &words_of, sizeof(keys.key));
    keys.candidates = candidates()[quad - kFirst];
    return keys;
  }

 private:
  EK_HOST_DEVICE Quad<uint32_t>* words() const { return reinterpret_cast<Quad<uint32_t>*>(memory_.memory); }
  EK_HOST_DEVICE uint8_t* candidates() const {
    return memory_.memory + (memory_.quads - kFirst) * sizeof(Quad<uint32_t>);
  }

  KeptMemory memory_;
};

// The digits found so far of the key that is searched, how many keys that share them are needed, how many there are.
struct Search {
  uint64_t prefix;
  int64_t need, equal;
};

struct SearchShared {
  int64_t warps[kLanes];
  Search searches[2];  // as all blocks know them
};

// Inclusive sums over the lanes of a warp.
template <class Thread, class Total>
EK_HOST_DEVICE Total sums_up_to(Thread& thread, Total value) {
  const int lane = thread.index() % kLanes;
  for (int distance = 1; distance < kLanes; distance *= 2) {
    const Total other = thread.shuffle_up(value, distance);
    value += lane >= distance ? other : 0;
  }
  return value;
}

template <class Thread>
class Selector {
 public:
  using Counts = GridCounts<Thread>;
  static constexpr int kThreads = Thread::kThreads;

  EK_HOST_DEVICE Selector(Counts& counts, SearchShared& shared, const SelectionArguments& arguments,
                          unsigned char* memory)
      : counts_(counts), thread_(counts.thread), shared_(shared), arguments_(arguments),
        selection_(arguments.selection), view_(arguments.selection.view),
        share_(counts.thread.block(), arguments.chunk, view_.tokens),
        quads_(counts, Keep({memory, arguments.kept}), share_.tokens,
               Quad<float>::at(view_.covariance) && Quad<uint8_t>::at(view_.mask) && Quad<uint8_t>::at(view_.exclude) &&
                   Quad<uint8_t>::at(arguments.selected)) {}

  // Writes the mask of the block's tokens.
  EK_HOST_DEVICE void run() {
    const bool random = selection_.drawn, of_quantiles = random && selection_.band.quantile;
    const uint64_t seed = random ? selection_.seed.read() : 0;
    // a selection that is not drawn has no band to be read
    const bool of_bounds = random && !of_quantiles;
    take_tokens(of_bounds, of_bounds ? selection_.band.keys() : KeyBand{}, seed);
    if (of_quantiles) {
      rekey(quantile_band(), seed);
    }
    // Until all tokens with the digits found are taken, or they are few enough for a list
    int round = 0;
#pragma unroll 1
    do {
      digits<1>(round++, [&](int, int64_t total) {
        const int64_t wanted = selection_.count.of(valid_);
        return wanted < total ? wanted : total;
      });
    } while (round < kKeyRounds && shared_.searches[0].need < shared_.searches[0].equal &&
             shared_.searches[0].equal > Counts::kListed);
    const Search search = shared_.searches[0];
    const bool all = search.need == search.equal, few = search.equal <= Counts::kListed;
    uint64_t last_tie = 0;
    const TieOrder order =
        view_.index != nullptr ? TieOrder::of_indices() : TieOrder::of_positions(view_.tokens);
    if (!all && !few) {
      last_tie = find_last_tie(order, static_cast<uint32_t>(search.prefix), search.need);
    }
    write(search.need > 0, round, static_cast<uint32_t>(search.prefix), !all && few, order, last_tie);
    if (!all && few) {
      select_of_few(static_cast<int>(search.equal), static_cast<int>(search.need), order);
    }
  }

 private:
  struct Loaded {  // covariances, or keys and in `mask` the candidates
    Quad<uint32_t> words;
    Quad<uint8_t> mask, exclude;
  };
  using Keys = QuadKeys;
  using Keep = KeyKeep<kHeldQuads * kThreads>;

  EK_HOST_DEVICE int lane() const { return thread_.index() % kLanes; }
  EK_HOST_DEVICE int warp() const { return thread_.index() / kLanes; }
  EK_HOST_DEVICE int64_t position(int quad) const { return share_.begin + quad * kQuad; }
  EK_HOST_DEVICE uint8_t* stored_candidates() const {
    return reinterpret_cast<uint8_t*>(arguments_.keys + int64_t{thread_.blocks()} * arguments_.chunk);
  }

  EK_HOST_DEVICE Loaded load_values(int quad, bool vector) const {
    const int64_t at = position(quad);
    const int left = share_.tokens - quad * kQuad;
    return {read_quad(reinterpret_cast<const uint32_t*>(view_.covariance), at, left, vector),
            read_mask(view_.mask, at, left, vector, 1), read_mask(view_.exclude, at, left, vector, 0)};
  }
  EK_HOST_DEVICE Keys make_values(int quad, const Loaded& loaded) const {
    Keys keys = {};
#pragma unroll
    for (int j = 0; j < kQuad; ++j) {
      float value;
      memcpy(&value, &loaded.words.value[j], sizeof(value));
      const bool counts = loaded.mask[j] && quad * kQuad + j < share_.tokens;
      keys.key[j] = ordered_key(value);
      keys.counts |= counts ? 1u << j : 0u;
      keys.candidates |= counts && !loaded.exclude[j] && value == value ? 1u << j : 0u;
    }
    return keys;
  }
  // Random keys in place of the covariances of the band.
  EK_HOST_DEVICE void randomise(int quad, Keys& keys, KeyBand band, uint64_t seed) const {
#pragma unroll
    for (int j = 0; j < kQuad; ++j) {
      if (!band.contains(keys.key[j])) {
        keys.candidates &= ~(1u << j);
      }
    }
    // A warp's threads take a candidate each at a time, of whichever place: where few are, most are done after one
#pragma unroll 1
    for (uint32_t left = keys.candidates; left != 0; left &= left - 1) {
      const int place = population((left & (0u - left)) - 1);
      const uint32_t key = token_key(static_cast<uint64_t>(view_.token_index(position(quad) + place)), seed);
#pragma unroll
      for (int j = 0; j < kQuad; ++j) {
        keys.key[j] = j == place ? key : keys.key[j];
      }
    }
    if (!quads_.kept(quad)) {
      Quad<uint32_t> words;
      memcpy(&words, keys.key, sizeof(words));
      write_quad(arguments_.keys, position(quad), kQuad, true, words);
      stored_candidates()[position(quad) / kQuad] = static_cast<uint8_t>(keys.candidates);
    }
  }

  // use(quad, its keys); where they are kept they stay as it leaves them if kChanges.
  template <bool kChanges = false, class Use>
  EK_HOST_DEVICE void for_keys(const Use& use) {
    quads_.template each<kChanges>(
        [&](int quad, bool vector) {
          if (!stored_) {
            return load_values(quad, vector);
          }
          Loaded loaded = {read_quad(arguments_.keys, position(quad), kQuad, true), {}, {}};
          loaded.mask.value[0] = stored_candidates()[position(quad) / kQuad];
          return loaded;
        },
        [&](int quad, const Loaded& loaded) {
          if (!stored_) {
            return make_values(quad, loaded);
          }
          Keys keys = {};
          memcpy(keys.key, &loaded.words, sizeof(keys.key));
          keys.candidates = loaded.mask.value[0];
          return keys;
        },
        use);
  }

  EK_HOST_DEVICE void count_first_digits(const Keys& keys) {
#pragma unroll
    for (int j = 0; j < kQuad; ++j) {
      if (keys.candidates >> j & 1u) {
        counts_.count(static_cast<int>(radix_digit(keys.key[j], kKeyShift0, kKeyBits0)));
      }
    }
  }

  EK_HOST_DEVICE void take_tokens(bool random, KeyBand band, uint64_t seed) {
    uint32_t valid = 0;
    quads_.take([&](int quad, bool vector) { return load_values(quad, vector); },
                [&](int quad, const Loaded& loaded) { return make_values(quad, loaded); },
                [&](int quad, Keys& keys) {
                  valid += population(keys.counts);
                  if (random) {
                    randomise(quad, keys, band, seed);
                  }
                  count_first_digits(keys);
                });
    stored_ = random;
    counts_.begin();
    valid = thread_.warp_sum(valid);
    if (lane() == 0 && valid != 0) {
      counts_.count(kRadixBins, valid);
    }
  }

  EK_HOST_DEVICE void rekey(KeyBand band, uint64_t seed) {
    for_keys<true>([&](int quad, Keys& keys) {
      randomise(quad, keys, band, seed);
      count_first_digits(keys);
    });
    stored_ = true;
  }

  EK_HOST_DEVICE KeyBand quantile_band() {
    const Band& band = selection_.band;
#pragma unroll 1
    for (int round = 0; round < kKeyRounds; ++round) {
      digits<2>(round, [&](int row, int64_t total) {
        return quantile_rank(total, row == 0 ? band.lower() : band.upper());
      });
    }
    if (!(band.lower() < band.upper())) {
      return {1, 0};  // empty
    }
    return key_band(static_cast<uint32_t>(shared_.searches[0].prefix),
                    static_cast<uint32_t>(shared_.searches[1].prefix), band.closed);
  }

  // The next digit of a search, from word(bin): in its first round of the first_need(number of keys)-th largest.
  template <class Word, class FirstNeed>
  EK_HOST_DEVICE void next_digit(const Word& word, Search& search, int bits, bool first, const FirstNeed& first_need) {
    using Total = decltype(word(0));  // of all tokens
    constexpr int kWarps = kThreads / kLanes;
    constexpr int kBins = kRadixBins / kThreads;  // of a thread, the largest in thread 0
    const int top = kRadixBins - 1 - thread_.index() * kBins;
    const Search before_it = first ? Search{0, 0, 0} : search;  // before others of the block change it
    Total counts[kBins], sum = 0;
#pragma unroll
    for (int j = 0; j < kBins; ++j) {
      counts[j] = word(top - j);
      sum += counts[j];
    }
    const Total in_warp = sums_up_to(thread_, sum);
    if (lane() == kLanes - 1) {
      shared_.warps[warp()] = in_warp;
    }
    thread_.barrier();
    const auto of_warp = lane() < kWarps ? static_cast<Total>(shared_.warps[lane()]) : Total{0};
    const Total warps = sums_up_to(thread_, of_warp);
    const Total total = thread_.shuffle(warps, kLanes - 1);
    const Total before = thread_.shuffle(warps, warp() == 0 ? 0 : warp() - 1);
    Total above = in_warp - sum + (warp() == 0 ? 0 : before);
    const int64_t need = first ? first_need(total) : before_it.need;
    if (above < need && need <= above + sum) {  // in one thread, or in none if nothing is needed
#pragma unroll
      for (int j = 0; j < kBins; ++j) {
        if (above < need && need <= above + counts[j]) {
          search = {before_it.prefix << bits | static_cast<uint32_t>(top - j), need - above, counts[j]};
        }
        above += counts[j];
      }
    }
    if (need == 0 && thread_.index() == 0) {
      search = {0, 0, 0};
    }
    thread_.barrier();
  }

  // The keys' digits of a round. Those of round 0 are counted already, in one histogram for all searches;
  // first_need(row, number of keys) is then how many a search needs.
  template <int kRows, class FirstNeed>
  EK_HOST_DEVICE void digits(int round, const FirstNeed& first_need) {
    const bool first = round == 0;
    const int shift = key_shift(round), bits = key_bits(round);
    if (!first) {
      uint32_t prefixes[kRows];
#pragma unroll
      for (int row = 0; row < kRows; ++row) {
        prefixes[row] = static_cast<uint32_t>(shared_.searches[row].prefix);
      }
      for_keys([&](int, const Keys& keys) {
#pragma unroll
        for (int j = 0; j < kQuad; ++j) {
#pragma unroll
          for (int row = 0; row < kRows; ++row) {
            if ((keys.candidates >> j & 1u) && keys.key[j] >> (shift + bits) == prefixes[row]) {
              counts_.count(row * kRadixBins + static_cast<int>(radix_digit(keys.key[j], shift, bits)));
            }
          }
        }
      });
    }
    counts_.sum(first ? kRadixBins + 1 : kRows * kRadixBins);
    if (first) {
      valid_ += counts_.word(kRadixBins);  // keys that replace others bring none
    }
#pragma unroll 1
    for (int row = 0; row < kRows; ++row) {
      const int begin = first ? 0 : row * kRadixBins;
      next_digit([&](int bin) { return counts_.word(begin + bin); }, shared_.searches[row], bits, first,
                 [&](int64_t total) { return first_need(row, total); });
    }
  }

  // Of the candidates with the threshold's key, the last tie key that is selected.
  EK_HOST_DEVICE uint64_t find_last_tie(const TieOrder& order, uint32_t threshold, int64_t need) {
    Search& search = shared_.searches[1];
#pragma unroll 1
    for (int round = 0; round < order.rounds; ++round) {
      const uint64_t prefix = round == 0 ? 0 : search.prefix;
      for_keys([&](int quad, const Keys& keys) {
#pragma unroll
        for (int j = 0; j < kQuad; ++j) {
          if ((keys.candidates >> j & 1u) && keys.key[j] == threshold) {
            const uint64_t tie = order.key(view_.token_index(position(quad) + j));
            if (order.matches(tie, round, prefix)) {
              counts_.count(static_cast<int>(radix_digit(tie, order.shift(round), kRadixBits)));
            }
          }
        }
      });
      counts_.sum(kRadixBins);
      next_digit([&](int bin) { return counts_.word(bin); }, search, kRadixBits, round == 0,
                 [&](int64_t) { return need; });
    }
    return search.prefix;
  }

  // The mask of the tokens whose key's first digits, those of `rounds`, decide. Others with `prefix` are listed if
  // `list`, else selected if their tie key is last_tie or more.
  EK_HOST_DEVICE void write(bool any, int rounds, uint32_t prefix, bool list, const TieOrder& order,
                            uint64_t last_tie) {
    const int shift = key_shift(rounds - 1);
    for_keys([&](int quad, const Keys& keys) {
      Quad<uint8_t> selected;
      uint32_t open = 0;
#pragma unroll
      for (int j = 0; j < kQuad; ++j) {
        const bool candidate = any && (keys.candidates >> j & 1u);
        const uint32_t digits = keys.key[j] >> shift;
        bool take = candidate && digits >= prefix;
        if (take && digits == prefix) {
          if (list) {
            open |= 1u << j;
            take = false;
          } else if (last_tie != 0) {
            take = order.key(view_.token_index(position(quad) + j)) >= last_tie;
          }
        }
        selected.value[j] = take;
      }
      write_quad(arguments_.selected, position(quad), share_.tokens - quad * kQuad, quads_.whole(quad), selected);
      if (open != 0) {
        uint64_t place = counts_.reserve(population(open));
#pragma unroll
        for (int j = 0; j < kQuad; ++j) {
          if (open >> j & 1u) {
            counts_.list(place++, {keys.key[j], position(quad) + j});
          }
        }
      }
    });
  }

  // Selects the block's own of the `count` listed tokens that have less than `need` others above them. A warp compares
  // one of its own with all.
  EK_HOST_DEVICE void select_of_few(int count, int need, const TieOrder& order) {
    auto* const keys = counts_.shared.words;  // no histogram is made any more
    auto* const ties = reinterpret_cast<uint64_t*>(keys + Counts::kListed);
    static_assert(Counts::kListed * (4 + 8) <= sizeof(CountsShared::words) && Counts::kListed == kThreads);
    counts_.share_list();
    Listed mine = {0, -1};
    uint64_t tie = 0;
    if (thread_.index() < count) {
      mine = counts_.entry(thread_.index());
      tie = order.key(view_.token_index(mine.position));
      keys[thread_.index()] = mine.key;
      ties[thread_.index()] = tie;
    }
    thread_.barrier();
    const bool own = mine.position >= share_.begin && mine.position - share_.begin < share_.tokens;
#pragma unroll 1
    for (uint32_t left = thread_.ballot(own); left != 0; left &= left - 1) {
      const int owner = population((left & (0u - left)) - 1);
      const uint32_t key = thread_.shuffle(mine.key, owner);
      const uint64_t tie_of_key = thread_.shuffle(tie, owner);
      int above = 0;
#pragma unroll 1
      for (int i = lane(); i < count; i += kLanes) {
        above += keys[i] > key || (keys[i] == key && ties[i] > tie_of_key) ? 1 : 0;
      }
      above = static_cast<int>(thread_.warp_sum(static_cast<uint32_t>(above)));
      if (lane() == owner && above < need) {
        arguments_.selected[mine.position] = 1;
      }
    }
  }

  static EK_HOST_DEVICE int population(uint32_t bits) {
#if defined(__CUDA_ARCH__)
    return __popc(bits);
#else
    return __builtin_popcount(bits);
#endif
  }

  // radix_select.h's arrays have no address on the device
  static constexpr int kKeyShift0 = kKeyShift[0], kKeyShift1 = kKeyShift[1];
  static constexpr int kKeyBits0 = kKeyBits[0], kKeyBits1 = kKeyBits[1], kKeyBits2 = kKeyBits[2];
  static EK_HOST_DEVICE int key_shift(int round) { return round == 0 ? kKeyShift0 : round == 1 ? kKeyShift1 : 0; }
  static EK_HOST_DEVICE int key_bits(int round) { return round == 0 ? kKeyBits0 : round == 1 ? kKeyBits1 : kKeyBits2; }

  Counts& counts_;
  Thread& thread_;
  SearchShared& shared_;
  const SelectionArguments& arguments_;
  const Selection& selection_;
  const TokenView& view_;
  TokenShare share_;
  ThreadQuads<Keep, kHeldQuads, Counts> quads_;
  int64_t valid_ = 0;     // tokens that count
  bool stored_ = false;  // the keys of quads that are not kept
};

}  // namespace entropy_kernels::cuda

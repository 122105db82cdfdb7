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
  int chunk;  // tokens per block, a multiple of kLanes * kQuad
  int kept;   // quads per block whose keys stay in registers and shared memory
  uint8_t* selected;
  uint32_t* keys;      // random ones of all others: key_store_bytes
  uint64_t* exchange;  // Grid only
};

// Words that a Grid adds at most: three rounds for the quantiles, two searches at a time, three for the keys (the first
// with the number of tokens that count), one for each digit of a tie; and the counter of its list.
constexpr int kSelectionWords = (kRadixBins + 1) + 4 * kRadixBins + 3 * kRadixBins + 6 * kRadixBins + 1;
constexpr int kSelectionExchange = kSelectionWords + 2 * kBlockThreads;

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
template <class Thread, class Total>
EK_HOST_DEVICE Total sums_up_to(Thread& thread, Total value) {
  const int lane = thread.index() % kLanes;
  for (int distance = 1; distance < kLanes; distance *= 2) {
    const Total other = thread.shuffle_up(value, distance);
    value += lane >= distance ? other : 0;
  }
  return value;
}

template <class Group>
class Selector {
 public:
  static constexpr int kThreads = Group::kThreads;

  EK_HOST_DEVICE Selector(Group& group, SearchShared& shared, const SelectionArguments& arguments,
                          unsigned char* memory)
      : group_(group), thread_(group.thread), shared_(shared), arguments_(arguments), selection_(arguments.selection),
        view_(arguments.selection.view), share_(group.thread.block(), arguments.chunk, view_.tokens),
        quads_(group, Keep({memory, arguments.kept}), share_.tokens,
               Quad<float>::at(view_.covariance) && Quad<uint8_t>::at(view_.mask) && Quad<uint8_t>::at(view_.exclude) &&
                   Quad<uint8_t>::at(arguments.selected)) {}

  // Writes the mask of the block's tokens.
  EK_HOST_DEVICE void run() {
    const bool random = selection_.drawn, of_quantiles = random && selection_.band.quantile;
    const uint64_t seed = random ? selection_.seed.read() : 0;
    take_tokens(random && !of_quantiles, selection_.band.keys(), seed);
    group_.sum_words(kRadixBins + 1);
    const int64_t valid = group_.word(kRadixBins);
    if (of_quantiles) {
      rekey(quantile_band(), seed);
      group_.sum_words(kRadixBins);
    }
    Search searches[1] = {{0, 0, 0}};
    Search& search = searches[0];
    first_digit(0, search, [&](int64_t total) {
      const int64_t wanted = selection_.count.of(valid);
      return wanted < total ? wanted : total;
    });
    // Until all tokens with the digits found are taken, or they are few enough for every block to look at all of them
    int round = 1;
#pragma unroll 1
    while (round < kKeyRounds && search.need < search.equal && search.equal > kThreads) {
      digits(round++, searches);
    }
    const bool all = search.need == search.equal, few = search.equal <= kThreads;
    uint64_t last_tie = 0;
    const TieOrder order =
        view_.index != nullptr ? TieOrder::of_indices() : TieOrder::of_positions(view_.tokens);
    if (!all && !few) {
      last_tie = find_last_tie(order, static_cast<uint32_t>(search.prefix), search.need);
    }
    write(search.need > 0, round, search.prefix, !all && few, order, last_tie);
    if (!all && few) {
      select_of_few(round, search, order);
    }
  }

 private:
  struct Loaded {  // covariances, or keys and in `mask` the candidates
    Quad<uint32_t> words;
    Quad<uint8_t> mask, exclude;
  };
  using Keys = QuadKeys;
  using Keep = KeyKeep<kHeldQuads * kThreads>;

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
      if (keys.candidates >> j & 1u) {
        keys.key[j] = token_key(static_cast<uint64_t>(view_.token_index(position(quad) + j)), seed);
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
        group_.count(static_cast<int>(radix_digit(keys.key[j], kKeyShift0, kKeyBits0)));
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
    valid = thread_.warp_sum(valid);
    if (group_.lane() == 0 && valid != 0) {
      thread_.add(group_.shared.words + kRadixBins, valid);
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
    Search searches[2] = {{0, 0, 0}, {0, 0, 0}};
    first_digit(0, searches[0], [&](int64_t total) { return quantile_rank(total, band.lower()); });
    first_digit(1, searches[1], [&](int64_t total) { return quantile_rank(total, band.upper()); });
#pragma unroll 1
    for (int round = 1; round < kKeyRounds; ++round) {
      digits(round, searches);
    }
    if (!(band.lower() < band.upper())) {
      return {1, 0};  // empty
    }
    return key_band(static_cast<uint32_t>(searches[0].prefix), static_cast<uint32_t>(searches[1].prefix), band.closed);
  }

  // The digit of the need_of(number of keys)-th largest, from word(bin). `place` keeps two searches apart.
  template <class Word, class NeedOf>
  EK_HOST_DEVICE void next_digit(const Word& word, int place, int bits, Search& search, const NeedOf& need_of) {
    using Total = decltype(word(0));  // of all tokens
    constexpr int kBins = kRadixBins / kThreads, kWarps = kThreads / kLanes;  // bins of a thread, the largest in thread 0
    const int top = kRadixBins - 1 - thread_.index() * kBins;
    Total counts[kBins], sum = 0;
#pragma unroll
    for (int j = 0; j < kBins; ++j) {
      counts[j] = word(top - j);
      sum += counts[j];
    }
    const Total in_warp = sums_up_to(thread_, sum);
    if (group_.lane() == kLanes - 1) {
      shared_.warps[place][group_.warp()] = in_warp;
    }
    thread_.barrier();
    const auto of_warp = group_.lane() < kWarps ? static_cast<Total>(shared_.warps[place][group_.lane()]) : Total{0};
    const Total warps = sums_up_to(thread_, of_warp);
    const Total total = thread_.shuffle(warps, kLanes - 1);
    const Total before = thread_.shuffle(warps, group_.warp() == 0 ? 0 : group_.warp() - 1);
    Total above = in_warp - sum + (group_.warp() == 0 ? 0 : before);
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
      search.need = search.equal = 0;
    }
  }

  template <class NeedOf>
  EK_HOST_DEVICE void first_digit(int place, Search& search, const NeedOf& need_of) {
    next_digit([&](int bin) { return group_.word(bin); }, place, kKeyBits0, search, need_of);
  }

  // Round 1 or 2 of the keys.
  template <int kRows>
  EK_HOST_DEVICE void digits(int round, Search (&searches)[kRows]) {
    const int shift = key_shift(round), bits = key_bits(round);
    for_keys([&](int, const Keys& keys) {
#pragma unroll
      for (int j = 0; j < kQuad; ++j) {
#pragma unroll
        for (int row = 0; row < kRows; ++row) {
          if ((keys.candidates >> j & 1u) && keys.key[j] >> (shift + bits) == searches[row].prefix) {
            group_.count(row * kRadixBins + static_cast<int>(radix_digit(keys.key[j], shift, bits)));
          }
        }
      }
    });
    group_.sum_words(kRows * kRadixBins);
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      next_digit([&](int bin) { return group_.word(row * kRadixBins + bin); }, row, bits, searches[row],
                 [&](int64_t) { return searches[row].need; });
    }
  }

  // Of the candidates with the threshold's key, the last tie key that is selected.
  EK_HOST_DEVICE uint64_t find_last_tie(const TieOrder& order, uint32_t threshold, int64_t need) {
    Search search{0, need, 0};
#pragma unroll 1
    for (int round = 0; round < order.rounds; ++round) {
      for_keys([&](int quad, const Keys& keys) {
#pragma unroll
        for (int j = 0; j < kQuad; ++j) {
          if ((keys.candidates >> j & 1u) && keys.key[j] == threshold) {
            const uint64_t tie = order.key(view_.token_index(position(quad) + j));
            if (order.matches(tie, round, search.prefix)) {
              group_.count(static_cast<int>(radix_digit(tie, order.shift(round), kRadixBits)));
            }
          }
        }
      });
      group_.sum_words(kRadixBins);
      next_digit([&](int bin) { return group_.word(bin); }, 0, kRadixBits, search, [&](int64_t) { return search.need; });
    }
    return search.prefix;
  }

  // The mask of the tokens whose key's first digits, those of `rounds`, decide. Others with `prefix` are listed if
  // `list`, else selected if their tie key is last_tie or more.
  EK_HOST_DEVICE void write(bool any, int rounds, uint64_t prefix, bool list, const TieOrder& order,
                            uint64_t last_tie) {
    const int shift = key_shift(rounds - 1);
    for_keys([&](int quad, const Keys& keys) {
      Quad<uint8_t> selected;
#pragma unroll
      for (int j = 0; j < kQuad; ++j) {
        const bool candidate = any && (keys.candidates >> j & 1u);
        const uint32_t digits = keys.key[j] >> shift;
        bool take = candidate && digits >= prefix;
        if (take && digits == prefix) {
          if (list) {
            group_.list(keys.key[j], static_cast<uint32_t>(quad * kQuad + j));
            take = false;
          } else if (last_tie != 0) {
            take = order.key(view_.token_index(position(quad) + j)) >= last_tie;
          }
        }
        selected.value[j] = take;
      }
      write_quad(arguments_.selected, position(quad), share_.tokens - quad * kQuad, quads_.whole(quad), selected);
    });
  }

  // The rest of the search among the listed tokens, a token per thread, the same in every block.
  EK_HOST_DEVICE void select_of_few(int round, Search search, const TieOrder& order) {
    const Listed mine = group_.gather(static_cast<int>(search.equal), arguments_.chunk);
    const auto own_digit = [&](bool matches, uint64_t key, int shift, int bits) {
      if (matches) {
        group_.count(static_cast<int>(radix_digit(key, shift, bits)));
      }
      thread_.barrier();
      next_digit([&](int bin) { return group_.take_own_word(bin); }, 0, bits, search,
                 [&](int64_t) { return search.need; });
    };
#pragma unroll 1
    for (; round < kKeyRounds; ++round) {
      const int shift = key_shift(round), bits = key_bits(round);
      own_digit(mine.position >= 0 && mine.key >> (shift + bits) == search.prefix, mine.key, shift, bits);
    }
    const auto threshold = static_cast<uint32_t>(search.prefix);
    uint64_t tie = 0, last_tie = 0;
    if (search.need < search.equal) {
      const bool tied = mine.position >= 0 && mine.key == threshold;
      tie = tied ? order.key(view_.token_index(mine.position)) : 0;
      search.prefix = 0;
#pragma unroll 1
      for (int digit = 0; digit < order.rounds; ++digit) {
        own_digit(tied && order.matches(tie, digit, search.prefix), tie, order.shift(digit), kRadixBits);
      }
      last_tie = search.prefix;
    }
    const bool own = mine.position >= share_.begin && mine.position - share_.begin < share_.tokens;
    if (own && (mine.key > threshold || (mine.key == threshold && tie >= last_tie))) {
      arguments_.selected[mine.position] = 1;
    }
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
  static EK_HOST_DEVICE int key_shift(int round) { return round == 0 ? kKeyShift0 : round == 1 ? kKeyShift1 : 0; }
  static EK_HOST_DEVICE int key_bits(int round) { return round == 0 ? kKeyBits0 : round == 1 ? kKeyBits1 : kKeyBits2; }

  Group& group_;
  typename Group::Thread& thread_;
  SearchShared& shared_;
  const SelectionArguments& arguments_;
  const Selection& selection_;
  const TokenView& view_;
  TokenShare share_;
  ThreadQuads<Keep, kHeldQuads, Group> quads_;
  bool stored_ = false;  // the keys of quads that are not kept
};

}  // namespace entropy_kernels::cuda

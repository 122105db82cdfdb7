// The token_stats kernels as functions of one thread. `Thread` is what a thread can do beside arithmetic: who it is, loads,
// barriers, shuffles, copies (device_thread.h). Tests run the same functions on the CPU with a Thread of their own.
#pragma once

#include "problem.h"

namespace entropy_kernels::cuda {

template <typename T, class Thread>
EK_HOST_DEVICE T largest_of_warp(Thread& thread, T m) {
#pragma unroll
  for (int mask = kWarp / 2; mask > 0; mask /= 2) m = larger(m, thread.shuffle_xor(m, mask));
  return m;
}

// The sums of a warp's lanes, in every lane. The tree is the same each time, and so are the bits.
template <typename T, bool kSecondMoments, class Thread>
EK_HOST_DEVICE void add_warp(Thread& thread, SoftmaxState<T>& state) {
#pragma unroll
  for (int mask = kWarp / 2; mask > 0; mask /= 2) {
    state.s += thread.shuffle_xor(state.s, mask);
    state.w += thread.shuffle_xor(state.w, mask);
    if constexpr (kSecondMoments) {
      state.s2 += thread.shuffle_xor(state.s2, mask);
      state.w2 += thread.shuffle_xor(state.w2, mask);
    }
  }
  if constexpr (!kSecondMoments) state.s2 = state.w2 = 0;
}

// The states of a warp's lanes merged into one, in every lane: raise all to the largest maximum, then add.
template <typename T, bool kSecondMoments, class Thread>
EK_HOST_DEVICE void merge_warp(Thread& thread, SoftmaxState<T>& state, T temperature) {
  raise_maximum(state, largest_of_warp(thread, state.m), temperature);
  add_warp<T, kSecondMoments>(thread, state);
}

// Shared memory of a forward block beside its stages.
template <typename T>
struct ForwardShared {
  SoftmaxState<T> warps[kMaxWarps];
  SoftmaxState<T> parts[kMaxParts];
  bool last;
};

// The block's state, in every lane of the first warp.
template <typename T, bool kSecondMoments, class Thread>
EK_HOST_DEVICE SoftmaxState<T> merge_block(Thread& thread, ForwardShared<T>& shared,
                                           Lane<T, kSecondMoments>& own) {
  const int warp = thread.index() / kWarp, lane = thread.index() % kWarp;
  const auto merge = [&] {
    own.raise(largest_of_warp(thread, own.running.m));
    add_warp<T, kSecondMoments>(thread, own.running);
  };
  merge();
  if (thread.count() > kWarp) {
    if (lane == 0) shared.warps[warp] = own.running;
    thread.barrier();
    if (warp > 0) return own.running;  // which nobody looks at
    own.resume(lane < thread.count() / kWarp ? shared.warps[lane] : SoftmaxState<T>::identity());
    merge();
  }
  return own.state();
}

// Adds a tile of vectors to the thread's state. Those from `valid` on are padding, all of it -inf.
template <class E, bool kSecondMoments, bool kSoftcap, typename T>
EK_HOST_DEVICE void add_tile(Lane<T, kSecondMoments>& lane, const Words (&words)[kVectors], const bool (&valid)[kVectors],
                             T softcap) {
  using Sums = typename Lane<T, kSecondMoments>::Sums;
  if constexpr (!kSoftcap) {
    lane.raise(E::top(words));
    if (valid[kVectors - 1] && !lane.careful) {  // all of the tile
      Sums sums;
#pragma unroll
      for (int k = 0; k < kVectors; ++k) {
        T z[E::kPerVector];
        E::unpack(words[k], z);
#pragma unroll
        for (int i = 0; i < E::kPerVector; ++i) sums.add(z[i], lane);
      }
      if (!is_nan(sums.w)) {
        lane.add(sums);
        return;
      }
      lane.careful = true;  // a row with one -inf may well have more
    }
  }
  Sums sums;
#pragma unroll
  for (int k = 0; k < kVectors; ++k) {
    T z[E::kPerVector];
    E::unpack(words[k], z);
    if constexpr (kSoftcap) {  // a capped -inf is finite, and padding must stay -inf: it is left out
      if (!valid[k]) break;
      const Softcap<T> cap(softcap);
      T top = -kInfinity<T>;
#pragma unroll
      for (int i = 0; i < E::kPerVector; ++i) top = larger(top, z[i] = cap(z[i]));
      lane.raise(top);
      sums = {};
    }
#pragma unroll
    for (int i = 0; i < E::kPerVector; ++i) sums.add_carefully(z[i], lane);
    if constexpr (kSoftcap) lane.add(sums);
  }
  if constexpr (!kSoftcap) lane.add(sums);
}

// The block's share of the tail elements.
template <class E, bool kSecondMoments, bool kSoftcap, typename T>
EK_HOST_DEVICE void add_tail_elements(Lane<T, kSecondMoments>& lane, const typename E::Storage* row,
                                      std::int64_t stride, const RowCut<E>& cut, int first, int step, T softcap) {
  for (int begin = first; begin < cut.tail_elements; begin += kTailElements * step) {
    T z[kTailElements], top = -kInfinity<T>;
#pragma unroll
    for (int k = 0; k < kTailElements; ++k) {
      const int element = begin + k * step;
      z[k] = -kInfinity<T>;
      if (element < cut.tail_elements) {
        z[k] = E::widen(row[cut.column(element) * stride]);
        if constexpr (kSoftcap) z[k] = Softcap<T>(softcap)(z[k]);
      }
    }
#pragma unroll
    for (int k = 0; k < kTailElements; ++k) top = larger(top, z[k]);
    lane.raise(top);
    typename Lane<T, kSecondMoments>::Sums sums;
#pragma unroll
    for (int k = 0; k < kTailElements; ++k) sums.add_carefully(z[k], lane);
    lane.add(sums);
  }
}

// Vectors straight from global memory, the next tile's loads in flight while one is added.
template <class E, class Thread>
struct DirectSource {
  static constexpr bool kBulk = false;
  struct Shared;

  Thread& thread;
  const Words* row;
  int end;
  Words next[kVectors];

  EK_HOST_DEVICE DirectSource(Thread& thread_, Shared*, const Words* row_, Share share)
      : thread(thread_), row(row_), end(share.end) {
    load(share.begin);
  }
  EK_HOST_DEVICE void load(int tile) {
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
      const int vector = tile + k * thread.count() + thread.index();
      next[k] = vector < end ? thread.read(row + vector) : E::minus_infinity();
    }
  }
  EK_HOST_DEVICE void take(int tile, Words (&words)[kVectors]) {
#pragma unroll
    for (int k = 0; k < kVectors; ++k) words[k] = next[k];
    load(tile + kVectors * thread.count());
  }
};

// Vectors through shared memory: one thread has several tiles in flight, the copy engine moves
// them. `full` says that a stage has arrived, `empty` that every thread has taken its vectors out of it.
template <class E, class Thread>
struct BulkSource {
  static constexpr bool kBulk = true;
  static constexpr int kStages = 3;
  static constexpr int kTile = kVectors * kBulkThreads;  // vectors
  using Barrier = typename Thread::Barrier;

  struct Shared {
    Words stage[kStages][kTile];
    Barrier full[kStages], empty[kStages];
  };

  Thread& thread;
  Shared& shared;
  const Words* row;
  Share share;
  int stage = 0, phase = 0;  // of the next tile that is taken

  // Every thread of the block has to pass a barrier between `prepare` and the constructor.
  static EK_HOST_DEVICE void prepare(Thread& thread, Shared& shared) {
    if (thread.index() != 0) return;
    for (int i = 0; i < kStages; ++i) {
      thread.initialise(shared.full[i], 1);
      thread.initialise(shared.empty[i], kBulkThreads);
    }
    thread.publish_barriers();
  }

  EK_HOST_DEVICE BulkSource(Thread& thread_, Shared* shared_, const Words* row_, Share share_)
      : thread(thread_), shared(*shared_), row(row_), share(share_) {
    if (thread.index() == 0) {
      for (int i = 0; i < kStages && share.begin + i * kTile < share.end; ++i) request(share.begin + i * kTile, i);
    }
  }
  EK_HOST_DEVICE void request(int begin, int to) {
    const int rest = share.end - begin;
    thread.copy(shared.stage[to], row + begin, (rest < kTile ? rest : kTile) * int(sizeof(Words)), shared.full[to]);
  }
  EK_HOST_DEVICE void take(int tile_begin, Words (&words)[kVectors]) {
    // The stage of the tile before this one is refilled now: the other warps have had time to empty it.
    const int refill = tile_begin + (kStages - 1) * kTile;
    if (thread.index() == 0 && tile_begin > share.begin && refill < share.end) {
      const int before = stage == 0 ? kStages - 1 : stage - 1;
      thread.wait(shared.empty[before], stage == 0 ? phase ^ 1 : phase);
      thread.reads_before_copies();
      request(refill, before);
    }
    thread.wait(shared.full[stage], phase);
    if (tile_begin + kTile <= share.end) {
#pragma unroll
      for (int k = 0; k < kVectors; ++k) words[k] = shared.stage[stage][k * kBulkThreads + thread.index()];
    } else {
#pragma unroll
      for (int k = 0; k < kVectors; ++k) {
        const int vector = k * kBulkThreads + thread.index();
        words[k] = tile_begin + vector < share.end ? shared.stage[stage][vector] : E::minus_infinity();
      }
    }
    thread.arrive(shared.empty[stage]);
    if (++stage == kStages) {
      stage = 0;
      phase ^= 1;
    }
  }
};

// One block's part of one row. Whole = all `parts` of a row, whichever way they find each other.
template <class E, bool kSecondMoments, bool kSoftcap, class Source, class Thread>
EK_HOST_DEVICE void forward_block(Thread& thread, const ForwardArguments<typename E::Accumulator>& arguments,
                                  ForwardShared<typename E::Accumulator>& shared,
                                  typename Source::Shared* stages) {
  constexpr bool kBulk = Source::kBulk;
  using T = typename E::Accumulator;
  using Storage = typename E::Storage;
  const Problem<T>& problem = arguments.problem;
  const int parts = arguments.parts;
  const int row = thread.block() / parts, part = thread.block() % parts;
  const std::int64_t label = problem.labels[row];
  if constexpr (kBulk) {  // while the label is on its way
    Source::prepare(thread, *stages);
    thread.barrier();
  }
  if (label == problem.options.ignore_index) {  // not read
    if (thread.index() == 0 && part == 0) {
      arguments.outputs.write(row, SoftmaxState<T>::ignored(), TokenStats<T>::all(0), kSecondMoments);
    }
    return;
  }
  const Storage* logits = problem.logits.template at<const Storage>(row, problem.length);
  const std::int64_t stride = problem.logits.column_stride;
  const RowCut<E> cut(logits, problem.columns, arguments.vectors);
  const auto* vectors = reinterpret_cast<const Words*>(logits + cut.head);
  const Share share(cut.vectors, part, parts);

  // The row's first bytes are on their way before anything is waited for.
  Source source(thread, stages, vectors, share);
  if constexpr (kBulk) {
    if (parts > 1) thread.cluster_arrive_relaxed();
  }
  const T temperature = problem.temperature_of(row);
  const int column = problem.label_column(label);
  const bool owns = thread.index() == 0 && column >= 0;
  Storage own = 0;  // the target's logit, looked at when the row is done
  if (owns) own = logits[column * stride];

  const T softcap = kSoftcap ? problem.softcap() : T(0);
  Lane<T, kSecondMoments> lane(temperature);
  add_tail_elements<E, kSecondMoments, kSoftcap>(lane, logits, stride, cut, part * thread.count() + thread.index(),
                                                 parts * thread.count(), softcap);
  const int step = kVectors * thread.count();
  for (int tile = share.begin; tile < share.end; tile += step) {
    Words words[kVectors];
    source.take(tile, words);
    bool valid[kVectors];
#pragma unroll
    for (int k = 0; k < kVectors; ++k) valid[k] = tile + k * thread.count() + thread.index() < share.end;
    add_tile<E, kSecondMoments, kSoftcap>(lane, words, valid, softcap);
  }

  SoftmaxState<T> state = merge_block<T, kSecondMoments>(thread, shared, lane);
  if (parts > 1) {
    // Part i goes to lane i, whoever is done first: the order of the sums, and so their bits, are always the same.
    if constexpr (kBulk) {
      thread.cluster_wait();  // every block of the cluster runs, so its shared memory is there
      if (thread.index() == 0) thread.in_block(shared.parts, 0)[part] = state;
      if (thread.index() < kWarp) {
        thread.cluster_arrive();
      } else {
        thread.cluster_arrive_relaxed();  // has written nothing that others read
      }
      thread.cluster_wait();
      if (part != 0) return;
    } else {
      if (thread.index() == 0) {
        arguments.part_states[static_cast<std::int64_t>(row) * parts + part] = state;
        shared.last = thread.count_up(arguments.counters + row) == static_cast<unsigned>(parts) - 1;
      }
      thread.barrier();
      if (!shared.last) return;
    }
    if (thread.index() >= kWarp) return;
    state = SoftmaxState<T>::identity();
    if (thread.index() < parts) {
      if constexpr (kBulk) {
        state = shared.parts[thread.index()];
      } else {
        state = thread.read_fresh(arguments.part_states[static_cast<std::int64_t>(row) * parts + thread.index()]);
      }
    }
    merge_warp<T, kSecondMoments>(thread, state, temperature);
  }
  if (thread.index() != 0) return;
  state.x_y = -kInfinity<T>;
  if (owns) {
    state.x_y = E::widen(own);
    if constexpr (kSoftcap) state.x_y = Softcap<T>(softcap)(state.x_y);
  }
  // The maximum skips NaN, and whoever merges shards may skip one at -inf; +inf stays visible.
  if (is_nan(state.s) && state.m != kInfinity<T>) state.m = state.s;
  const bool valid = problem.options.is_valid(label) && temperature > 0;
  const TokenStats<T> stats = valid ? finalize(state, temperature) : TokenStats<T>::all(kNaN<T>);
  arguments.outputs.write(row, state, stats, kSecondMoments);
}

// One block's part of one row's gradient.
template <class E, bool kSoftcap, class Thread>
EK_HOST_DEVICE void backward_block(Thread& thread, const BackwardArguments<typename E::Accumulator>& arguments) {
  using T = typename E::Accumulator;
  using Storage = typename E::Storage;
  const Problem<T>& problem = arguments.problem;
  const int parts = arguments.parts;
  const int place = thread.block() / parts, part = thread.block() % parts;
  const int row = arguments.reversed ? problem.rows - 1 - place : place;
  const Storage* logits = problem.logits.template at<const Storage>(row, problem.length);
  Storage* dlogits = arguments.dlogits.template at<Storage>(row, problem.length);
  const std::int64_t stride = problem.logits.column_stride, out_stride = arguments.dlogits.column_stride;
  const RowCut<E> cut(dlogits, problem.columns, arguments.vectors);
  auto* out = reinterpret_cast<Words*>(dlogits + cut.head);
  const int step = kVectors * thread.count();
  const Share share(cut.vectors, part, parts, step);
  const int first_tail = part * thread.count() + thread.index(), tail_step = parts * thread.count();
  for (int j = problem.columns + first_tail; j < problem.vocab; j += tail_step) {
    dlogits[j * out_stride] = E::round(T(0));
  }

  const std::int64_t label = problem.labels[row];
  const TokenStats<T> grads = arguments.upstream.template at<T>(row);
  // No gradient comes in: none goes out, and the row is not read, whatever it holds.
  if (label == problem.options.ignore_index || grads.all_zero()) {
    for (int vector = share.begin + thread.index(); vector < share.end; vector += thread.count()) {
      thread.write(out + vector, Words{});
    }
    for (int element = first_tail; element < cut.tail_elements; element += tail_step) {
      dlogits[cut.column(element) * out_stride] = E::round(T(0));
    }
    return;
  }

  // Loads of a tile come before its stores, and each element is read and written by one thread: dlogits may be logits.
  const auto* in = reinterpret_cast<const Words*>(logits + cut.head);
  Words words[kVectors];
  const auto load = [&](int tile) {
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
      const int vector = tile + k * thread.count() + thread.index();
      if (vector < share.end) words[k] = thread.read_once(in + vector);
    }
  };
  load(share.begin);  // before anything is waited for

  const SoftmaxState<T> state = arguments.state.template at<T>(row, arguments.upstream.second_order());
  const LogitGradient<T> gradient(state, problem.temperature_of(row), problem.softcap(), grads);
  const int column = problem.label_column(label);

  for (int tile = share.begin; tile < share.end; tile += step) {
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
      const int vector = tile + k * thread.count() + thread.index();
      if (vector >= share.end) break;
      T z[E::kPerVector];
      E::unpack(words[k], z);
      T dz[E::kPerVector];
#pragma unroll
      for (int i = 0; i < E::kPerVector; ++i) dz[i] = gradient.template at<kSoftcap>(z[i]);
      const int target = column - cut.vector_column(vector);  // its place in this vector, if it is there
      if (target >= 0 && target < E::kPerVector) {
        T logit = 0;
#pragma unroll
        for (int i = 0; i < E::kPerVector; ++i) logit = i == target ? z[i] : logit;
        const T own = gradient.template at_target<kSoftcap>(logit);
#pragma unroll
        for (int i = 0; i < E::kPerVector; ++i) dz[i] = i == target ? own : dz[i];
      }
      thread.write(out + vector, E::pack(dz));
    }
    load(tile + step);
  }
  for (int begin = first_tail; begin < cut.tail_elements; begin += kTailElements * tail_step) {
    T z[kTailElements];
#pragma unroll
    for (int k = 0; k < kTailElements; ++k) {
      const int element = begin + k * tail_step;
      if (element < cut.tail_elements) z[k] = E::widen(logits[cut.column(element) * stride]);
    }
#pragma unroll
    for (int k = 0; k < kTailElements; ++k) {
      const int element = begin + k * tail_step;
      if (element >= cut.tail_elements) break;
      const int j = cut.column(element);
      const T dz = j == column ? gradient.template at_target<kSoftcap>(z[k]) : gradient.template at<kSoftcap>(z[k]);
      dlogits[j * out_stride] = E::round(dz);
    }
  }
}

}  // namespace entropy_kernels::cuda

// The threads of an emulated launch: a fiber each, resumed in random order.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstddef>
#include <exception>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace entropy_kernels::cuda {

constexpr int kFibersOfWarp = 32;

// Begun by its context, and from then on entered and left by jumps: a swap of contexts asks the kernel for the signals
// that are blocked, which takes longer than what most fibers do between two barriers.
struct Fiber {
  ucontext_t context;
  jmp_buf left_at;
  std::unique_ptr<char[]> stack;
  std::function<void()> body;
  std::function<bool()> ready;  // empty: at once
  bool begun = false, done = false;
};

// All threads of the blocks that run together: one block, or a cluster.
class Scheduler {
 public:
  Scheduler(std::mt19937_64& random, int blocks, int threads)
      : random_(random), threads_(threads), held_back_(blocks > 1 ? static_cast<int>(random() % blocks) : -1) {}

  void add(std::function<void()> body) {
    auto fiber = std::make_unique<Fiber>();
    fiber->stack.reset(new char[kStack]);
    fiber->body = std::move(body);
    getcontext(&fiber->context);
    fiber->context.uc_stack.ss_sp = fiber->stack.get();
    fiber->context.uc_stack.ss_size = kStack;
    fiber->context.uc_link = nullptr;
    makecontext(&fiber->context, reinterpret_cast<void (*)()>(&Scheduler::enter), 0);
    fibers_.push_back(std::move(fiber));
  }
  // Called by a fiber: goes on when `ready` says so.
  void wait(std::function<bool()> ready) {
    current_->ready = std::move(ready);
    if (_setjmp(current_->left_at) == 0) _longjmp(main_, 1);
  }
  // Something that the hardware does by itself, some time.
  void later(std::function<void()> event) { events_.push_back(std::move(event)); }

  void run() {
    std::vector<int> everyone(fibers_.size()), lanes(kFibersOfWarp);
    std::iota(everyone.begin(), everyone.end(), 0);
    std::size_t done = 0;
    bool stuck = false;
    while (done < fibers_.size()) {
      // mostly one warp runs, so that warps get as far apart as their barriers let them; one that is stuck would be so
      // until another runs
      bool other = false, all_run = false;
      do {
        other = random_() % 16 == 0;
        if (other) favourite_ = random_() % (fibers_.size() / kFibersOfWarp);
        all_run = random_() % 16 == 0;
      } while (stuck && !other && !all_run);
      if (!all_run) std::iota(lanes.begin(), lanes.end(), favourite_ * kFibersOfWarp);
      std::vector<int>& order = all_run ? everyone : lanes;
      std::shuffle(order.begin(), order.end(), random_);
      const std::size_t rarity = std::max<std::size_t>(1, 64 * order.size() / fibers_.size());  // of an event
      bool progress = false;
      for (const int i : order) {
        if (!events_.empty() && random_() % rarity == 0) happen();
        Fiber& fiber = *fibers_[i];
        if (fiber.done) continue;
        // one block starts only when the others can do nothing without it
        if (i / threads_ == held_back_) continue;
        if (fiber.ready && !fiber.ready()) continue;
        fiber.ready = nullptr;
        resume(fiber);
        if (error_) std::rethrow_exception(error_);
        done += fiber.done;
        progress = true;
      }
      stuck = !progress;
      if (all_run && stuck && done < fibers_.size()) {
        if (!events_.empty()) {
          happen();
        } else if (held_back_ >= 0) {
          held_back_ = -1;
        } else {
          throw std::runtime_error("deadlock: every thread waits");
        }
      }
    }
    if (!events_.empty()) throw std::runtime_error("a copy is in flight after the last thread has left");
  }

 private:
  static constexpr std::size_t kStack = 64 << 10;
  static inline Scheduler* running_;

  // Until it waits or ends.
  void resume(Fiber& fiber) {
    running_ = this;
    current_ = &fiber;
    if (_setjmp(main_) != 0) return;
    if (fiber.begun) _longjmp(fiber.left_at, 1);
    fiber.begun = true;
    setcontext(&fiber.context);
  }
  static void enter() {
    Fiber& fiber = *running_->current_;
    try {
      fiber.body();
    } catch (...) {
      running_->error_ = std::current_exception();
    }
    fiber.done = true;
    _longjmp(running_->main_, 1);
  }
  void happen() {
    const std::size_t i = random_() % events_.size();
    const std::function<void()> event = std::move(events_[i]);
    events_.erase(events_.begin() + i);
    event();
  }

  std::mt19937_64& random_;
  int threads_;  // of a block
  int held_back_;
  jmp_buf main_;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<std::function<void()>> events_;
  Fiber* current_ = nullptr;
  int favourite_ = 0;  // warp
  std::exception_ptr error_;
};

inline void require(bool condition, const char* what) {
  if (!condition) throw std::runtime_error(what);
}

// Opens a new generation when `count` threads have arrived.
struct Rendezvous {
  int count, arrived = 0;
  long generation = 0;

  long arrive() {
    const long mine = generation;
    if (++arrived == count) {
      arrived = 0;
      ++generation;
    }
    return mine;
  }
};

// Null, or what `run` threw.
template <class Run>
const char* guarded(const Run& run) {
  static thread_local std::string error;
  try {
    run();
  } catch (const std::exception& caught) {
    error = caught.what();
    return error.c_str();
  }
  return nullptr;
}

}  // namespace entropy_kernels::cuda

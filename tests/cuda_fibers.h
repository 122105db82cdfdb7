// The threads of an emulated launch: a fiber each, resumed in random order.
#pragma once

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

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  std::function<void()> body;
  std::function<bool()> ready;  // empty: at once
  bool done = false;
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
    fiber->context.uc_link = &main_;
    makecontext(&fiber->context, reinterpret_cast<void (*)()>(&Scheduler::enter), 0);
    fibers_.push_back(std::move(fiber));
  }
  // Called by a fiber: goes on when `ready` says so.
  void wait(std::function<bool()> ready) {
    current_->ready = std::move(ready);
    swapcontext(&current_->context, &main_);
  }
  // Something that the hardware does by itself, some time.
  void later(std::function<void()> event) { events_.push_back(std::move(event)); }

  void run() {
    std::vector<int> order(fibers_.size());
    std::iota(order.begin(), order.end(), 0);
    for (bool all_done = false; !all_done;) {
      std::shuffle(order.begin(), order.end(), random_);
      if (random_() % 16 == 0) favourite_ = random_() % (fibers_.size() / kFibersOfWarp);
      const bool all_run = random_() % 16 == 0;
      bool progress = false;
      all_done = true;
      for (const int i : order) {
        if (!events_.empty() && random_() % 64 == 0) happen();
        Fiber& fiber = *fibers_[i];
        if (fiber.done) continue;
        all_done = false;
        // mostly one warp runs, so that warps get as far apart as their barriers let them
        if (!all_run && i / kFibersOfWarp != favourite_) {
          progress = true;
          continue;
        }
        // one block starts only when the others can do nothing without it
        if (i / threads_ == held_back_) continue;
        if (fiber.ready && !fiber.ready()) continue;
        fiber.ready = nullptr;
        running_ = this;
        current_ = &fiber;
        swapcontext(&main_, &fiber.context);
        if (error_) std::rethrow_exception(error_);
        progress = true;
      }
      if (!progress && !all_done) {  // in a pass in which all could run
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

  static void enter() {
    Fiber& fiber = *running_->current_;
    try {
      fiber.body();
    } catch (...) {
      running_->error_ = std::current_exception();
    }
    fiber.done = true;
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
  ucontext_t main_;
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

// What is asked of a kernel or set for it once per device, not at every launch.
#pragma once

#include <map>
#include <mutex>
#include <utility>

namespace entropy_kernels::cuda {

// Any number of devices and threads. Who comes while another thread asks waits for the answer.
template <class Value>
class OncePerDevice {
 public:
  // What `ask` returned for this kernel on this device. If it throws, the next call asks again.
  template <class Ask>
  Value of(const void* kernel, int device, const Ask& ask) {
    const std::lock_guard<std::mutex> guard(lock_);
    const std::pair key(kernel, device);
    const auto known = known_.find(key);
    return known != known_.end() ? known->second : known_.emplace(key, ask()).first->second;
  }

 private:
  std::mutex lock_;
  std::map<std::pair<const void*, int>, Value> known_;
};

}  // namespace entropy_kernels::cuda

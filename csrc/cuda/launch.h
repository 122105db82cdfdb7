// Launching: every error is an exception, the compute capability is asked of the compiled kernel.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "problem.h"

namespace entropy_kernels::cuda {

inline void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // or the next call, whoever's it is, would report this one
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

// On the current device, which keeps it: once is enough (once_per_device.h). Also while a graph is captured, since it is
// no work of a stream.
inline void set_attribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  check(cudaFuncSetAttribute(kernel, attribute, value), "cudaFuncSetAttribute");
}

inline int current_device() {
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  return device;
}

// Calls run(E{}) for the dtype, where E is BFloat16, Float16, Float32 or Float64 of the accumulator T.
template <typename T, class Run>
auto for_element(Element element, const Run& run) {
  if constexpr (sizeof(T) == 8) {
    return run(Float64{});
  } else {
    switch (element) {
      case Element::kBFloat16:
        return run(BFloat16{});
      case Element::kFloat16:
        return run(Float16{});
      default:
        return run(Float32{});
    }
  }
}

constexpr std::int64_t kMaxBlocks = 0x7fffffff;

constexpr Element kElements[] = {Element::kFloat32, Element::kBFloat16, Element::kFloat16, Element::kFloat64};

inline std::string element_name(Element element) {
  const char* names[] = {"fp32", "bf16", "fp16", "fp64"};
  return names[static_cast<int>(element)];
}

// Threads that a row keeps busy: short ones would leave most of a full block idle.
inline int threads_for(int columns, Element element) {
  const int per_warp = kWarp * kVectors * 16 / element_size(element);
  const int warps = (columns + per_warp - 1) / per_warp;
  return kWarp * (warps < 1 ? 1 : warps > kMaxWarps ? kMaxWarps : warps);
}

// A one-dimensional grid of `parts` blocks per row.
inline dim3 grid(int rows, int parts) {
  const std::int64_t blocks = static_cast<std::int64_t>(rows) * parts;
  if (blocks > kMaxBlocks) {
    throw std::runtime_error("logits: expected at most " + std::to_string(kMaxBlocks) + " blocks of work, got " +
                             std::to_string(blocks));
  }
  return dim3(static_cast<unsigned>(blocks));
}

}  // namespace entropy_kernels::cuda

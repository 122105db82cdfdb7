// What the operators (token_stats.cpp) hand to the kernels (token_stats_{forward,backward}.cu), free of torch.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "problem.h"

namespace entropy_kernels::cuda {

// How the forward pass cuts rows: `parts` blocks share one.
struct ForwardPlan {
  bool bulk;  // bulk copies into shared memory, parts merged through it; else plain loads, parts merged through scratch
  int threads;
  int parts;
  std::size_t scratch_bytes;  // for the states of the parts and, from the offset on, a counter per row
  std::size_t counter_offset;
};

// `vectors` as in ForwardArguments.
template <typename T>
ForwardPlan plan_forward(Element element, const Problem<T>& problem, bool vectors, int device);

// Enqueues the forward pass; what the plan says about `arguments` is set here.
template <typename T>
void launch_forward(Element element, const ForwardPlan& plan, ForwardArguments<T> arguments, void* scratch,
                    cudaStream_t stream);

// Enqueues the backward pass; parts, vectors and reversed of `arguments` are set here.
template <typename T>
void launch_backward(Element element, BackwardArguments<T> arguments, cudaStream_t stream);

}  // namespace entropy_kernels::cuda

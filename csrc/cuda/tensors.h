// What operators ask of tensors: scratch memory, the current stream.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/shim_utils.h>

#include <cstdint>

namespace entropy_kernels::cuda {

// Scratch memory of 8-byte words, freed when the operator returns: the allocator gives it to nothing that runs before
// the kernel on this stream.
inline torch::stable::Tensor words(const torch::stable::Tensor& like, int64_t count) {
  return torch::stable::new_empty(like, {count}, torch::headeronly::ScalarType::Long);
}

inline cudaStream_t current_stream(const torch::stable::Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device(), &stream));
  return static_cast<cudaStream_t>(stream);
}

}  // namespace entropy_kernels::cuda

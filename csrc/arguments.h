// How the native operators check their tensors: errors name the argument, what was expected, and what came. Whoever
// calls torch.ops.entropy_kernels_native by hand meets these, and no kernel may read what they have not seen.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/shim_utils.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <numeric>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace entropy_kernels {

template <class T>
const T* data(const torch::stable::Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}
template <class T>
const T* data(const std::optional<torch::stable::Tensor>& tensor) {
  return tensor ? data<T>(*tensor) : nullptr;
}
template <class T>
T* mutable_data(const torch::stable::Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

inline std::string shape_of(const torch::stable::Tensor& tensor) {
  std::string text = "(";
  for (std::int64_t i = 0; i < tensor.dim(); ++i) text += (i ? ", " : "") + std::to_string(tensor.size(i));
  return text + ")";
}

inline const char* dtype_of(const torch::stable::Tensor& tensor) {
  return torch::headeronly::toString(tensor.scalar_type());
}

// torch makes an undefined tensor of Python's None, and asking that for anything fails without a name.
inline void check_defined(const char* name, const torch::stable::Tensor& tensor) {
  STD_TORCH_CHECK(tensor.defined(), name, ": expected a tensor, got None");
}

#ifdef USE_CUDA
constexpr const char* kDevice = "CUDA";
inline bool is_here(const torch::stable::Tensor& tensor) { return tensor.is_cuda(); }
#else
constexpr const char* kDevice = "CPU";
inline bool is_here(const torch::stable::Tensor& tensor) { return tensor.is_cpu(); }
#endif

inline std::string device_of(const torch::stable::Tensor& tensor) {
  if (tensor.is_cpu()) return "CPU";
  if (tensor.is_cuda()) return "CUDA device " + std::to_string(tensor.get_device());
  std::int32_t type = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor.get(), &type));
  return type == aoti_torch_device_type_meta() ? "meta" : "another device";
}

// One more than the offset of the last element, from the first, in elements.
inline std::int64_t extent_of(const torch::stable::Tensor& tensor) {
  if (tensor.numel() == 0) return 0;
  std::int64_t last = 0;
  for (std::int64_t i = 0; i < tensor.dim(); ++i) last += (tensor.size(i) - 1) * tensor.stride(i);
  return last + 1;
}

// A tensor with memory behind all its elements (a storage can be resized).
inline void check_storage(const char* name, const torch::stable::Tensor& tensor) {
  std::int32_t layout = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_layout(tensor.get(), &layout));
  STD_TORCH_CHECK(layout == aoti_torch_layout_strided(), name, ": expected a strided tensor, got another layout");
  if (tensor.numel() == 0) return;
  std::int64_t bytes = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(tensor.get(), &bytes));
  const std::int64_t needed =
      (tensor.storage_offset() + extent_of(tensor)) * static_cast<std::int64_t>(tensor.element_size());
  STD_TORCH_CHECK(bytes >= needed, name, ": expected a storage of at least ", needed, " bytes for its shape, got ",
                  bytes);
}

// The same on this half's device, that of `like`.
inline void check_memory(const char* name, const torch::stable::Tensor& tensor, const torch::stable::Tensor& like) {
  STD_TORCH_CHECK(is_here(tensor), name, ": expected a ", kDevice, " tensor, got one on ", device_of(tensor));
  STD_TORCH_CHECK(tensor.get_device() == like.get_device(), name, ": expected a tensor on ", device_of(like),
                  ", as the others, got one on ", device_of(tensor));
  check_storage(name, tensor);
}

// The same, or numbers on the CPU, which the host reads and a kernel gets by value.
inline void check_numbers(const char* name, const torch::stable::Tensor& tensor, const torch::stable::Tensor& like) {
  tensor.is_cpu() ? check_storage(name, tensor) : check_memory(name, tensor, like);
}

inline void check_dtype(const char* name, const torch::stable::Tensor& tensor,
                        std::initializer_list<torch::headeronly::ScalarType> expected) {
  check_defined(name, tensor);
  const auto dtype = tensor.scalar_type();
  if (std::find(expected.begin(), expected.end(), dtype) != expected.end()) return;
  std::string names;
  for (const auto one : expected) {
    names += std::string(names.empty() ? "" : " or ") + torch::headeronly::toString(one);
  }
  STD_TORCH_CHECK(false, name, ": expected dtype ", names, ", got ", dtype_of(tensor));
}

inline void check_shape(const char* name, const torch::stable::Tensor& tensor, const std::vector<std::int64_t>& shape) {
  bool same = tensor.dim() == static_cast<std::int64_t>(shape.size());
  for (std::int64_t i = 0; same && i < tensor.dim(); ++i) same = tensor.size(i) == shape[i];
  if (same) return;
  std::string text;
  for (const std::int64_t size : shape) text += std::to_string(size) + (shape.size() == 1 ? "," : ", ");
  if (shape.size() > 1) text.resize(text.size() - 2);
  STD_TORCH_CHECK(false, name, ": expected shape (", text, "), got ", shape_of(tensor));
}

inline void check_contiguous(const char* name, const torch::stable::Tensor& tensor) {
  STD_TORCH_CHECK(tensor.is_contiguous(), name, ": expected a contiguous tensor, got another layout of shape ",
                  shape_of(tensor));
}

// Whether two elements may share memory: each dimension has to step over all that the ones of smaller strides span; of
// the first two, the first equal offsets are where both are the least common multiple of the strides. As
// check_own_memory of entropy_kernels/_arguments.py.
inline bool overlaps_itself(const torch::stable::Tensor& tensor) {
  std::vector<std::pair<std::int64_t, std::int64_t>> dims;  // stride, size
  for (std::int64_t i = 0; i < tensor.dim(); ++i) {
    if (tensor.size(i) > 1) dims.emplace_back(tensor.stride(i), tensor.size(i));
  }
  std::sort(dims.begin(), dims.end());
  std::int64_t span = 1;
  for (std::size_t i = 0; i < dims.size(); ++i) {
    const auto [stride, size] = dims[i];
    bool apart = stride >= span;
    if (!apart && i == 1 && dims[0].first > 0) {
      const std::int64_t common = std::lcm(stride, dims[0].first);
      apart = common >= dims[0].first * dims[0].second || common >= stride * size;
    }
    if (!apart) return true;
    span += (size - 1) * stride;
  }
  return false;
}

// Whether the memory from the first to the last element of both has a byte in common.
inline bool overlap(const torch::stable::Tensor& a, const torch::stable::Tensor& b) {
  const auto range = [](const torch::stable::Tensor& tensor) {
    const auto begin = reinterpret_cast<std::uintptr_t>(tensor.const_data_ptr());
    return std::pair(begin, begin + static_cast<std::uintptr_t>(extent_of(tensor)) * tensor.element_size());
  };
  const auto [a_begin, a_end] = range(a);
  const auto [b_begin, b_end] = range(b);
  return a_begin < a_end && b_begin < b_end && a_begin < b_end && b_begin < a_end;
}

}  // namespace entropy_kernels

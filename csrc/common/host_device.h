// Shared by host and device code; nothing under common/ includes torch.
#pragma once

#include <limits>

#if defined(__CUDACC__) || defined(__HIPCC__)
#define EK_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define EK_HOST_DEVICE inline
#endif

namespace entropy_kernels {

// Device code may use the value of a constant, but may not call std::numeric_limits, which is host code.
template <typename T>
inline constexpr T kInfinity = std::numeric_limits<T>::infinity();
template <typename T>
inline constexpr T kNaN = std::numeric_limits<T>::quiet_NaN();

}  // namespace entropy_kernels

// Shared by host and device code; nothing under common/ includes torch.
#pragma once

#if defined(__CUDACC__) || defined(__HIPCC__)
#define EK_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define EK_HOST_DEVICE inline
#endif

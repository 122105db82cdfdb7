"""Triton kernels: NVIDIA and AMD GPUs; on CPU tensors only under TRITON_INTERPRET=1."""

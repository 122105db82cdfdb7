// Schemas of the native kernels, once. Each csrc/cpu/*.cpp (and later csrc/cuda/*.cu) registers its implementation
// with STABLE_TORCH_LIBRARY_IMPL. Through torch's stable ABI: one binary serves every torch >= 2.10 and every Python.
// These are kernels, not public operators: autograd, fakes and argument checks belong to entropy_kernels/ops.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(entropy_kernels_native, m) {
  m.def(
      "token_stats_forward(Tensor logits, Tensor target, Tensor temperature, float softcap, int ignore_index, "
      "int vocab_start, int vocab_size, int want) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "token_stats_backward(Tensor? grad_logprob, Tensor? grad_entropy, Tensor? grad_collision, Tensor logits, "
      "Tensor target, Tensor temperature, Tensor state, float softcap, int ignore_index, int vocab_start, "
      "int vocab_size, Tensor(a!) dlogits) -> ()");
}

// Schemas of the native kernels, once. Each csrc/cpu/*.cpp and csrc/cuda/*.cpp registers its implementation
// with STABLE_TORCH_LIBRARY_IMPL. Through torch's stable ABI: one binary serves every torch >= 2.10 and every Python.
// These are kernels, not public operators: autograd and fakes belong to entropy_kernels/ops. They check their arguments
// (arguments.h) as anybody can call them; the CPU half registers for all devices that have no kernels, so that a tensor
// from elsewhere, even one on "meta", is refused by name.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(entropy_kernels_native, m) {
  // stats (S, N): those of `want`, in the order of its bits (common/softmax_state.h), as grad_stats, of any strides.
  m.def(
      "token_stats_forward(Tensor logits, Tensor target, Tensor temperature, float softcap, int ignore_index, "
      "int vocab_start, int vocab_size, int want) -> (Tensor stats, Tensor state)");
  m.def(
      "token_stats_backward(Tensor grad_stats, Tensor logits, Tensor target, Tensor temperature, Tensor state, "
      "float softcap, int ignore_index, int vocab_start, int vocab_size, int want, Tensor(a!) dlogits) -> ()");
  m.def("token_covariance(Tensor logprob, Tensor advantages, Tensor? mask) -> Tensor");
  // `numbers`: float64 [ratio, k, low, high], or [ratio, k]; where it is given it is read in the place of those.
  m.def(
      "clip_cov_mask(Tensor covariance, Tensor? mask, Tensor? exclude, Tensor? token_index, Tensor seed, float ratio, "
      "int k, bool at_least_one, float low, float high, bool quantile, bool closed, Tensor? numbers=None) -> Tensor");
  m.def(
      "kl_cov_mask(Tensor covariance, Tensor? mask, Tensor? exclude, Tensor? token_index, float ratio, int k, "
      "bool at_least_one, Tensor? numbers=None) -> Tensor");
  // `numbers`: float64 [budget, limit, share], NaN for those that are not given.
  m.def(
      "budget_mask(Tensor score, Tensor? mask, Tensor? exclude, Tensor? token_index, Tensor numbers) -> Tensor");
  // Selection in steps, for batches spread over ranks.
  m.def("covariance_extremes(Tensor logprob, Tensor advantages, Tensor? mask) -> Tensor");
  m.def("covariance_sums(Tensor logprob, Tensor advantages, Tensor? mask, Tensor scales) -> Tensor");
  m.def("covariance_apply(Tensor logprob, Tensor advantages, Tensor? mask, Tensor means) -> Tensor");
  m.def("selection_value_keys(Tensor covariance, Tensor? mask, Tensor? exclude) -> Tensor");
  m.def(
      "selection_random_keys(Tensor value_keys, Tensor band, Tensor? token_index, Tensor offset, Tensor seed) "
      "-> Tensor");
  m.def("selection_key_histogram(Tensor keys, Tensor state, int shift, int bits) -> Tensor");
  m.def(
      "selection_weight_histogram(Tensor keys, Tensor state, Tensor scale, int shift, int bits) -> Tensor");
  m.def(
      "selection_index_histogram(Tensor keys, Tensor? token_index, Tensor offset, Tensor key_state, Tensor state, "
      "int shift, int bits, int known) -> Tensor");
  m.def(
      "selection_mask(Tensor keys, Tensor? token_index, Tensor offset, Tensor threshold, Tensor last_index) "
      "-> Tensor");
}

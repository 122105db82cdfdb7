// The steps of common/selection_steps.h, and the extremes and sums of the covariance, over all tokens.
#include "common/fixed_point.h"
#include "common/selection_steps.h"
#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "cuda/selection.h"

namespace entropy_kernels::cuda {
namespace {

constexpr int kStepThreads = 256;
constexpr int kDigitThreads = 1024;  // few blocks: each adds up to 2048 bins to the global histogram
constexpr int kTokensPerThread = 8;
constexpr int kMaxStepBlocks = 4096;

__device__ int64_t first_token() { return int64_t{blockIdx.x} * blockDim.x + threadIdx.x; }
__device__ int64_t token_stride() { return int64_t{gridDim.x} * blockDim.x; }

__device__ unsigned long long* atomic_word(void* p) { return static_cast<unsigned long long*>(p); }

__device__ void add_shared(uint32_t* sum, uint32_t value) { atomicAdd(sum, value); }
// Two additions of 32 bits, of which the first tells the carry: one of 64 bits is a loop in shared memory.
__device__ void add_shared(uint64_t* sum, uint64_t value) {
  auto* words = reinterpret_cast<uint32_t*>(sum);
  const auto low = static_cast<uint32_t>(value);
  const uint32_t carry = atomicAdd(words, low) > ~low;
  if (const uint32_t high = static_cast<uint32_t>(value >> 32) + carry; high != 0) {
    atomicAdd(words + 1, high);
  }
}

template <class Step>
__global__ void __launch_bounds__(kStepThreads) token_step(const __grid_constant__ Step step, int64_t tokens) {
  for (int64_t i = first_token(); i < tokens; i += token_stride()) {
    step(i);
  }
}

// Grid (blocks, rows); bins (rows, kRadixBins), 0.
template <class Digit>
__global__ void __launch_bounds__(kDigitThreads)
    digit_step(const __grid_constant__ Digit digit, int64_t tokens, int64_t* bins) {
  using Sum = typename Digit::Sum;  // a block sees fewer than 2^32 tokens
  __shared__ Sum mine[kRadixBins];
  for (int bin = threadIdx.x; bin < kRadixBins; bin += kDigitThreads) {
    mine[bin] = 0;
  }
  __syncthreads();
  for (int64_t i = first_token(); i < tokens; i += token_stride()) {
    const int bin = digit(blockIdx.y, i);
    if (bin >= 0) {
      add_shared(mine + bin, digit.weight(i));
    }
  }
  __syncthreads();
  for (int bin = threadIdx.x; bin < kRadixBins; bin += kDigitThreads) {
    if (mine[bin] != 0) {
      atomicAdd(atomic_word(bins + blockIdx.y * kRadixBins + bin), mine[bin]);
    }
  }
}

// out (3,) double, 0: largest |logprob| and |advantage|, number of tokens that count. Doubles >= 0 compare like their
// bits, and whole numbers below 2^53 add exactly.
template <class T>
__global__ void __launch_bounds__(kStepThreads, 2)
    extremes_step(const __grid_constant__ TokenPairs<T> pairs, double* out) {
  typename Magnitude<T>::Bits largest_logprob = 0, largest_advantage = 0;
  int count = 0;
  for (int64_t i = first_token(); i < pairs.tokens; i += token_stride()) {
    const bool valid = pairs.counts(i);
    largest_logprob = max(largest_logprob, Magnitude<T>::of(pairs.logprob[i], valid));
    largest_advantage = max(largest_advantage, Magnitude<T>::of(pairs.advantages[i], valid));
    count += valid;
  }
  for (int lane = kLanes / 2; lane > 0; lane /= 2) {
    largest_logprob = max(largest_logprob, __shfl_xor_sync(0xffffffffu, largest_logprob, lane));
    largest_advantage = max(largest_advantage, __shfl_xor_sync(0xffffffffu, largest_advantage, lane));
    count += __shfl_xor_sync(0xffffffffu, count, lane);
  }
  if (threadIdx.x % kLanes == 0 && count != 0) {
    atomicMax(atomic_word(out), __double_as_longlong(Magnitude<T>::value(largest_logprob)));
    atomicMax(atomic_word(out + 1), __double_as_longlong(Magnitude<T>::value(largest_advantage)));
    atomicAdd(out + 2, static_cast<double>(count));
  }
}

// sums (2,), 0
template <class T>
__global__ void __launch_bounds__(kStepThreads, 2)
    sums_step(const __grid_constant__ TokenPairs<T> pairs, const double* scales, int64_t* sums) {
  const double logprob_scale = scales[0], advantage_scale = scales[1];
  int64_t logprob_sum = 0, advantage_sum = 0;
  for (int64_t i = first_token(); i < pairs.tokens; i += token_stride()) {
    const bool valid = pairs.counts(i);
    logprob_sum = wrapping_sum(logprob_sum, to_fixed_point(value_if(pairs.logprob[i], valid), logprob_scale));
    advantage_sum = wrapping_sum(advantage_sum, to_fixed_point(value_if(pairs.advantages[i], valid), advantage_scale));
  }
  for (int lane = kLanes / 2; lane > 0; lane /= 2) {
    logprob_sum = wrapping_sum(logprob_sum, __shfl_xor_sync(0xffffffffu, logprob_sum, lane));
    advantage_sum = wrapping_sum(advantage_sum, __shfl_xor_sync(0xffffffffu, advantage_sum, lane));
  }
  if (threadIdx.x % kLanes == 0) {
    atomicAdd(atomic_word(sums), static_cast<unsigned long long>(logprob_sum));
    atomicAdd(atomic_word(sums + 1), static_cast<unsigned long long>(advantage_sum));
  }
}

dim3 step_grid(int64_t tokens, int threads, int64_t rows = 1) {
  const int64_t per_block = int64_t{threads} * kTokensPerThread;
  const int64_t blocks = (tokens + per_block - 1) / per_block;
  return dim3(static_cast<unsigned>(blocks < kMaxStepBlocks ? blocks : kMaxStepBlocks), static_cast<unsigned>(rows));
}

}  // namespace

template <class Step>
void launch_token_step(const Step& step, int64_t tokens, cudaStream_t stream) {
  token_step<<<step_grid(tokens, kStepThreads), kStepThreads, 0, stream>>>(step, tokens);
  check(cudaGetLastError(), "selection: launch");
}
template void launch_token_step(const ValueKeyStep&, int64_t, cudaStream_t);
template void launch_token_step(const RandomKeyStep&, int64_t, cudaStream_t);
template void launch_token_step(const MaskStep&, int64_t, cudaStream_t);
template void launch_token_step(const CovarianceStep<float>&, int64_t, cudaStream_t);
template void launch_token_step(const CovarianceStep<double>&, int64_t, cudaStream_t);

template <class Digit>
void launch_digit_step(const Digit& digit, int64_t rows, int64_t tokens, int64_t* bins, cudaStream_t stream) {
  digit_step<<<step_grid(tokens, kDigitThreads, rows), kDigitThreads, 0, stream>>>(digit, tokens, bins);
  check(cudaGetLastError(), "selection: launch");
}
template void launch_digit_step(const KeyDigitStep&, int64_t, int64_t, int64_t*, cudaStream_t);
template void launch_digit_step(const WeightDigitStep&, int64_t, int64_t, int64_t*, cudaStream_t);
template void launch_digit_step(const IndexDigitStep&, int64_t, int64_t, int64_t*, cudaStream_t);

template <class T>
void launch_extremes(const TokenPairs<T>& pairs, double* out, cudaStream_t stream) {
  extremes_step<<<step_grid(pairs.tokens, kStepThreads), kStepThreads, 0, stream>>>(pairs, out);
  check(cudaGetLastError(), "selection: launch");
}
template void launch_extremes(const TokenPairs<float>&, double*, cudaStream_t);
template void launch_extremes(const TokenPairs<double>&, double*, cudaStream_t);

template <class T>
void launch_sums(const TokenPairs<T>& pairs, const double* scales, int64_t* sums, cudaStream_t stream) {
  sums_step<<<step_grid(pairs.tokens, kStepThreads), kStepThreads, 0, stream>>>(pairs, scales, sums);
  check(cudaGetLastError(), "selection: launch");
}
template void launch_sums(const TokenPairs<float>&, const double*, int64_t*, cudaStream_t);
template void launch_sums(const TokenPairs<double>&, const double*, int64_t*, cudaStream_t);

std::vector<Kernel> selection_step_kernels() {
  const auto pointer = [](auto* kernel) { return reinterpret_cast<const void*>(kernel); };
  return {{"step value keys", pointer(token_step<ValueKeyStep>)},
          {"step random keys", pointer(token_step<RandomKeyStep>)},
          {"step mask", pointer(token_step<MaskStep>)},
          {"step covariance fp32", pointer(token_step<CovarianceStep<float>>)},
          {"step covariance fp64", pointer(token_step<CovarianceStep<double>>)},
          {"step key digits", pointer(digit_step<KeyDigitStep>)},
          {"step weight digits", pointer(digit_step<WeightDigitStep>)},
          {"step index digits", pointer(digit_step<IndexDigitStep>)},
          {"step extremes fp32", pointer(extremes_step<float>)},
          {"step extremes fp64", pointer(extremes_step<double>)},
          {"step sums fp32", pointer(sums_step<float>)},
          {"step sums fp64", pointer(sums_step<double>)}};
}

}  // namespace entropy_kernels::cuda

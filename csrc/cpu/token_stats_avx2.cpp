// token_stats for CPUs with AVX2, FMA and F16C. setuptools has no flags per file, so the target is set here, after
// every include: what the headers define stays baseline code and may be linked into any path.
#include "token_stats.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <limits>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

namespace entropy_kernels::cpu::avx2 {
namespace {
#include "simd_avx2.h"
#include "token_stats_kernel.h"
}  // namespace

const RowKernels& kernels(Element element) { return row_kernels_of(element); }

}  // namespace entropy_kernels::cpu::avx2

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

// token_stats for CPUs with AVX-512F. setuptools has no flags per file, so the target is set here, after
// every include: what the headers define stays baseline code and may be linked into any path.
#include "token_stats.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <limits>

// GCC's own intrinsics start from an undefined register, which it then warns about.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx2,fma,f16c")
#endif

namespace entropy_kernels::cpu::avx512 {
namespace {
#include "simd_avx512.h"
#include "token_stats_kernel.h"
}  // namespace

const RowKernels& kernels(Element element) { return row_kernels_of(element); }

}  // namespace entropy_kernels::cpu::avx512

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

// token_stats for CPUs with AVX2, FMA and F16C.
#include "token_stats.h"

#if defined(__x86_64__)
#include <cmath>
#include <cstdint>
#include <limits>

#include "simd_target.h"

EK_TARGET_BEGIN("avx2,fma,f16c")
namespace entropy_kernels::cpu::avx2 {
namespace {
#include "simd_avx2.h"
#include "token_stats_kernel.h"
}  // namespace

const RowKernels& kernels(Element element) { return row_kernels_of(element); }

}  // namespace entropy_kernels::cpu::avx2
EK_TARGET_END
#endif

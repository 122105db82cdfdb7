// token_stats for every other CPU: baseline x86-64, aarch64, whatever GCC or Clang compile for.
#include <cmath>
#include <cstdint>
#include <limits>

#include "token_stats.h"

namespace entropy_kernels::cpu::portable {
namespace {
#include "simd_portable.h"
#include "token_stats_kernel.h"
}  // namespace

const RowKernels& kernels(Element element) { return row_kernels_of(element); }

}  // namespace entropy_kernels::cpu::portable

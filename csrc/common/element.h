// The dtypes that logits come in.
#pragma once

namespace entropy_kernels {

enum class Element { kFloat32, kBFloat16, kFloat16, kFloat64 };

}  // namespace entropy_kernels

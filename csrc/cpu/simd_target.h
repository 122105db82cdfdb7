// Code for instructions that the CPU may lack, which setuptools has no flags for, per file: it stands between
// EK_TARGET_BEGIN("avx2,fma") and EK_TARGET_END, after every include: what the headers define stays baseline code and may
// be linked into any path.
#pragma once

#include <immintrin.h>

#define EK_PRAGMA(...) _Pragma(#__VA_ARGS__)
#if defined(__clang__)
#define EK_TARGET_BEGIN(features) EK_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define EK_TARGET_END EK_PRAGMA(clang attribute pop)
#else
#define EK_TARGET_BEGIN(features) EK_PRAGMA(GCC push_options) EK_PRAGMA(GCC target(features))
#define EK_TARGET_END EK_PRAGMA(GCC pop_options)
// GCC's own intrinsics start from an undefined register, which it then warns about.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

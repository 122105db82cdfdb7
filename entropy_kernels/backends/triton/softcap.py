"""softcap·tanh(z / softcap) in Triton."""

from __future__ import annotations

import triton
import triton.language as tl

# tanh(u)/u - 1 over u², a least-maximum fit on |u| <= _TANH_SERIES: relative error of tanh 1e-9 there
_TANH_SERIES = tl.constexpr(0.55)
_TANH_0 = tl.constexpr(-0.33333317559645936)
_TANH_1 = tl.constexpr(0.13332586137946617)
_TANH_2 = tl.constexpr(-0.05385230987290323)
_TANH_3 = tl.constexpr(0.021071678954632377)
_TANH_4 = tl.constexpr(-0.006274239435707777)


@triton.jit
def cap(z, softcap, SOFTCAP: tl.constexpr):
    """(softcap·tanh(z / softcap), e^{-2|z / softcap|}), or z and 0 without a cap.

    tanh comes from exp2: there is no device library in the interpreter, nor the same one on every GPU.
    """
    q = z * 0
    if SOFTCAP:
        u = z * (1 / softcap)
        size = tl.abs(u)
        q = tl.exp2(size * -2.8853900817779268)  # 2·log2(e)
        tanh = (1 - q) / (1 + q)
        if z.dtype == tl.float32:
            # 1 - q cancels where tanh is small
            square = size * size
            series = _TANH_3 + square * _TANH_4
            series = _TANH_2 + square * series
            series = _TANH_1 + square * series
            series = _TANH_0 + square * series
            tanh = tl.where(size < _TANH_SERIES, size + size * (square * series), tanh)
        z = softcap * tl.where(u < 0, -tanh, tanh)
    return z, q

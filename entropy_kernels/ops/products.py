"""Matrix products of torch (MKL, oneDNN, cuBLAS) that accumulate in fp32 and round once, to the dtype of the result.

torch offers half-precision products with an fp32 result on GPUs only, and on a CPU without the instructions a half
product is tens of times slower than one in fp32. There the operands are converted first: exact, and as fast as can be.
On a GPU cuBLAS may round partial sums to the operands' dtype, as torch lets it by default
(torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction): that is the caller's to say, as of any product.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

_HALF = (torch.bfloat16, torch.float16)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which products of ``dtype`` are summed."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _native_on_cpu(dtype: torch.dtype) -> bool:
    name = "_is_mkldnn_bf16_supported" if dtype == torch.bfloat16 else "_is_mkldnn_fp16_supported"
    query = getattr(torch.ops.mkldnn, name, None)
    return torch.backends.mkldnn.is_available() and query is not None and query()


_NATIVE_ON_CPU = [dtype for dtype in _HALF if _native_on_cpu(dtype)]  # asked once: compiled code cannot ask


def operand_dtype(dtype: torch.dtype, result: torch.dtype, device_type: str) -> torch.dtype:
    """The dtype that operands of a product in ``dtype`` are converted to where the result is to be in ``result``."""
    if dtype not in _HALF or device_type != "cpu":
        return dtype
    return dtype if dtype == result and dtype in _NATIVE_ON_CPU else torch.float32


def adds_to_fp32(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a product of ``dtype`` is added to a matrix of its accumulator's dtype without one of its own.

    Of a device that is not there, as of tensors on the meta device, it is not known.
    """
    if device.type == "cpu" or dtype not in _HALF:
        return True  # halves are converted first on a CPU
    return device.type == "cuda" and _gpu_adds_to_fp32(dtype, device)


@functools.cache
def _gpu_adds_to_fp32(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether this torch can add a half product to an fp32 matrix; older releases only make a new one."""
    one, total = torch.ones(16, 16, dtype=dtype, device=device), torch.zeros(16, 16, device=device)
    try:
        torch.addmm(total, one, one, out_dtype=torch.float32, out=total)
    except (RuntimeError, NotImplementedError):
        return False
    return True


BLOCK = 32  # elements of a row that oneDNN loads together


def _finite_behind(a: Tensor) -> Tensor:
    """``a`` (n, k) with zeros behind each row, where a product in bf16 reads them; itself if they are there.

    With AMX, oneDNN loads whole blocks of a left factor's rows and multiplies what lies behind a row's end by zeros
    (torch 2.13): the next row, padding, or what comes after the tensor. Zero times NaN is NaN, in a row that has none.
    """
    behind = -a.shape[1] % BLOCK
    if a.dtype != torch.bfloat16 or not a.is_cpu or behind == 0 or a.stride(1) != 1 or a.numel() == 0:
        return a
    begin = a.storage_offset() + a.shape[1]
    end = begin + (a.shape[0] - 1) * a.stride(0) + behind
    inside = end * a.itemsize <= a.untyped_storage().nbytes()
    if inside and not a.as_strided((a.shape[0], behind), a.stride(), begin).any():
        return a
    return torch.nn.functional.pad(a, (0, behind))[:, : a.shape[1]]


def multiply(out: Tensor, a: Tensor, b: Tensor, bias: Tensor | None = None) -> None:
    """``out`` = a @ b + bias, rounded once; a (n, k), b (k, m), bias (m,), out (n, m) of any strides and dtype."""
    operand = operand_dtype(a.dtype, out.dtype, out.device.type)
    a, b = a.to(operand), b.to(operand)
    if out.dtype == operand:
        a = _finite_behind(a)
        if bias is None:
            torch.mm(a, b, out=out)
        else:
            torch.addmm(bias.to(operand), a, b, out=out)
    elif operand in _HALF and out.dtype == torch.float32 and out.is_cuda:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
        if bias is not None:
            out.add_(bias)
    else:
        wide = accumulator(operand)
        a, b = a.to(wide), b.to(wide)
        out.copy_(torch.mm(a, b) if bias is None else torch.addmm(bias.to(wide), a, b))


def multiply_add(total: Tensor, a: Tensor, b: Tensor) -> None:
    """``total`` += a @ b, where total (n, m) is of the accumulator's dtype."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif a.is_cuda and adds_to_fp32(a.dtype, a.device):
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    elif a.is_cuda:
        total.add_(torch.mm(a, b, out_dtype=total.dtype))
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))

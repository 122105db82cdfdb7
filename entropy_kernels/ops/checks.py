"""What the operators check of their arguments, whoever calls them: kernels read bare memory.

The public functions have said the same in their users' words; these errors are for who calls ``torch.ops`` by hand.
Fakes check, too: one tensor on the meta device makes the fake the kernel.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from entropy_kernels._arguments import check_tensor, has_own_operators, memory_range
from entropy_kernels._rows import DIFFERENTIABLE, STATISTICS, RowOptions, state_rows, wanted
from entropy_kernels._torch import below_autograd, schema_arguments

# dtype of logits -> of their statistics, state, temperature and upstream gradients
RESULT = {torch.bfloat16: torch.float32, torch.float16: torch.float32, torch.float32: torch.float32}
RESULT |= {torch.float64: torch.float64}


def register(
    library: torch.library.Library, name: str, run: Callable[..., Any], fake: Callable[..., Any], no_grad: bool = False
) -> None:
    """``run`` and its fake as an operator, of which every tensor argument is dense and has its memory.

    ``no_grad``: there is no derivative, and torch's own error would speak of what ``run`` does.
    """
    arguments = schema_arguments(f"entropy_kernels::{name}")
    tensors = [(i, x.name, "Optional" in str(x.type)) for i, x in enumerate(arguments) if "Tensor" in str(x.type)]

    def checked(function: Callable[..., Any], no_grad: bool) -> Callable[..., Any]:
        def call(*given: Any) -> Any:
            for i, argument, optional in tensors:
                value = given[i]
                if value is None and optional:
                    continue
                plain = type(value) is Tensor and value.layout is torch.strided and value.is_contiguous()
                begin = value.storage_offset() * value.itemsize if plain else 0
                if not plain or value.untyped_storage().nbytes() < begin + value.nbytes:
                    _check_tensor(argument, value)
                if no_grad and value.requires_grad and torch.is_grad_enabled():
                    raise ValueError(
                        f"{argument}: expected a tensor without grad ({name} has no derivative), got "
                        "requires_grad=True; .detach() it, or call under torch.no_grad()"
                    )
            return function(*given)

        return call

    library.impl(name, checked(run, no_grad), "CompositeExplicitAutograd")
    torch.library.register_fake(f"entropy_kernels::{name}", checked(fake, False), lib=library)


def once_differentiable(library: torch.library.Library, name: str, op: str) -> None:
    """Autograd of the operator ``op``, a backward pass: what it returns has no derivative, and an error says so."""

    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            with below_autograd():
                return getattr(torch.ops.entropy_kernels, op).default(*inputs)

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> None:
            raise RuntimeError(f"{name}: double backward (create_graph=True) is not supported")

    def call(*inputs: Any) -> Any:
        if torch.is_grad_enabled():
            return Once.apply(*inputs)
        with below_autograd():
            return getattr(torch.ops.entropy_kernels, op).default(*inputs)

    library.impl(op, call, "Autograd")


def _check_tensor(name: str, value: Any) -> None:
    if isinstance(value, Tensor) and has_own_operators(type(value)):
        return  # a compiler's, which is what its shape says
    check_tensor(name, value)
    if not value.numel():
        return
    (_, needed), got = memory_range(value), value.untyped_storage().nbytes()
    if got < needed:
        raise ValueError(
            f"{name}: expected a storage of at least {needed} bytes for its shape {tuple(value.shape)}, got one that "
            f"was cut to {got}"
        )


Argument = tuple[str, Tensor | None, torch.dtype, tuple]


def check_tensors(device: torch.device, *arguments: Argument) -> None:
    """Each (name, tensor, dtype, shape) is that, and on the device; None is as well."""
    for name, tensor, dtype, shape in arguments:
        if tensor is None:
            continue
        if tensor.dtype != dtype:
            raise TypeError(f"{name}: expected {dtype}, got {tensor.dtype}")
        if tensor.shape != shape:
            raise ValueError(f"{name}: expected shape {tuple(shape)}, got {tuple(tensor.shape)}")
        if tensor.device != device:
            raise ValueError(f"{name}: expected on {device}, got {tensor.device}")


def check_number(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple, device: torch.device) -> None:
    """The same of a number or a few: they may also be on the CPU, from where they are read without a wait."""
    if tensor.dtype != dtype or tensor.shape != shape or (tensor.device != device and not tensor.is_cpu):
        check_tensors(device, (name, tensor, dtype, shape))


def check_floats(name: str, tensor: Tensor, dims: int, shape: str) -> None:
    if tensor.dtype not in RESULT:
        raise TypeError(f"{name}: expected dtype bfloat16, float16, float32 or float64, got {tensor.dtype}")
    if tensor.dim() != dims:
        raise ValueError(f"{name}: expected shape {shape}, got {tuple(tensor.shape)}")


def check_labels(
    rows: int,
    device: torch.device,
    dtype: torch.dtype,  # of the temperature
    target: Tensor,  # (N,)
    temperature: Tensor,  # (1,) or (N,); () if a number
    options: RowOptions,
    number: bool = False,  # whether the temperature may be one: 0-d, also on the CPU
) -> None:
    """What a row of logits comes with, for ``rows`` rows."""
    labels = target.dtype if target.dtype == torch.int32 else torch.int64
    check_tensors(device, ("target", target, labels, (rows,)))
    if number and temperature.dim() == 0:
        check_number("temperature", temperature, dtype, (), device)
    else:
        one = temperature.dim() == 1 and temperature.shape[0] == 1
        check_tensors(device, ("temperature", temperature, dtype, (1,) if one else (rows,)))
    for name, tensor in (("target", target), ("temperature", temperature)):
        if not tensor.is_contiguous():
            raise ValueError(f"{name}: expected a contiguous tensor, got strides {tensor.stride()}")
    if not 0 <= options.softcap < math.inf:
        raise ValueError(f"softcap: expected a finite number > 0, or 0 for none, got {options.softcap}")
    if options.vocab_start < 0:
        raise ValueError(f"vocab_start: expected >= 0, got {options.vocab_start}")
    if options.vocab_size < 0:
        raise ValueError(f"vocab_size: expected >= 0, got {options.vocab_size}")


def check_rows(logits: Tensor, target: Tensor, temperature: Tensor, options: RowOptions) -> None:
    """``logits`` (B, L, V) and what its rows come with."""
    check_floats("logits", logits, 3, "(B, L, V)")
    rows = logits.shape[0] * logits.shape[1]
    check_labels(rows, logits.device, RESULT[logits.dtype], target, temperature, options, True)


def check_head(
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    target: Tensor,
    temperature: Tensor,
    product_dtype: torch.dtype,
    logits_dtype: torch.dtype,
    options: RowOptions,
) -> None:
    """The arguments of an op that makes its logits; V is this rank's."""
    check_floats("hidden", hidden, 2, "(N, H)")
    check_floats("weight", weight, 2, "(V, H)")
    for name, dtype in (("product_dtype", product_dtype), ("logits_dtype", logits_dtype)):
        if dtype not in RESULT:
            raise TypeError(f"{name}: expected bfloat16, float16, float32 or float64, got {dtype}")
    rows, features = hidden.shape
    device = hidden.device
    check_tensors(device, ("weight", weight, weight.dtype, (weight.shape[0], features)))
    if bias is not None:
        check_floats("bias", bias, 1, "(V,)")
        check_tensors(device, ("bias", bias, bias.dtype, (weight.shape[0],)))
    dtype = RESULT[product_dtype]
    if RESULT[logits_dtype] != dtype:
        raise TypeError(
            f"logits_dtype: expected float64 where product_dtype is, and only there, got {logits_dtype} beside "
            f"{product_dtype}"
        )
    check_labels(rows, device, dtype, target, temperature, options)


def check_want(want: int) -> None:
    if not 0 <= want < 1 << len(STATISTICS):
        raise ValueError(f"want: expected a bitmask in [0, {1 << len(STATISTICS)}), got {want}")


def check_state(state: Tensor, target: Tensor, temperature: Tensor, want: int) -> None:
    """``state`` (K, N) is one that a backward pass can start from, of statistics that are differentiable."""
    rows, fields = target.shape[0], state_rows(want & DIFFERENTIABLE)
    if state.dim() != 2 or state.shape[0] < fields:
        raise ValueError(f"state: expected shape ({fields} or more, {rows}), got {tuple(state.shape)}")
    check_tensors(target.device, ("state", state, temperature.dtype, (state.shape[0], rows)))


def check_backward(grad_stats: Tensor, target: Tensor, temperature: Tensor, state: Tensor, want: int) -> None:
    """What a backward pass gets beside the arguments of its forward pass, which have been checked."""
    check_want(want)
    if not want & DIFFERENTIABLE:
        raise ValueError(f"want: expected a statistic that has a derivative among those wanted, got {want}")
    shape = (len(wanted(want)), target.shape[0])
    check_tensors(target.device, ("grad_stats", grad_stats, temperature.dtype, shape))
    check_state(state, target, temperature, want)

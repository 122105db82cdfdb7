"""What every layer does alike with the plain arguments of a call: numbers of any library, and process groups."""

from __future__ import annotations

import inspect
import numbers
import operator
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd import forward_ad


def all_gather(output: torch.Tensor, local: torch.Tensor, group: Any) -> None:
    """``local`` of every rank, one after the other, into ``output``."""
    if hasattr(dist, "all_gather_single"):  # torch 2.13 renamed the function and warns of the old name
        dist.all_gather_single(output, local, group=group)
    else:
        dist.all_gather_into_tensor(output, local, group=group)


def process_group_of(name: Any) -> Any:
    """The process group of a name (newer torch wraps the name in a type of its own)."""
    return dist.distributed_c10d._resolve_process_group(name)


def number(name: str, value: Any) -> Any:
    """``value`` as a Python number (numpy's are numbers too; a compiler's symbolic one stays as it is).

    Raises TypeError, naming the argument; a bool is no number.
    """
    if isinstance(value, (float, int, torch.SymFloat, torch.SymInt)) and not isinstance(value, bool):
        return value
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        return float(value)
    raise TypeError(f"{name}: expected a number, got {type(value).__name__}")


def integer(name: str, value: Any) -> Any:
    """``value`` as a Python int (or a compiler's symbolic one); TypeError, naming the argument, for anything else."""
    if isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool):
        return value
    if not isinstance(value, (bool, torch.Tensor)):
        try:
            return operator.index(value)
        except TypeError:
            pass
    raise TypeError(f"{name}: expected an int, got {type(value).__name__}")


def keywords(function: Callable[..., Any]) -> dict[str, Any]:
    """The keyword-only parameters of a function, with their defaults."""
    parameters = inspect.signature(function).parameters
    return {name: p.default for name, p in parameters.items() if p.kind is p.KEYWORD_ONLY}


def check_tensor(name: str, value: Any, also: str = "") -> None:
    """Raise TypeError, naming the argument, for anything else; ``also``: what else would have done."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor{also}, got {type(value).__name__}")


def check_place(name: str, value: torch.Tensor, like_name: str, like: torch.Tensor) -> None:
    """Raise ValueError where ``value`` is not on the device and of the shape of the argument ``like_name``."""
    if value.device != like.device:
        raise ValueError(f"{name}: expected on the device of {like_name}, {like.device}, got {value.device}")
    if value.shape != like.shape:
        raise ValueError(f"{name}: expected {like_name}'s shape {tuple(like.shape)}, got {tuple(value.shape)}")


def recorded(*values: Any) -> Sequence[Any]:
    """Values, the tensors among them as autograd can save them: what torch.inference_mode() has made is copied."""
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
        return values
    return [x.clone() if isinstance(x, torch.Tensor) and x.is_inference() else x for x in values]


def group_name(group: Any) -> str:
    """The name of a ``batch_group``, "" for None."""
    if group is None:
        return ""
    name = getattr(group, "group_name", None)
    if name is None:
        raise TypeError(f"batch_group: expected a torch.distributed process group or None, got {type(group).__name__}")
    return name


def values_are_checked(tensor: torch.Tensor) -> bool:
    """Errors that need values are raised on the CPU; elsewhere with ENTROPY_KERNELS_DEBUG=1: they cost a sync."""
    return tensor.device.type == "cpu" or debugging()


def debugging() -> bool:
    """Whether checks may cost a sync."""
    return os.environ.get("ENTROPY_KERNELS_DEBUG", "0") == "1"


def scalar_tensor(value: Any, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A number as a 0-d tensor. The compiler keeps one symbolic that multiplies, and specialises on one that fills."""
    if torch.compiler.is_compiling():
        return torch.ones((), dtype=dtype, device=device) * value
    return torch.full((), value, dtype=dtype, device=device)


def refuse_forward_mode(name: str, value: torch.Tensor) -> None:
    """Raise where a tangent of ``value`` would be lost without a word."""
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(value).tangent is not None:
        raise NotImplementedError(f"{name}: forward-mode differentiation is not supported")


def refuse_functional_grad(name: str, *values: torch.Tensor) -> None:
    """Raise in place of torch's error, which speaks to whoever wrote the operator."""
    if any(map(torch._C._functorch.is_gradtrackingtensor, values)):
        raise NotImplementedError(
            f"{name}: torch.func's derivatives (grad, vjp, jacrev, ...) are not supported; use torch.autograd.grad, or "
            "backward()"
        )


def refuse_transforms(name: str, *values: torch.Tensor) -> None:
    """Both of the above."""
    for value in values:
        refuse_functional_grad(name, value)
        refuse_forward_mode(name, value)

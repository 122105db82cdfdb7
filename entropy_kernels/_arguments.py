"""What every layer does alike with the plain arguments of a call: numbers of any library, and process groups."""

from __future__ import annotations

import inspect
import math
import numbers
import operator
import os
from collections.abc import Callable, Collection, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.autograd import forward_ad

from entropy_kernels import _torch


def all_gather(output: torch.Tensor, local: torch.Tensor, group: Any) -> None:
    """``local`` of every rank, one after the other, into ``output``."""
    if hasattr(dist, "all_gather_single"):  # torch 2.13 renamed the function and warns of the old name
        dist.all_gather_single(output, local, group=group)
    else:
        dist.all_gather_into_tensor(output, local, group=group)


def process_group_of(name: Any) -> Any:
    """The process group of a name (newer torch wraps the name in a type of its own)."""
    try:
        return _torch.process_group(name)
    except (AttributeError, RuntimeError, ValueError, LookupError) as error:
        raise ValueError(
            f"group: expected the name of a process group that this process is in, or '' for none, got {name!r}"
        ) from error


Kind = TypeVar("Kind")
INT64 = 1 << 63  # ints that tensors and operators hold are below it, and not below its negative
FLOAT32_MAX = torch.finfo(torch.float32).max


def number(name: str, value: Any, dtype: torch.dtype = torch.float32) -> Any:
    """``value`` as a Python number (numpy's are numbers too; a compiler's symbolic one stays as it is).

    Raises, naming the argument: TypeError (a bool is no number), and ValueError for a finite number that overflows in
    ``dtype``, in which it will be used.
    """
    if isinstance(value, bool) or not isinstance(value, (float, int, torch.SymFloat, torch.SymInt)):
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
        value = value if isinstance(value, numbers.Rational) else float(value)
        return float(_in_range(name, value, dtype))
    value = _in_range(name, value, dtype)
    return float(value) if type(value) is int and not -INT64 <= value < INT64 else value


def _in_range(name: str, value: Any, dtype: torch.dtype) -> Any:
    most = torch.finfo(dtype).max
    if (value > most and value != math.inf) or (value < -most and value != -math.inf):
        got = f"an int of {value.bit_length()} bits" if isinstance(value, int) else value
        raise ValueError(f"{name}: expected a number within ±{most:.2g}, the range of {dtype}, got {got}")
    return value


def divisor_range(dtype: torch.dtype) -> tuple[float, float]:
    """Positive numbers whose inverse, with a small factor, is finite and no subnormal number, which is flushed to 0."""
    tiny = torch.finfo(dtype).tiny
    return tiny, 1 / (64 * tiny)


def integer(name: str, value: Any) -> Any:
    """``value`` as a Python int (or a compiler's symbolic one).

    Raises, naming the argument: TypeError for anything else, ValueError for an int that does not fit int64.
    """
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        try:
            # numpy 2.2 takes its bool for an index, as Python does
            if isinstance(value, (bool, torch.Tensor)) or str(getattr(value, "dtype", "")) == "bool":
                raise TypeError
            value = operator.index(value)
        except TypeError:
            raise TypeError(f"{name}: expected an int, got {type(value).__name__}") from None
    if not -INT64 <= value < INT64:
        raise ValueError(f"{name}: expected an int of at most 64 bits with its sign, got one of {value.bit_length()}")
    return value


def of_type(name: str, value: Any, kind: type[Kind]) -> Kind:
    """``value``; raises TypeError, naming the argument, for anything else: as a bool a word like "no" would be true."""
    if not isinstance(value, kind):
        raise TypeError(f"{name}: expected a {kind.__name__}, got {type(value).__name__}")
    return value


def word(name: str, value: Any, known: Collection[str]) -> str:
    """``value``; raises ValueError, naming the argument, for anything but a str among those ``known``."""
    if not isinstance(value, str) or value not in known:
        got = type(value).__name__ if isinstance(value, torch.Tensor) else repr(value)  # to show a tensor reads it back
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, known))}, got {got}")
    return value


class Options(dict[str, Any]):
    """What a surrogate or a method is told: ``options["clip_low"]`` or ``options.clip_low``."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"{name}: expected one of {', '.join(self)}") from None


def keywords(function: Callable[..., Any]) -> dict[str, Any]:
    """The keyword-only parameters of a function, with their defaults."""
    parameters = inspect.signature(function).parameters
    return {name: p.default for name, p in parameters.items() if p.kind is p.KEYWORD_ONLY}


def check_tensor(name: str, value: Any, also: str = "") -> None:
    """Raise TypeError, naming the argument, for anything but a dense tensor; ``also``: what else would have done.

    A subclass does if its operators are torch's; of those that have their own, a compiler's and torch's tensors of
    collectives that are still under way. ValueError where the memory of its elements is gone.
    """
    kind = type(value)
    usual = kind is torch.Tensor or kind is torch.nn.Parameter
    if not (usual and value.layout is torch.strided and not value.is_nested and not value.is_quantized):
        if not isinstance(value, torch.Tensor):
            as_tensor = isinstance(value, (list, tuple)) or hasattr(value, "__array__")
            hint = "; torch.as_tensor makes one" if as_tensor else ""
            raise TypeError(f"{name}: expected a torch.Tensor{also}, got {kind.__name__}{hint}")
        if (got := _unusual(value)) is not None:
            raise TypeError(f"{name}: expected a plain torch.Tensor{also}, got {got}")
        if has_own_operators(kind):  # its memory is elsewhere
            return
    if torch.compiler.is_compiling():
        return
    try:
        if value.untyped_storage().nbytes():
            return
    except (RuntimeError, NotImplementedError):  # a tensor of torch.func's transforms
        return
    if value.numel():
        raise ValueError(
            f"{name}: expected a tensor with its memory, got one of shape {tuple(value.shape)} whose memory was freed "
            "(a storage of 0 bytes); use it before, or fill its storage again"
        )


def check_float(name: str, value: Any) -> None:
    """The same of a floating-point tensor."""
    check_tensor(name, value)
    if not value.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point dtype, got {value.dtype}")


def has_own_operators(kind: type[torch.Tensor]) -> bool:
    return kind.__torch_dispatch__ is not torch.Tensor.__torch_dispatch__


def _unusual(value: torch.Tensor) -> str | None:
    """What kind of a tensor that has no memory of its own in rows and columns this is, and what makes it one that has.

    None: it will do.
    """
    kind = type(value)
    if is_dtensor(value):
        placements: Any = value.placements  # type: ignore[attr-defined]
        return (
            f"a DTensor placed {tuple(placements)}; pass .full_tensor(), or .to_local() where the part of this rank is "
            "meant"
        )
    if value.is_nested:
        return (
            f"a nested tensor ({value.layout}); .to_padded_tensor(0) beside a mask, or .values() beside cu_seqlens "
            "(its .offsets())"
        )
    if value.layout is not torch.strided:
        return f"a tensor of layout {value.layout}; .to_dense() is a plain one"
    if value.is_quantized:
        return f"a quantised tensor ({value.dtype}); .dequantize() is a plain one"
    if torch.compiler.is_compiling():  # which traces with tensors of its own, and knows those of others
        return None
    if torch.nn.parameter.is_lazy(value):
        return f"an {kind.__name__}, which has no values before its module is called for the first time"
    if not has_own_operators(kind) or kind.__name__ in ("AsyncCollectiveTensor", "FunctionalTensor"):
        return None
    if kind.__name__ == "FakeTensor":
        return None if traced() else "a FakeTensor outside of its FakeTensorMode, which has no values"
    return (
        f"a {kind.__module__}.{kind.__name__}, a subclass with operators of its own; make a plain tensor of it (a "
        "weight may be a module that is called)"
    )


def is_dtensor(value: Any) -> bool:
    """Without importing torch.distributed.tensor, which takes a second; by what a compiler sees of one, too."""
    return hasattr(value, "placements") and hasattr(value, "device_mesh")


def refuse_mapped(arguments: dict[str, Any]) -> None:
    """Raise where torch.vmap runs over one of ``arguments``, instead of torch's error about our autograd.Function."""
    if torch.compiler.is_compiling() or not _torch.in_transform():
        return
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor) and _torch.mapped(value):
            raise NotImplementedError(
                f"{name}: expected a tensor that torch.vmap does not map over, got one that it does; call the function "
                "for each part, or for all of it at once"
            )


def check_scalar(name: str, value: torch.Tensor, device: torch.device) -> None:
    """Raise where a 0-d tensor is of no use beside tensors on ``device``: it is to be there, or on the CPU."""
    check_tensor(name, value)
    if value.device != device and value.device.type != "cpu":
        raise ValueError(f"{name}: expected on {device} or the CPU, got {value.device}")


def check_device(name: str, value: torch.Tensor, like_name: str, like: torch.Tensor) -> None:
    """Raise ValueError where ``value`` is not on the device of the argument ``like_name``."""
    if value.device != like.device:
        raise ValueError(f"{name}: expected on the device of {like_name}, {like.device}, got {value.device}")


def check_place(name: str, value: torch.Tensor, like_name: str, like: torch.Tensor) -> None:
    """The same, and of its shape."""
    check_device(name, value, like_name, like)
    if value.shape != like.shape:
        raise ValueError(f"{name}: expected {like_name}'s shape {tuple(like.shape)}, got {tuple(value.shape)}")


def recorded(*values: Any) -> Sequence[Any]:
    """Values, the tensors among them as autograd can save them: what torch.inference_mode() has made is copied."""
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
        return values
    found = []
    for x in values:
        found.append(x.clone() if isinstance(x, torch.Tensor) and x.is_inference() else x)
    return found


def boolean(name: str, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A mask as bool, and which of its values are neither 0 nor 1; None where that is known of none.

    They are an error where values are looked at, and in compiled code of the CPU. Elsewhere they count as 1, and the
    caller sees to it that nothing comes of it (:func:`poisoned`).
    """
    value = value.detach()
    if value.dtype == torch.bool:
        return value, None
    if value.is_complex():
        raise TypeError(f"{name}: expected a bool, int or float dtype, got {value.dtype}")
    mask = value != 0
    wrong = value != mask.to(value.dtype)
    if torch.compiler.is_compiling():
        if value.device.type != "cpu":
            return mask, wrong
        _torch.assert_async(~wrong.any(), f"{name}: expected a mask of 0 and 1")
    elif not values_are_checked(value):
        return mask, wrong
    elif wrong.any():
        raise ValueError(
            f"{name}: expected a mask of 0 and 1, got {value[wrong][0].item()} ({int(wrong.sum())} such of "
            f"{value.numel()}); {name} != 0 is one"
        )
    return mask, None


def poisoned(values: torch.Tensor, *wrong: torch.Tensor | None) -> torch.Tensor:
    """NaN where a mask was wrong; see :func:`boolean`."""
    for where in wrong:
        if where is not None:
            values = values.masked_fill(where, math.nan)
    return values


def check_own_memory(name: str, value: torch.Tensor, why: str) -> None:
    """Raise ValueError where elements of ``value`` share memory, or where it cannot be told that they do not.

    It can of every view that slicing, transposing, splitting and selecting make of a tensor that owns its memory.
    """
    if not value.numel():
        return
    layout = sorted((stride, size) for size, stride in zip(value.shape, value.stride(), strict=True) if size > 1)
    reach = 0  # the largest offset along the dimensions before this one
    for i, (stride, size) in enumerate(layout):
        # Of two dimensions the first equal offsets, a·stride = b·inner, are where both are the least common multiple
        apart = stride > reach
        if not apart and i == 1 and stride:
            (inner, count), common = layout[0], math.lcm(stride, layout[0][0])
            apart = common >= inner * count or common >= stride * size
        if not apart:
            raise ValueError(
                f"{name}: expected {name if name != 'inplace_backward' else 'logits'} whose elements do not share "
                f"memory ({why}), got shape {tuple(value.shape)} with strides {value.stride()}; a .clone() has its own"
            )
        reach += stride * (size - 1)


def memory_range(value: torch.Tensor) -> tuple[int, int]:
    """Bytes of its storage from the first element of ``value``, which has some, to behind the last."""
    begin = int(value.storage_offset())
    end = begin + 1 + sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))
    return begin * value.itemsize, end * value.itemsize


def share_memory(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether both lie in one storage, and the first to the last element of one meet those of the other."""
    if torch.compiler.is_compiling():
        return False  # a compiler cannot ask where a tensor lies
    if a.untyped_storage()._cdata != b.untyped_storage()._cdata or not a.numel() or not b.numel():
        return False
    (a_begin, a_end), (b_begin, b_end) = memory_range(a), memory_range(b)
    return a_begin < b_end and b_begin < a_end


def group_name(group: Any, argument: str = "batch_group") -> str:
    """The name of a process group, "" for None."""
    if group is None:
        return ""
    name = getattr(group, "group_name", None)
    if name is None:
        raise TypeError(f"{argument}: expected a torch.distributed process group or None, got {type(group).__name__}")
    return name


def values_are_checked(tensor: torch.Tensor) -> bool:
    """Errors that need values are raised on the CPU; elsewhere with ENTROPY_KERNELS_DEBUG=1: they cost a sync.

    Where a compiler or a FakeTensorMode is at work no tensor has values.
    """
    return not traced() and (tensor.device.type == "cpu" or debugging())


def traced() -> bool:
    """Whether no tensor has values: a compiler or a FakeTensorMode is at work."""
    return torch.compiler.is_compiling() or _torch.fake_mode()


def debugging() -> bool:
    """Whether checks may cost a sync."""
    return os.environ.get("ENTROPY_KERNELS_DEBUG", "0") == "1"


def scalar_tensor(value: Any, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A number as a 0-d tensor. The compiler keeps one symbolic that multiplies, and specialises on one that fills."""
    if torch.compiler.is_compiling():
        return torch.ones((), dtype=dtype, device=device) * value
    return torch.full((), value, dtype=dtype, device=device)


def beside(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A few numbers on ``device``: those on the CPU by fills, since a copy from the host would wait for the device."""
    if values.device == device or values.device.type != "cpu":
        return values
    made = [torch.full((), x, dtype=values.dtype, device=device) for x in values.reshape(-1).tolist()]
    return made[0] if values.dim() == 0 else torch.stack(made)


def refuse_forward_mode(name: str, value: torch.Tensor) -> None:
    """Raise where a tangent of ``value`` would be lost without a word."""
    if _torch.in_forward_mode() and forward_ad.unpack_dual(value).tangent is not None:
        raise NotImplementedError(f"{name}: forward-mode differentiation is not supported")


def refuse_functional_grad(name: str, *values: torch.Tensor) -> None:
    """Raise in place of torch's error, which speaks to whoever wrote the operator."""
    if any(map(_torch.in_functional_grad, values)):
        raise NotImplementedError(
            f"{name}: torch.func's derivatives (grad, vjp, jacrev, ...) are not supported; use torch.autograd.grad, or "
            "backward()"
        )


def refuse_transforms(name: str, *values: torch.Tensor) -> None:
    """Both of the above, and where an autograd.Function of ours would be called at the level of a transform."""
    for value in values:
        refuse_functional_grad(name, value)
        refuse_forward_mode(name, value)
    if _torch.in_transform():
        raise NotImplementedError(
            f"{name}: torch.func's transforms (vmap, grad, ...) are not supported around it, whatever they act on; "
            "call it outside of them"
        )

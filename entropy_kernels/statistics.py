"""Public functions on logits: validate, call the op."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from entropy_kernels._arguments import (
    check_own_memory,
    check_tensor,
    divisor_range,
    group_name,
    integer,
    is_dtensor,
    number,
    of_type,
)
from entropy_kernels._dtensor import local_logits
from entropy_kernels._rows import ENTROPY, LOGPROB, NAMES, UNBOUNDED, RowArguments, RowOptions, bits, wanted
from entropy_kernels._torch import constant_when_compiled
from entropy_kernels.ops.token_stats import rows as statistics_rows


class LogprobEntropy(NamedTuple):
    """Log-probability of the target and entropy of the distribution, per token.

    Attributes:
        logprob: ``target``'s shape, fp32 (fp64 for fp64 logits), nats.
        entropy: the same shape, dtype and unit.

    Source:
        docs/math.md §2.
    """

    logprob: Tensor
    entropy: Tensor


class TokenStats(NamedTuple):
    """The statistics that :func:`token_stats` computes where none are named, per token.

    Attributes:
        logprob: ``target``'s shape, fp32 (fp64 for fp64 logits), nats; differentiable.
        entropy: the same shape and dtype, nats; differentiable.
        collision: the same shape and dtype: S₂ = Σ p², without unit; differentiable.
        vocab_covariance: the same shape and dtype, nats: C = Cov_{a~π}(log π(a), 1[a=y] - π(a)); without gradient.

    Source:
        docs/math.md §2.
    """

    logprob: Tensor
    entropy: Tensor
    collision: Tensor
    vocab_covariance: Tensor


def logprob_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    inplace_backward: bool = False,
    vocab_group: Any = None,
    vocab_start: int | None = None,
    vocab_size: int | None = None,
    backend: str = "auto",
) -> LogprobEntropy:
    """Log-prob of ``target`` and entropy H = -Σ p log p of softmax(logits / temperature), from one read of the logits.

    Both are differentiable with respect to ``logits``; probabilities are never materialised (docs/math.md).

    Args:
        logits: (..., V) bf16, fp16, fp32 or, on the CPU, fp64, with any strides. A DTensor that is sharded over V, or
            not at all, is taken as this rank's shard, with the group of its mesh; its gradient is such a DTensor, too.
        target: (...) int32 or int64 token ids; global ids under ``vocab_group``. Beside logits that are a DTensor it
            may be a replicated one; so may ``temperature``. Results are plain tensors.
        temperature: a number > 0, or a tensor broadcastable to ``target``'s shape; it carries no gradient. A CUDA graph
            reads one on its device anew at each replay, and keeps a number or a 0-d tensor on the CPU.
        softcap: if given, logits become ``softcap * tanh(logits / softcap)`` before the temperature; a number within
            [1.2e-38, 1e31], beyond which fp32 does not hold it or its inverse (fp64 logits: as far as fp64 does).
        ignore_index: tokens with this label give 0, have gradient 0, and their rows are not read.
        inplace_backward: write the gradient over the logits (the caller promises not to need them any more);
            a second backward pass then raises, and so does a layout whose elements share memory. Under torch.compile
            the compiler plans the memory and this is ignored.
        vocab_group: torch.distributed process group over vocabulary shards; ``logits`` is this rank's shard.
            Results are replicated; upstream gradients must be the same on all ranks. All other arguments but ``logits``
            and ``vocab_start`` are, or every rank raises the same error (on a GPU without ENTROPY_KERNELS_DEBUG=1:
            outputs are NaN). Other *numbers* of tokens make ranks wait for each other, or gloo abort; debugging
            checks them first.
        vocab_start: first global id of this rank's shard; by default all shards are as wide as this one. Shards begin
            at 0 and follow each other, in any order of the ranks, without overlap or gap.
        vocab_size: ids at or beyond it are padding and count as -inf; by default there is none.
        backend: "auto", "torch", "triton", "cpu" or "cuda"; see :func:`entropy_kernels.backends`.

    Returns:
        ``LogprobEntropy(logprob, entropy)``, each of ``target``'s shape, fp32 (fp64 for fp64 logits), in nats. They may
        be written to; they share one storage, which each keeps as a whole, as torch.save does: a .clone() has its own.
        A row with NaN or +inf, or with nothing but -inf, gives NaN; a target at -inf gives logprob -inf.
        Under a softcap infinite logits are finite, ±softcap: mask a vocabulary with ``vocab_size``, not with -inf.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or range.
        IndexError: a label out of range (CPU; on a GPU the token's outputs are NaN, and
            ENTROPY_KERNELS_DEBUG=1 makes it an error there too, at the price of a sync).
        RuntimeError: double backward; a backend that cannot run here.
        NotImplementedError: forward-mode differentiation, torch.func's derivatives.

    Source:
        docs/math.md §2.
    """
    given = RowArguments(temperature, softcap, ignore_index, vocab_group, vocab_start, vocab_size, backend)
    return LogprobEntropy(*_token_stats(logits, target, given, inplace_backward, LOGPROB | ENTROPY))


def token_stats(
    logits: Tensor,
    target: Tensor | None,
    *,
    statistics: Sequence[str] | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    inplace_backward: bool = False,
    vocab_group: Any = None,
    vocab_start: int | None = None,
    vocab_size: int | None = None,
    backend: str = "auto",
) -> TokenStats | Any:
    """:func:`logprob_entropy` and more statistics from the same read.

    Args:
        target: (...) int32 or int64 token ids, or None where no statistic that is asked for needs one.
        statistics: names of :data:`entropy_kernels.STATISTICS`, of which just these are computed; None: the four below.
        others: as in :func:`logprob_entropy`.

    Returns:
        ``TokenStats(logprob, entropy, collision, vocab_covariance)``, each of ``target``'s shape, fp32 (fp64 for fp64
        logits), the first two in nats:
        ``collision`` S₂ = Σ p² (Rényi-2 entropy is -log S₂), differentiable;
        ``vocab_covariance`` C = Cov_{a~π}(log π(a), 1[a=y] - π(a)), without gradient: the first-order entropy change of
        the policy-gradient step on this token is -(η g / T²)·C
        (Theorem 1 of arXiv 2505.22617 for the sampled step; :func:`entropy_kernels.predicted_entropy_change`).
        With ``statistics`` a namedtuple of them, in the order asked for, each of ``logits``' shape without V. Beside
        the four: ``p_max``, the largest probability, and ``mean_logit`` Σ p z, of the logits z after the softcap and
        before the temperature; both without gradient.

    Raises:
        ValueError: of ``statistics``, a name that is unknown or there twice, or none.
        TypeError: a target that is missing.
        TypeError, ValueError, IndexError, RuntimeError, NotImplementedError: as in :func:`logprob_entropy`.

    Source:
        docs/math.md §2.
    """
    given = RowArguments(temperature, softcap, ignore_index, vocab_group, vocab_start, vocab_size, backend)
    record, want = asked_for(statistics)
    return in_order(record, _token_stats(logits, target, given, inplace_backward, want), want)


def entropy(
    logits: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    inplace_backward: bool = False,
    vocab_group: Any = None,
    vocab_start: int | None = None,
    vocab_size: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """Entropy H = -Σ p log p of softmax(logits / temperature) in nats, differentiable, without labels.

    Args:
        others: as in :func:`logprob_entropy`.

    Returns:
        (...) for logits (..., V), fp32 (fp64 for fp64 logits), in nats.

    Raises:
        TypeError, ValueError, RuntimeError, NotImplementedError: as in :func:`logprob_entropy`.

    Source:
        docs/math.md §2.
    """
    given = RowArguments(
        temperature, softcap, vocab_group=vocab_group, vocab_start=vocab_start, vocab_size=vocab_size, backend=backend
    )
    return _token_stats(logits, None, given, inplace_backward, ENTROPY)[0]


def asked_for(statistics: Sequence[str] | None) -> tuple[Any, int]:
    """The namedtuple of some statistics, and their bitmask."""
    if statistics is None:
        return TokenStats, _FOUR
    if isinstance(statistics, str) or not isinstance(statistics, Sequence):
        raise TypeError(f"statistics: expected None or a sequence of names, got {type(statistics).__name__}")
    names = tuple(statistics)
    for i, name in enumerate(names):
        if name not in NAMES:
            raise ValueError(f"statistics: expected names of {', '.join(NAMES)}, got {name!r}")
        if name in names[:i]:
            raise ValueError(f"statistics: expected each name once, got {name!r} twice")
    if not names:
        raise ValueError(f"statistics: expected None or at least one of {', '.join(NAMES)}, got none")
    return getattr(_Records, _made(names)), bits(*names)


class _Records:
    """The namedtuples of the calls so far, as attributes: a compiler guards the one that it reads, not all."""


@constant_when_compiled
def _made(names: tuple[str, ...]) -> str:
    """The attribute in which their namedtuple is."""
    attribute = "_and_".join(names)
    if not hasattr(_Records, attribute):
        record = namedtuple("Statistics", names)  # type: ignore[misc]
        record.__reduce__ = _pickled  # type: ignore[method-assign,assignment]
        setattr(_Records, attribute, record)
    return attribute


def _pickled(statistics: Any) -> tuple[Any, ...]:
    """Made again where it is read: no module has the class under its name."""
    return _restored, (statistics._fields, tuple(statistics))


def _restored(names: tuple[str, ...], values: tuple[Tensor, ...]) -> Any:
    return asked_for(names)[0](*values)


_FOUR = bits(*TokenStats._fields)


def in_order(record: Any, rows: Sequence[Tensor], want: int) -> Any:
    """Rows that are in the order of the table as a ``record`` of them."""
    found = {x.name: row for x, row in zip(wanted(want), rows, strict=True)}
    return record(*[found[name] for name in record._fields])


def _token_stats(
    logits: Tensor, target: Tensor | None, given: RowArguments, inplace_backward: bool, want: int
) -> Sequence[Tensor]:
    if type(logits) is not Tensor and is_dtensor(logits):
        logits, target, given = local_logits(logits, target, given)
    target, given = labels("logits", logits, target, given, want)
    validate_rows("logits", logits, target)
    validate_options(inplace_backward, given)
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    options, group = row_options("logits", logits.shape[-1], dtype, given)
    if inplace_backward:
        check_own_memory("inplace_backward", logits, "the gradient is written over them")
        inplace_backward = not torch.compiler.is_compiling()
    temperature = temperature_tensor("logits", given.temperature, target, dtype, number_on_cpu=True)
    return statistics_rows(
        target.shape, _as_3d(logits), target.reshape(-1).contiguous(), temperature, *options, want, inplace_backward,
        group, given.backend,
    )  # fmt: skip


def labels(name: str, rows: Any, target: Tensor | None, given: RowArguments, want: int) -> tuple[Tensor, RowArguments]:
    """The target; where there is none and none is needed, one that changes nothing."""
    if target is not None:
        return target, given
    needing = [statistic.name for statistic in wanted(want) if statistic.needs_target]
    if needing:
        need = f"{' and '.join(needing)} {'need' if len(needing) > 1 else 'needs'}"
        raise TypeError(
            f"target: expected a tensor of labels, which {need}, got None; entropy() and token_stats(statistics=...) "
            "compute what needs none"
        )
    check_tensor(name, rows)
    integer("ignore_index", given.ignore_index)
    return rows.new_zeros(rows.shape[:-1], dtype=torch.int64), given._replace(ignore_index=-100)


_FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_INTS = (torch.int32, torch.int64)


def validate_rows(name: str, rows: Any, target: Any) -> None:
    """``rows`` (..., any) are floating-point vectors, one for each label of ``target`` (...), on one device."""
    for argument, value in ((name, rows), ("target", target)):
        check_tensor(argument, value)
    if rows.dtype not in _FLOATS:
        raise TypeError(f"{name}: expected dtype bfloat16, float16, float32 or float64, got {rows.dtype}")
    if target.dtype not in _INTS:
        raise TypeError(f"target: expected dtype int32 or int64, got {target.dtype}")
    if rows.dim() < 1:
        raise ValueError(f"{name}: expected at least one dimension, got a tensor of shape ()")
    if rows.shape[:-1] != target.shape:
        raise ValueError(
            f"target: expected the shape of {name} without its last dimension, {tuple(rows.shape[:-1])} "
            f"for {name} of shape {tuple(rows.shape)}, got {tuple(target.shape)}"
        )
    if rows.device != target.device:
        raise ValueError(f"target: expected on the device of {name}, {rows.device}, got {target.device}")


def validate_options(inplace_backward: Any, given: RowArguments) -> None:
    of_type("inplace_backward", inplace_backward, bool)
    group_name(given.vocab_group, "vocab_group")
    of_type("backend", given.backend, str)
    integer("ignore_index", given.ignore_index)


def row_options(name: str, width: int, dtype: torch.dtype, given: RowArguments) -> tuple[RowOptions, str]:
    """What the kernels get, computing in ``dtype``, and the name of the group; ``width``: of the argument ``name``."""
    start, size, group = _vocabulary(name, width, given)
    return RowOptions(_softcap(given.softcap, dtype), integer("ignore_index", given.ignore_index), start, size), group


def temperature_tensor(
    name: str, temperature: float | Tensor, target: Tensor, dtype: torch.dtype, number_on_cpu: bool = False
) -> Tensor:
    """A (1,) or (N,) tensor for the rows of the argument ``name``: a Python number would recompile for every value.

    ``number_on_cpu``: numbers, and 0-d tensors on the CPU, are 0-d there, except for a compiler.
    """
    if not isinstance(temperature, Tensor):
        value = number("temperature", temperature, torch.float64)
        if torch.compiler.is_compiling():
            # The compiler keeps a number symbolic that multiplies a tensor, and specialises on one that fills it
            return torch.ones((1,), dtype=dtype, device=target.device) * value
        least, most = divisor_range(dtype)
        if not least <= value <= most:
            raise ValueError(f"temperature: expected a number > 0 within [{least:.2g}, {most:.2g}], got {value}")
        if number_on_cpu:
            return torch.full((), value, dtype=dtype, device="cpu")
        return torch.full((1,), value, dtype=dtype, device=target.device)
    check_tensor("temperature", temperature)
    if temperature.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "temperature: expected a tensor without grad (no gradient flows to it), got requires_grad=True"
        )
    if not temperature.is_floating_point() and temperature.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"temperature: expected a floating-point tensor, got {temperature.dtype}")
    if temperature.device != target.device and (temperature.dim() > 0 or temperature.is_meta):
        raise ValueError(f"temperature: expected on the device of {name}, {target.device}, got {temperature.device}")
    if number_on_cpu and temperature.dim() == 0 and temperature.is_cpu and not torch.compiler.is_compiling():
        return temperature.to(dtype, copy=not target.is_cpu)  # as a copy to the GPU, which would hold it, too
    if temperature.numel() == 1:
        return temperature.to(device=target.device, dtype=dtype, non_blocking=True).reshape(1)
    try:
        expanded = temperature.expand(target.shape)
    except RuntimeError:
        raise ValueError(
            f"temperature: expected a shape broadcastable to {tuple(target.shape)}, that of {name} without its last "
            f"dimension, got {tuple(temperature.shape)}"
        ) from None
    return expanded.to(dtype).reshape(-1).contiguous()


def _softcap(softcap: float | None, dtype: torch.dtype) -> float:
    """For kernels that compute in ``dtype``; 0 for None."""
    if softcap is None:
        return 0.0
    softcap = number("softcap", softcap, torch.float64)
    # At either end it is finite, and its inverse: logits divided by it are no subnormal numbers, which are flushed to 0
    finfo = torch.finfo(dtype)
    least, most = finfo.tiny, finfo.eps / finfo.tiny
    if not least <= softcap <= most:
        raise ValueError(
            f"softcap: expected a finite number > 0 within [{least:.2g}, {most:.2g}] or None, got {softcap}"
        )
    return float(softcap)


def _vocabulary(name: str, width: int, given: RowArguments) -> tuple[int, int, str]:
    """(first global id of this shard, number of ids that exist, name of the group or "")."""
    group = given.vocab_group
    start = None if given.vocab_start is None else integer("vocab_start", given.vocab_start)
    size = None if given.vocab_size is None else integer("vocab_size", given.vocab_size)
    if size is not None and not 1 <= size <= UNBOUNDED:
        raise ValueError(f"vocab_size: expected >= 1 and <= {UNBOUNDED}, got {size}")
    if group is None:
        if not width:
            raise ValueError(f"{name}: expected a vocabulary of at least one id, got one of 0")
        if start:
            raise ValueError(f"vocab_start: expected None without a vocab_group, got {start}")
        if size is not None and size > width:
            raise ValueError(f"vocab_size: expected <= {width}, the width of {name}, got {size}")
        return 0, width if size is None else size, ""
    if start is not None:
        if not 0 <= start <= UNBOUNDED:
            raise ValueError(f"vocab_start: expected >= 0 and <= {UNBOUNDED}, got {start}")
        return start, UNBOUNDED if size is None else size, group.group_name
    return width * group.rank(), width * group.size() if size is None else size, group.group_name


def _as_3d(logits: Tensor) -> Tensor:
    """(B, L, V) view of logits; more batch dimensions are flattened (a copy only where strides forbid a view)."""
    if logits.dim() == 3:
        return logits
    if logits.dim() < 3:
        return logits.reshape((1, -1, logits.shape[-1])) if logits.dim() == 1 else logits.unsqueeze(0)
    return logits.flatten(0, -3)

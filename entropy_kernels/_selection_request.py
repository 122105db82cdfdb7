"""A selection's arguments: checked, and brought to the form that its op takes.

Read in this order: ``request`` (the numbers of a selection, as a record that is called with its tokens), ``tokens_of``
(the tensors of its tokens), ``per_token`` and the checks below it (one tensor each).
"""

from __future__ import annotations

import ctypes
import math
import operator
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from entropy_kernels._arguments import (
    boolean,
    check_device,
    check_float,
    check_place,
    check_scalar,
    check_tensor,
    debugging,
    group_name,
    integer,
    number,
    of_type,
    scalar_tensor,
    word,
)
from entropy_kernels.backends.radix_select import ALL_TOKENS, Band, Count
from entropy_kernels.ops import selection as op

_SAFE = 1e30  # bounds between whose negative and itself fp32 holds, if they are not next to each other
_CPU = torch.device("cpu")
BANDS = ("absolute", "quantile")
_Number = float | Tensor | None
_Tokens = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]


class SeedCounter(torch.nn.Module):
    """Seeds where nobody counts the steps, as ``seed=`` of :func:`clip_cov_mask`, :func:`clip_cov_loss` and their kin.

    The first call draws with ``seed``, the next one with ``seed + 1``, and so on. How many there were is saved with the
    module's state, so that a run that is resumed goes on as it would have. Ranks that share a batch make equal calls,
    and so have equal seeds. A call that is computed again, as inside of a checkpoint, counts and draws again: give such
    a call a seed, or a mask.

    Args:
        seed: int of at most 62 bits.

    Attributes:
        calls: 0-d int64, a buffer: how many seeds were given out.

    Raises:
        TypeError, ValueError: another seed.

    Source:
        docs/math.md §3.
    """

    if TYPE_CHECKING:  # nn.Module says Any
        __call__: Callable[..., Tensor]

    calls: Tensor

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.seed = integer("seed", seed)
        if abs(self.seed) >= 1 << 62:
            raise ValueError(f"seed: expected an int of at most 62 bits, got {seed}")
        with torch.inference_mode(False):  # a tensor that can be counted up outside of it, too
            self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self) -> Tensor:
        """Count a call. Raises nothing.

        Returns:
            The next seed, 0-d int64 on the module's device, without unit.
        """
        seed = self.calls + self.seed
        self.calls += 1
        return seed

    def extra_repr(self) -> str:
        """The first seed."""
        return f"seed={self.seed}"


IN_COMMON = ("band", "closed", "at_least_one", "ratio", "k", "low", "high")  # what ranks must have alike


class Request(NamedTuple):
    """A selection, checked: everything but the tokens."""

    seed: Tensor | None  # None: the largest scores; else drawn from the range
    size: Count
    band: Band | None
    group: str
    backend: str

    def __call__(
        self, score: Tensor, mask: Tensor | None, exclude: Tensor | None, token_index: Tensor | None
    ) -> Tensor:
        """The selected tokens, bool; ``score`` floating point, the others bool or int64, all of its shape."""
        size, band = self.size, self.band  # unpacked here: an op takes no records
        amount = (size.numbers, size.ratio, size.k, size.at_least_one)
        if band is None:
            return op.kl_cov_mask(score, mask, exclude, token_index, *amount, self.group, self.backend)
        return op.clip_cov_mask(
            score, mask, exclude, token_index, self.seed, *amount, *band[:4], self.group, self.backend
        )

    def in_common(self) -> dict[str, Any]:
        """What ``IN_COMMON`` names; the seed apart, which is a tensor."""
        size, band = self.size, self.band
        bounds = (None, None) if band is None else (band.low, band.high)
        found: Any = [size.ratio, size.k, *bounds]
        if size.numbers is not None:
            told: list[Any] = list(size.numbers.unbind())
            if size.numbers.device.type == "cpu":
                told = [None if x != x else x for x in size.numbers.tolist()]
            found[: len(told)] = told
        flags = (*((False, False) if band is None else (band.quantile, band.closed)), size.at_least_one)
        return dict(zip(IN_COMMON, (*map(str, flags), *found), strict=True))

    def candidates(self, score: Tensor, mask: Tensor | None, exclude: Tensor | None) -> Tensor:
        """The tokens that are drawn from, bool; of a selection with a seed."""
        band = self.band
        assert band is not None
        numbers = band.numbers
        if band.quantile:  # the bounds are order statistics: the selection finds them
            if numbers is None:
                return self._replace(size=self.size._replace(ratio=None, k=ALL_TOKENS))(score, mask, exclude, None)
            everything = torch.stack([numbers.new_full((), x) for x in (math.nan, ALL_TOKENS)])
            numbers = torch.cat([everything, numbers[2:]])
            size, band = self.size._replace(numbers=numbers), band._replace(numbers=numbers)
            return self._replace(size=size, band=band)(score, mask, exclude, None)
        low, high = (band.low, band.high) if numbers is None else numbers[2:].float().unbind()
        inside = (score >= low) & (score <= high) if band.closed else (score > low) & (score < high)
        inside = inside if mask is None else inside & mask
        return inside if exclude is None else inside > exclude


def request(
    device: torch.device,
    *,
    ratio: Any,
    k: Any,
    default: float | None,
    at_least_one: bool,
    group: Any,
    backend: str,
    seed: Any = None,
    low: Any = 0.0,
    high: Any = 1.0,
    band: str = "absolute",
    closed: bool = False,
) -> Request:
    """The record of a selection; arguments, errors: :func:`random_tokens`. ``default``: the ratio without both."""
    if k is not None or type(ratio) is not float or not 0 < ratio <= 1:
        ratio, k = _checked_count(ratio, k, default)
    word("band", band, BANDS)
    plain = type(low) is float and type(high) is float and band == "absolute"
    if not plain or not -_SAFE < low < high < _SAFE or high - low < 1e-6 * (abs(low) + abs(high)):
        low, high = _checked_bounds(low, high, band)
    given = (ratio, k) if seed is None else (ratio, k, low, high)
    numbers = None
    # A compiler takes plain numbers for constants
    tensors = isinstance(ratio, Tensor) or isinstance(k, Tensor) or isinstance(low, Tensor) or isinstance(high, Tensor)
    if tensors or torch.compiler.is_compiling():
        for name, value in zip(("ratio", "k", "low", "high"), given, strict=False):
            if isinstance(value, Tensor):
                check_scalar(name, value, device)
        numbers = _in_memory([math.nan if value is None else value for value in given], device)
        ratio, k, low, high = None, None, 0.0, 0.0
    if not torch.compiler.is_compiling() and type(seed) is int and 0 <= seed < 1 << 63:
        seed = torch.full((), seed, dtype=torch.int64, device=_CPU)
    elif seed is not None:
        seed = seed_tensor(seed, device)
    of_type("backend", backend, str)
    size = Count(ratio, k, of_type("at_least_one", at_least_one, bool), numbers)
    bounds = None if seed is None else Band(low, high, band == "quantile", of_type("closed", closed, bool), numbers)
    return Request(seed, size, bounds, "" if group is None else group_name(group), backend)


def budget_numbers(device: torch.device, **given: Any) -> Tensor:
    """(3,) float64 of ``budget``, ``limit`` and ``share``, of which one is given, the others NaN."""
    named = [name for name, value in given.items() if value is not None]
    if len(named) != 1:
        raise ValueError(f"budget, limit, share: expected one of them, got {' and '.join(named) or 'none'}")
    name, value = named[0], given[named[0]]
    known = number(name, _known(name, value, 1.0), torch.float64)
    if name == "share" and not 0 < known <= 1:
        raise ValueError(f"share: expected a fraction in (0, 1], got {known}")
    if isinstance(value, Tensor):
        check_scalar(name, value, device)
    return _in_memory([math.nan if x is None else x for x in given.values()], device)


def _in_memory(given: Sequence[float | Tensor], device: torch.device) -> Tensor:
    """float64; on the CPU, where operators read them too, unless one is on the device or a compiler is at work."""
    here = torch.compiler.is_compiling() or any(isinstance(x, Tensor) and not x.is_cpu for x in given)
    return torch.stack([_in_float64(x, device if here else _CPU) for x in given])


def _in_float64(value: float | Tensor, device: torch.device) -> Tensor:
    if isinstance(value, Tensor):
        return value.detach().to(device=device, dtype=torch.float64, non_blocking=True)
    return scalar_tensor(value, torch.float64, device)


def seed_tensor(seed: Any, device: torch.device) -> Tensor:
    """A 0-d tensor: a Python int below the op would recompile for every value. A module (SeedCounter) is asked.

    On the CPU, from where an operator reads it without a launch, or ``device``, and there for a compiler.
    """
    if isinstance(seed, SeedCounter):
        seed = seed()
    if isinstance(seed, Tensor):
        check_tensor("seed", seed)
        if seed.dtype != torch.int64 or seed.dim() != 0:
            raise TypeError(
                f"seed: expected an int or a 0-d int64 tensor, got {seed.dtype} of shape {tuple(seed.shape)}"
            )
        check_scalar("seed", seed, device)
        return seed.to(device, non_blocking=True) if torch.compiler.is_compiling() else seed
    if isinstance(seed, bool):
        raise TypeError("seed: expected an int or a 0-d int64 tensor, got bool")
    if torch.compiler.is_compiling() and isinstance(seed, (int, torch.SymInt)) and -(1 << 63) <= seed < 1 << 63:
        return scalar_tensor(seed, torch.int64, device)
    try:
        value = operator.index(seed)
    except TypeError:
        raise TypeError(f"seed: expected an int or a 0-d int64 tensor, got {type(seed).__name__}") from None
    if not -(1 << 63) <= value < 1 << 64:
        raise ValueError(f"seed: expected at most 64 bits, got {value}")
    if value >= 1 << 63:
        value -= 1 << 64  # the same 64 bits
    return scalar_tensor(value, torch.int64, _CPU)


def _known(name: str, value: Any, unknown: float) -> Any:
    """A number as it is; of a 0-d tensor ``unknown``, a value that is right, but when debugging its own."""
    if not isinstance(value, Tensor):
        return value
    check_tensor(name, value)
    if value.dim() != 0:
        raise ValueError(f"{name}: expected a number or a 0-d tensor, got shape {tuple(value.shape)}")
    if value.is_complex() or value.dtype == torch.bool:
        raise TypeError(f"{name}: expected a float or int dtype, got {value.dtype}")
    if torch.compiler.is_compiling() or not debugging():
        return unknown
    return value.to(torch.int64 if isinstance(unknown, int) else torch.float64).item()


def _checked_count(ratio: Any, k: Any, default: float | None) -> tuple[_Number, _Number]:
    """Ratio and k, of which one is None, in Python's types or as they are if tensors."""
    if k is not None:
        if ratio is not None:
            raise ValueError("ratio, k: expected one of them, got both")  # unnamed: a tensor is not read back
        count = integer("k", _known("k", k, 0))
        if count < 0:
            raise ValueError(f"k: expected >= 0, got {count}")
        return None, k if isinstance(k, Tensor) else count
    if ratio is None:
        if default is None:
            raise ValueError("ratio, k: expected one of them, got neither")
        return default, None
    share = _known("ratio", ratio, 1.0)
    if type(share) is not int:  # of which some are too large to be a float
        share = number("ratio", share)
    if not 0 < share <= 1:
        got = share if type(share) is not int or abs(share) < 1 << 63 else f"an int of {share.bit_length()} bits"
        raise ValueError(f"ratio: expected a fraction in (0, 1], got {got}")
    return ratio if isinstance(ratio, Tensor) else float(share), None


def _checked_bounds(low: Any, high: Any, band: str) -> tuple[float | Tensor, float | Tensor]:
    """The same of the bounds of a range."""
    least, most = (0.0, 1.0) if band == "quantile" else (-math.inf, math.inf)
    least = number("low", _known("low", low, least), torch.float64)
    most = number("high", _known("high", high, most), torch.float64)
    for name, value in (("low", least), ("high", most)):
        if band == "quantile" and not 0 <= value <= 1:
            raise ValueError(f"{name}: expected a share in [0, 1] with band='quantile', got {value}")
    if not least < most or (band == "absolute" and not _in_float32(least) < _in_float32(most)):
        equal = ", which are equal in fp32" if least < most else ""
        raise ValueError(f"low: expected < high, got low={least}, high={most}{equal}")
    return low if isinstance(low, Tensor) else float(least), high if isinstance(high, Tensor) else float(most)


def _in_float32(value: float) -> float:
    """Rounded to it; a compiler's symbolic number stays as it is."""
    return value if torch.compiler.is_compiling() else ctypes.c_float(value).value


def tokens_of(name: str, score: Any, mask: Any, exclude: Any, token_index: Any) -> _Tokens:
    check_float(name, score)
    mask, wrong = boolean_of("mask", mask, name, score)
    exclude, strange = boolean_of("exclude", exclude, name, score)
    if mask is not None and wrong is not None:
        mask = mask & ~wrong.any()
    if exclude is not None and strange is not None:
        exclude = exclude | strange.any()
    return score.detach(), mask, exclude, check_token_index(token_index, name, score)


def per_token(name: str, value: Any, logprob: Tensor) -> Tensor:
    """``value`` in ``logprob``'s shape (B, L), detached: as given; (B,) or (B, 1) one per sequence; 0-d one for all."""
    check_tensor(name, value)
    if value.is_complex() or value.dtype == torch.bool:
        raise TypeError(f"{name}: expected a floating-point dtype, got {value.dtype}")
    value = value.detach()
    if not value.is_floating_point():
        value = value.to(torch.float64)
    # One per sequence, never one per position: of a square batch (B,) could be read both ways
    if value.dim() > 0 and value.shape != logprob.shape and value.shape == logprob.shape[:-1]:
        value = value.unsqueeze(-1)
    return broadcast(name, value, "logprob", logprob, f", one per sequence {tuple(logprob.shape[:-1])}")


def broadcast(name: str, value: Tensor, like_name: str, like: Tensor, also: str = "") -> Tensor:
    """``value`` in ``like``'s shape: equal, or of size 1 in some dimensions, or 0-d."""
    check_device(name, value, like_name, like)
    if value.shape == like.shape:
        return value
    # Fewer dimensions are refused: (B,) would silently run along the tokens of a (B, B) batch.
    fits = value.dim() == 0 or (
        value.dim() == like.dim() and all(a in (1, b) for a, b in zip(value.shape, like.shape, strict=True))
    )
    if not fits:
        raise ValueError(
            f"{name}: expected {like_name}'s shape {tuple(like.shape)}{also}, or size 1 where one value serves all, "
            f"got {tuple(value.shape)}"
        )
    return value.expand(like.shape)


def boolean_of(name: str, value: Any, like_name: str, like: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """A mask in ``like``'s shape, and where it is wrong: :func:`entropy_kernels._arguments.boolean`."""
    if value is None:
        return None, None
    check_tensor(name, value, " or None")
    mask, wrong = boolean(name, value)
    return broadcast(name, mask, like_name, like), None if wrong is None else broadcast(name, wrong, like_name, like)


def check_token_index(value: Any, like_name: str, like: Tensor) -> Tensor | None:
    if value is None:
        return None
    check_tensor("token_index", value, " or None")
    if value.dtype != torch.int64:
        raise TypeError(f"token_index: expected dtype torch.int64, got {value.dtype}")
    check_place("token_index", value, like_name, like)
    return value

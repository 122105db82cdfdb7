"""``entropy-kernels tune``: which way of cutting its work is fastest for each Triton kernel, for some shapes, here.

Each candidate of :mod:`.backends.triton.tiling` is timed on tensors made here. The fastest of each class of shapes is
kept in the user's cache folder, where calls with ENTROPY_KERNELS_TRITON_TUNE=1 find it
(:mod:`.backends.triton.tuning`).
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from entropy_kernels._console import print_table
from entropy_kernels._rows import ENTROPY, LOGPROB, SECOND_ORDER, RowOptions, state_rows
from entropy_kernels.backends import registry, verdict

if TYPE_CHECKING:
    from entropy_kernels.backends.triton.tuning import ShapeClass

_MARGIN = 0.98  # a candidate must beat the default by 2 %, so that noise does not move the choice
_SOFTCAP = 30.0  # any: the kernels differ by whether there is one
_PARTS_BYTES = 256 << 20  # for the states of parts of the vocabulary in the linear kernel, as in a call with tiles


class Case(NamedTuple):
    """Calls to tune for; ``hidden``: width of the hidden states, or 0 for calls on logits."""

    dtype: torch.dtype
    vocab: int
    rows: int
    hidden: int
    second_order: bool
    softcap: bool


def fastest(candidates: Sequence[Any], milliseconds: Sequence[float | None]) -> Any:
    """Of the candidates, the default first, with None for the time of one that did not run; None if none did."""
    ran = [(time, i) for i, time in enumerate(milliseconds) if time is not None]
    if not ran:
        return None
    best, i = min(ran)
    return candidates[0 if milliseconds[0] is not None and best > _MARGIN * milliseconds[0] else i]


def median_milliseconds(run: Callable[[], object]) -> float:
    """With a flushed L2 before each run."""
    from triton.testing import do_bench

    return do_bench(run, warmup=10, rep=40, return_mode="median")


timer = median_milliseconds


def measure(case: Case, device: torch.device) -> list[tuple[ShapeClass, Sequence[Any], list[float | None]]]:
    """(class of shapes, candidates, milliseconds of each) of the kernels of a case.

    Raises:
        torch.OutOfMemoryError: its tensors do not fit.
    """
    return [
        (shape, candidates, [_time(functools.partial(run, candidate)) for candidate in candidates])
        for shape, candidates, run in _kernels(case, device)
    ]


def _time(run: Callable[[], object]) -> float | None:
    try:
        return timer(run)
    except Exception as error:  # does not compile, or needs more than this GPU has: whatever Triton's compilers raise
        print(f"{type(error).__name__}: {str(error).partition(chr(10))[0]:.200}", file=sys.stderr, flush=True)
        return None


def _kernels(case: Case, device: torch.device) -> Iterator[tuple[ShapeClass, Any, Callable[[Any], object]]]:
    """(class of shapes, candidates, what runs one of them) for each kernel, on tensors of its own."""
    from entropy_kernels.backends.triton import linear_token_stats as linear
    from entropy_kernels.backends.triton import token_stats

    options = RowOptions(_SOFTCAP if case.softcap else 0.0, -100, 0, case.vocab)
    want = LOGPROB | ENTROPY | (SECOND_ORDER if case.second_order else 0)
    normal = functools.partial(torch.randn, dtype=case.dtype, device=device)
    target = torch.zeros(case.rows, dtype=torch.int64, device=device)
    one = torch.ones(1, device=device)
    if case.hidden:
        head = normal(case.rows, case.hidden), normal(case.vocab, case.hidden)
        yield (
            *linear.choices(*head, options, want),
            lambda cut: linear.forward(cut, *head, None, target, one, options, want, case.dtype, _PARTS_BYTES),
        )
        return
    logits = normal(1, case.rows, case.vocab)
    yield (
        *token_stats.forward_choices(logits, options, want),
        lambda cut: token_stats.forward(cut, logits, target, one, options, want),
    )
    dlogits = torch.empty_like(logits)
    ones = one.new_ones((max(state_rows(want), want.bit_count()), case.rows))  # for gradients and state
    yield (
        *token_stats.backward_choices(logits, dlogits, options, want),
        lambda cut: token_stats.backward(cut, ones, logits, dlogits, target, one, ones, options, want),
    )


def main(cases: Sequence[Case]) -> int:
    """The command: tune each model of GPU that is here; 0, or 1 if something could not be measured.

    Raises:
        ValueError: no GPU, no Triton, or a size below 1.
        OSError: the cache folder cannot be written.
    """
    for case in cases:
        if min(case.vocab, case.rows) < 1 or case.hidden < 0:
            raise ValueError(f"expected --vocab, --rows and --hidden of 1 or more, got {case}")
    gpus = registry.gpus()
    if not gpus:
        raise ValueError("expected a GPU, on which the kernels are timed, got none that torch can use")
    if (reason := registry.unavailable("token_stats", "triton", gpus[0])) is not None:
        raise ValueError(f"expected Triton kernels to tune, got none: {reason}")
    complete = [_tune(device, cases) for device in gpus]
    return 0 if all(complete) else 1


def _tune(device: torch.device, cases: Sequence[Case]) -> bool:
    """Measure the cases on a GPU, keep what is fastest and print it; whether all could be measured."""
    from entropy_kernels.backends.triton import tuning

    rows = []
    found: dict[str, Any] = {}
    for i, case in enumerate(cases):
        print(f"[{i + 1}/{len(cases)}] {case}", file=sys.stderr, flush=True)
        try:
            measured = measure(case, device)
        except torch.OutOfMemoryError:
            rows.append((str(case), "", "more than the free memory: fewer --rows need less"))
            continue
        for shape, candidates, times in measured:
            best = fastest(candidates, times)
            told = "none ran" if best is None else ", ".join(f"{k}={v}" for k, v in asdict(best).items())
            default = " (the default)" if best == candidates[0] else ""
            rows.append((shape.name, " ".join("-" if x is None else f"{x:.3f}" for x in times), told + default))
            if best is not None:
                found[shape.name] = best
    path = tuning.file(device)
    tuning.write(path, found)
    title = verdict.machine(device).gpu
    print_table(title, rows, ("class of shapes", "milliseconds, the default's first", "fastest"))
    print(f"kept in {path}; calls take them with ENTROPY_KERNELS_TRITON_TUNE=1")
    return len(found) == len({name for name, *_ in rows})

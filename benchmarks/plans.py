"""What a run measures, in which order: plans of sizes, and the groups of cases that they become."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from benchmarks.registry import LINEAR, LINEAR_LOSSES, LOSSES, SHAPE_OF
from benchmarks.shapes import (
    DISTRIBUTIONS,
    HEADLINE,
    TINY_LOGITS,
    TINY_TOKENS,
    BatchShape,
    Case,
    HiddenShape,
    LogitsShape,
    Shape,
    TokensShape,
)
from entropy_kernels.backends.registry import BACKENDS


@dataclass(frozen=True)
class Plan:
    """Shapes of a run, and how often each is timed.

    ``by_value``: a group per shape, dtype and pass, the most telling first (the grid, which a deadline may cut off);
    else all dtypes of a shape share a group, so that ratios between them can be judged.
    """

    logits: tuple[LogitsShape, ...]
    tokens: tuple[TokensShape, ...]
    batches: tuple[BatchShape, ...]
    repeats: int
    by_value: bool = False
    hidden: tuple[HiddenShape, ...] = ()


# Sizes at which the CPU bars are stated: 311 MB of fp32 logits, ten times any cache of the machines in question, and
# 4 Mi tokens, a large batch over all ranks.
BARS = Plan(
    logits=(LogitsShape(512, 151936),),
    tokens=tuple(TokensShape(1 << 22, distribution) for distribution in DISTRIBUTIONS),
    batches=(BatchShape(512, 128),),
    repeats=7,
    hidden=(HiddenShape(1024, 576, 49152),),
)
# What else a CPU can afford from hidden states, in its grid: the head of Llama 2, and few tokens over Qwen's vocabulary
CPU_HIDDEN = (*BARS.hidden, HiddenShape(256, 2048, 32000), HiddenShape(128, 1024, 151936))
# 39 MB of fp32 logits: still more than the caches
QUICK = Plan(
    logits=(LogitsShape(64, 151936),),
    tokens=tuple(TokensShape(1 << 19, distribution) for distribution in DISTRIBUTIONS),
    batches=(BatchShape(64, 128),),
    repeats=7,
)
# Vocabularies of Llama 2, Llama 3, Qwen, Gemma and Gemma 3; rows from one decoding step to a whole micro-batch. In the
# order of what they tell: bars are stated at 8192 rows, few rows are another regime, 1024 and 32768 are like 8192.
GRID_VOCAB = (128256, 151936, 32000, 256000, 262144)
GRID_ROWS = (8192, 64, 32768, 1024)
HIDDEN_VOCAB = (128256, 151936, 32000, 256000)
GRID = Plan(
    logits=tuple(LogitsShape(rows, vocab) for rows in GRID_ROWS for vocab in GRID_VOCAB),
    tokens=tuple(TokensShape(tokens) for tokens in (1 << 16, 1 << 22))
    + tuple(TokensShape(1 << 22, distribution) for distribution in DISTRIBUTIONS[1:]),
    batches=(BatchShape(512, 128), BatchShape(4096, 1024)),
    repeats=20,
    by_value=True,
    hidden=tuple(HiddenShape(8192, features, vocab) for features in (4096, 2048) for vocab in HIDDEN_VOCAB),
)
GRID_QUICK = Plan(
    logits=(HEADLINE, LogitsShape(64, 128256)),
    tokens=GRID.tokens[:2],
    batches=GRID.batches[:1],
    repeats=20,
    by_value=True,
    hidden=GRID.hidden[:1],
)
# What compiles for every shape anew, for seconds: a grid has it at one of them first, and at the others in the end.
SLOW_TO_PREPARE = frozenset({"compile", "cut-ce-compile", "liger-grpo", "liger-logprob"})
# Host times are of the host, not of kernels: in a grid ours and the plainest will do
_HOST_NAMES = frozenset({"eager", *(f"ours-{backend}" for backend in BACKENDS)})


@dataclass(frozen=True)
class Group:
    """Cases that are timed together, in the same rounds, because ratios between them are judged.

    ``cold``: on a CPU also with cold caches where the run asks for both; products of seconds do not feel them.
    """

    title: str
    entries: tuple[tuple[str, Case], ...]  # (op, case)
    host: bool = False  # host time per call at a tiny size instead of the time of the work
    only: frozenset[str] | None = None  # names of implementations
    without: frozenset[str] = frozenset()
    cold: bool = True


def groups(plan: Plan, ops: Sequence[str], dtypes: Sequence[torch.dtype], device: torch.device) -> list[Group]:
    """Groups of a plan, restricted to some ops; a group without entries is left out."""
    made = _by_value(plan, dtypes, device) if plan.by_value else _by_shape(plan, dtypes, device)
    result = []
    for group in made:
        entries = tuple((op, case) for op, case in group.entries if op in ops)
        if entries:
            result.append(replace(group, entries=entries))
    return result


_PASSES = {
    "Forward": ("logits_floor", "logprob_entropy", "token_stats"),
    "Forward + backward": ("logprob_entropy_fwdbwd",),
    "Backward alone": ("logprob_entropy_bwd",),
}


def _by_shape(plan: Plan, dtypes: Sequence[torch.dtype], device: torch.device) -> Iterator[Group]:
    def of(title: str) -> Iterator[Group]:
        for logits in plan.logits:
            cases = [(op, Case(logits, dtype, device)) for op in _PASSES[title] for dtype in dtypes]
            yield Group(f"{title}, logits {logits}", tuple(cases))

    first, second, last = _PASSES
    yield from (*of(first), *of(second))
    yield from _selection(plan.tokens, device)
    yield from _losses(plan.batches, device)
    yield _host(device)
    yield from of(last)  # no bar rests on it
    yield from _linear(plan.hidden, dtypes, device)


def _by_value(plan: Plan, dtypes: Sequence[torch.dtype], device: torch.device) -> Iterator[Group]:
    half_first = sorted(dtypes, key=lambda dtype: dtype.itemsize)
    headline = HEADLINE if HEADLINE in plan.logits else plan.logits[0] if plan.logits else None
    first = half_first[0] if half_first else None
    if headline is not None and first is not None:
        yield from _logits(headline, first, device)
    small, large = plan.tokens[:1], plan.tokens[1:]
    yield from _selection(small, device)
    yield from _losses(plan.batches[:1], device)
    yield from _selection(large[:1], device)
    yield _host(device, only=_HOST_NAMES)
    # a GPU's products are of halves; others are measured where nothing else is asked for
    halves = [dtype for dtype in half_first if dtype.itemsize == 2]
    of_products = half_first if device.type == "cpu" or not halves else halves
    yield from _linear(plan.hidden[:1], of_products, device)
    rest = [(shape, dtype) for dtype in half_first for shape in plan.logits if (shape, dtype) != (headline, first)]
    for shape, dtype in rest:
        yield from _logits(shape, dtype, device, without=SLOW_TO_PREPARE)
    yield from _losses(plan.batches[1:], device)
    yield from _selection(large[1:], device)
    yield from _linear(plan.hidden[1:], of_products, device)
    for shape, dtype in rest:
        yield from _logits(shape, dtype, device, only=SLOW_TO_PREPARE)


def _logits(
    shape: LogitsShape,
    dtype: torch.dtype,
    device: torch.device,
    only: frozenset[str] | None = None,
    without: frozenset[str] = frozenset(),
) -> Iterator[Group]:
    case = Case(shape, dtype, device)
    for title, members in _PASSES.items():
        entries = tuple((op, case) for op in members)
        tail = "" if only is None else ", what compiles for every shape"
        yield Group(f"{title}, logits {shape} {case.dtype_name}{tail}", entries, only=only, without=without)


_TOKENS = {
    "normal": "{} tokens, normal covariance",
    "band": "{} tokens, all in the band",
    "equal": "{} tokens, all equal",
}


def _selection(shapes: Sequence[TokensShape], device: torch.device) -> Iterator[Group]:
    for tokens in shapes:
        # the covariance itself does not depend on the distribution of the given one: once is enough
        last = ("token_covariance",) if tokens.distribution == "normal" else ()
        selection = ("tokens_floor", "clip_cov_mask", "kl_cov_mask", *last)
        cases = tuple((op, Case(tokens, torch.float32, device)) for op in selection)
        yield Group(f"Selection, {_TOKENS[tokens.distribution].format(tokens.tokens)}", cases)


def _losses(shapes: Sequence[BatchShape], device: torch.device) -> Iterator[Group]:
    for batch in shapes:
        cases = tuple((op, Case(batch, torch.float32, device)) for op in LOSSES)
        yield Group(f"Losses, forward + backward, {batch}", cases)


def _linear(shapes: Sequence[HiddenShape], dtypes: Sequence[torch.dtype], device: torch.device) -> Iterator[Group]:
    for hidden in shapes:
        for i, dtype in enumerate(dtypes):
            case = Case(hidden, dtype, device)
            title = f"From hidden states, {hidden.rows}×{hidden.features}×{hidden.vocab} {case.dtype_name}"
            ops = LINEAR if i else (*LINEAR, *LINEAR_LOSSES)  # the losses add little to what the dtype costs
            yield Group(title, tuple((op, case) for op in ops), cold=False)


_HOST = (
    "logprob_entropy",
    "logprob_entropy_fwdbwd",
    "token_stats",
    "token_covariance",
    "clip_cov_mask",
    "kl_cov_mask",
)


def _host(device: torch.device, only: frozenset[str] | None = None) -> Group:
    tiny: list[tuple[str, Case]] = []
    for op in _HOST:
        shape: Shape = TINY_LOGITS if SHAPE_OF[op] is LogitsShape else TINY_TOKENS
        tiny.append((op, Case(shape, torch.float32, device)))
    return Group("Host time per call at a tiny size", tuple(tiny), host=True, only=only)

"""What is measured: ops, problem sizes, their inputs, and the plans that say in which order.

An op names what is timed; a :class:`Case` is a problem for it; :func:`make_inputs` makes its tensors, the same for
every implementation; :func:`groups` turns a :class:`Plan` into groups of cases that are timed together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from entropy_kernels.backends.registry import BACKENDS

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
DISTRIBUTIONS = ("normal", "band", "equal")


@dataclass(frozen=True)
class LogitsShape:
    """Logits (rows, vocab): ``rows`` tokens over a vocabulary of ``vocab``."""

    rows: int
    vocab: int

    def __str__(self) -> str:
        return f"{self.rows}×{self.vocab}"


@dataclass(frozen=True)
class TokensShape:
    """A batch of ``tokens`` tokens whose covariance follows ``distribution``.

    "normal": N(0, 1), about a sixth of the tokens in Clip-Cov's band (1, 5); "band": all of them inside it;
    "equal": all inside it and equal, so that every comparison is a tie.
    """

    tokens: int
    distribution: str = "normal"

    def __str__(self) -> str:
        return f"{self.tokens} {self.distribution}"


@dataclass(frozen=True)
class BatchShape:
    """A training batch (sequences, length) for the losses."""

    sequences: int
    length: int

    def __str__(self) -> str:
        return f"{self.sequences}×{self.length} batch"


@dataclass(frozen=True)
class HiddenShape:
    """Hidden states (rows, features) and a head (vocab, features)."""

    rows: int
    features: int
    vocab: int

    def __str__(self) -> str:
        return f"{self.rows}×{self.features}×{self.vocab} hidden"


Shape = LogitsShape | TokensShape | BatchShape | HiddenShape


# op -> the shape of its cases. A "roofline" op is a limit of the machine, not a rival.
OPS: dict[str, type] = {
    "logprob_entropy": LogitsShape,  # log-prob and entropy, no gradient
    "logprob_entropy_bwd": LogitsShape,  # the gradient of both alone; forward outside the clock
    "logprob_entropy_fwdbwd": LogitsShape,  # log-prob, entropy and the gradient of both
    "token_stats": LogitsShape,  # log-prob, entropy, collision probability and vocabulary covariance, no gradient
    "logits_roofline": LogitsShape,  # amax over the vocabulary; reading the logits once (integer sum); copying them
    "token_covariance": TokensShape,  # of log-prob and advantage, with a mask
    "clip_cov_mask": TokensShape,  # a random n of the tokens in the covariance range
    "kl_cov_mask": TokensShape,  # the n tokens of largest covariance
    "tokens_roofline": TokensShape,  # torch.topk(covariance, 800)
    "policy_loss": BatchShape,  # PPO's clipped loss and its gradient with respect to log-prob
    "clip_cov_loss": BatchShape,  # verl's definition, selection included, and its gradient
    "kl_cov_loss": BatchShape,  # verl's definition, selection included, and its gradient
    "linear_logprob_entropy": HiddenShape,  # log-prob and entropy from hidden states and a head, no gradient
    "linear_logprob_entropy_fwdbwd": HiddenShape,  # the same with the gradients of both
    "linear_policy_loss": HiddenShape,  # PPO's clipped loss from hidden states and a head, and its gradients
    "linear_clip_cov_loss": HiddenShape,  # Clip-Cov (verl's definition), selection included, and its gradients
    "linear_roofline": HiddenShape,  # the matrix products alone: one (forward), three, four (with a recomputation)
}
LOSSES = ("policy_loss", "clip_cov_loss", "kl_cov_loss")
LINEAR = ("linear_roofline", "linear_logprob_entropy", "linear_logprob_entropy_fwdbwd")
LINEAR_LOSSES = ("linear_policy_loss", "linear_clip_cov_loss")
# Selected fractions: the library's defaults, the paper's 2e-4 (Clip-Cov) and 2e-3 (KL-Cov).
CLIP_COV_RATIO, KL_COV_RATIO = 2e-4, 2e-3
BAND = (1.0, 5.0)  # Clip-Cov's covariance range
TOPK = 800
SEED = 1234


def logits_bytes(case: Case) -> int:
    """Bytes of a case's logits, given or made from hidden states; 0 where there are none."""
    shape = case.shape
    return shape.rows * shape.vocab * case.dtype.itemsize if isinstance(shape, (LogitsShape, HiddenShape)) else 0


@dataclass(frozen=True)
class Case:
    """One problem: a shape, the dtype of the logits (fp32 for selection and losses), a device, and the seed."""

    shape: Shape
    dtype: torch.dtype
    device: torch.device
    seed: int = 0

    @property
    def dtype_name(self) -> str:
        """Short name as on the command line: fp32, bf16, …"""
        return next(name for name, dtype in DTYPES.items() if dtype == self.dtype)

    def __str__(self) -> str:
        return f"{self.shape} {self.dtype_name} {self.device.type}"


# So small that the arithmetic is a few microseconds and what is left is the cost of the call.
TINY_LOGITS = LogitsShape(4, 64)
TINY_TOKENS = TokensShape(64)
# Where the GPU's targets are stated: a micro-batch of 8 K tokens over Llama 3's vocabulary, 2.1 GB in bf16.
HEADLINE = LogitsShape(8192, 128256)
HEADLINE_HIDDEN = HiddenShape(8192, 4096, 128256)


Inputs = dict[str, Tensor]
_DRAWN_AT_ONCE = 1 << 27  # random numbers, 512 MB


def make_inputs(case: Case) -> Inputs:
    """Inputs of a case, made on its device from its seed; the same for every implementation."""
    generator = torch.Generator(case.device).manual_seed(case.seed)
    maker: Callable[..., Inputs] = _MAKERS[type(case.shape)]
    return maker(case.shape, case, generator)


def _logits_inputs(shape: LogitsShape, case: Case, generator: torch.Generator) -> Inputs:
    """Rows from flat (entropy near log V) to peaked (below 1 nat): an error that only shows at one end must show."""
    options: dict[str, Any] = {"device": case.device}
    logits = torch.empty(shape.rows, shape.vocab, dtype=case.dtype, **options)
    scale = torch.linspace(0.5, 8.0, shape.rows, **options)[:, None]
    # some rows at a time: the fp32 numbers of a large case in bf16 would not fit beside it
    rows = max(1, _DRAWN_AT_ONCE // shape.vocab)
    for part, factor in zip(logits.split(rows), scale.split(rows), strict=True):
        part.copy_(torch.randn(part.shape, generator=generator, **options).mul_(factor))
    target = torch.randint(shape.vocab, (shape.rows,), generator=generator, **options)
    # every other token is the likeliest one, as in a converged policy; a random id is nearly always improbable
    target[::2] = logits[::2].argmax(-1)
    return {
        "logits": logits,
        "target": target,
        # upstream gradients of log-prob and entropy, as a loss with an entropy bonus sends them
        "grad_logprob": torch.randn(shape.rows, generator=generator, **options),
        "grad_entropy": torch.randn(shape.rows, generator=generator, **options) * 0.1,
    }


def _tokens_inputs(shape: TokensShape, case: Case, generator: torch.Generator) -> Inputs:
    options: dict[str, Any] = {"device": case.device}
    if shape.distribution == "normal":
        covariance = torch.randn(shape.tokens, generator=generator, **options)
    elif shape.distribution == "band":
        covariance = torch.rand(shape.tokens, generator=generator, **options) * 3.9 + 1.05
    elif shape.distribution == "equal":
        covariance = torch.full((shape.tokens,), 2.0, **options)
    else:
        raise ValueError(f"distribution: expected one of {DISTRIBUTIONS}, got {shape.distribution!r}")
    return {
        "covariance": covariance,
        "logprob": -torch.rand(shape.tokens, generator=generator, **options).exp(),
        "advantages": torch.randn(shape.tokens, generator=generator, **options),
        "mask": torch.rand(shape.tokens, generator=generator, **options) < 0.9,
    }


def _batch_inputs(shape: BatchShape, case: Case, generator: torch.Generator) -> Inputs:
    """Log-probs a minibatch update apart from the old ones, one advantage per sequence, right-padded responses."""
    options: dict[str, Any] = {"device": case.device}
    size = (shape.sequences, shape.length)
    old_logprob = -torch.randn(size, generator=generator, **options).exp()
    lengths = torch.randint(shape.length // 2, shape.length + 1, (shape.sequences, 1), generator=generator, **options)
    return {
        "logprob": old_logprob + 0.1 * torch.randn(size, generator=generator, **options),
        "old_logprob": old_logprob,
        "advantages": torch.randn(shape.sequences, 1, generator=generator, **options).expand(size).contiguous(),
        "mask": torch.arange(shape.length, **options) < lengths,
    }


def _hidden_inputs(shape: HiddenShape, case: Case, generator: torch.Generator) -> Inputs:
    """Logits from flat to peaked, as in :func:`_logits_inputs`; and what a policy loss of these tokens is given.

    The old log-probs are within 0.05 of the new ones, or 0.4 away: far enough from PPO's clip that bf16 does not move a
    token across it.
    """
    options: dict[str, Any] = {"device": case.device}
    weight = torch.randn(shape.vocab, shape.features, generator=generator, **options).to(case.dtype)
    scale = torch.linspace(0.5, 8.0, shape.rows, **options)[:, None] / shape.features**0.5
    hidden = (torch.randn(shape.rows, shape.features, generator=generator, **options) * scale).to(case.dtype)
    target = torch.randint(shape.vocab, (shape.rows,), generator=generator, **options)
    head, logprob = weight.float(), torch.empty(shape.rows, **options)
    for begin in range(0, shape.rows, 512):
        part = slice(begin, begin + 512)
        logits = hidden[part].float() @ head.t()
        target[part][::2] = logits[::2].argmax(-1)  # every other token is the likeliest one
        logprob[part] = logits.log_softmax(-1).gather(-1, target[part, None])[:, 0]
    grad_logprob = torch.randn(shape.rows, generator=generator, **options)
    grad_entropy = torch.randn(shape.rows, generator=generator, **options) * 0.1
    uniform = torch.rand(shape.rows, generator=generator, **options) - 0.5
    return {
        "hidden": hidden,
        "weight": weight,
        "target": target,
        "grad_logprob": grad_logprob,
        "grad_entropy": grad_entropy,
        "old_logprob": logprob - torch.where(uniform.abs() < 0.4, 0.1 * uniform, 0.4 * uniform.sign()),
        "advantages": torch.randn(shape.rows, generator=generator, **options),
        "mask": torch.rand(shape.rows, generator=generator, **options) < 0.9,
    }


_MAKERS: dict[type, Callable[..., Inputs]] = {
    LogitsShape: _logits_inputs,
    TokensShape: _tokens_inputs,
    BatchShape: _batch_inputs,
    HiddenShape: _hidden_inputs,
}


# --- plans ------------------------------------------------------------------------------------------------------------


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


# Sizes at which the CPU targets are stated: 311 MB of fp32 logits, ten times any cache of the machines in question, and
# 4 Mi tokens, a large batch over all ranks.
STATED = Plan(
    logits=(LogitsShape(512, 151936),),
    tokens=tuple(TokensShape(1 << 22, distribution) for distribution in DISTRIBUTIONS),
    batches=(BatchShape(512, 128),),
    repeats=7,
    hidden=(HiddenShape(1024, 576, 49152),),
)
# What else a CPU can afford from hidden states, in its grid: the head of Llama 2, and few tokens over Qwen's vocabulary
CPU_HIDDEN = (*STATED.hidden, HiddenShape(256, 2048, 32000), HiddenShape(128, 1024, 151936))
# 39 MB of fp32 logits: still more than the caches
QUICK = Plan(
    logits=(LogitsShape(64, 151936),),
    tokens=tuple(TokensShape(1 << 19, distribution) for distribution in DISTRIBUTIONS),
    batches=(BatchShape(64, 128),),
    repeats=7,
)
# Vocabularies of Llama 3, Qwen 3, Llama 2, Qwen 3.5 and GPT-2 (odd); rows from one token to a micro-batch. In the
# order of what they tell: targets are stated at 8192 rows, few rows are another regime, 1024 and 32768 are like 8192.
GRID_VOCAB = (128256, 151936, 32000, 248320, 50257)
GRID_ROWS = (8192, 64, 1, 32768, 1024)
HIDDEN_VOCAB = (128256, 151936, 32000, 248320)
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
SLOW_TO_PREPARE = frozenset({"compile", "cut-ce-compile", "liger-grpo", "liger-logprob", "quack-ce", "liger-scaled",
                             "quack-linear-ce-mean", "quack-linear-ce-mean-default"})  # fmt: skip
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
    "Forward": ("logits_roofline", "logprob_entropy", "token_stats"),
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
    yield from of(last)  # no target rests on it
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
        selection = ("tokens_roofline", "clip_cov_mask", "kl_cov_mask", *last)
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


_HOST = ("logprob_entropy", "logprob_entropy_fwdbwd", "token_stats", "token_covariance", "clip_cov_mask", "kl_cov_mask")


def _host(device: torch.device, only: frozenset[str] | None = None) -> Group:
    tiny: list[tuple[str, Case]] = []
    for op in _HOST:
        shape: Shape = TINY_LOGITS if OPS[op] is LogitsShape else TINY_TOKENS
        tiny.append((op, Case(shape, torch.float32, device)))
    return Group("Host time per call at a tiny size", tuple(tiny), host=True, only=only)

"""What is measured: problem sizes and their inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp64": torch.float64,
}
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


def size_of(shape: Shape) -> dict[str, int | str]:
    """A shape's numbers by name, for JSON: rows and vocab; tokens and distribution; sequences and length; …"""
    return asdict(shape)


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
# Where the GPU's bars are stated: a micro-batch of 8 K tokens over Llama 3's vocabulary, 2.1 GB in bf16.
HEADLINE = LogitsShape(8192, 128256)
HEADLINE_HIDDEN = HiddenShape(8192, 4096, 128256)


def parse_logits(text: str) -> LogitsShape:
    """``"512,151936"`` -> 512 rows of 151936; ValueError for anything else."""
    rows, vocab = _numbers(text, 2, "--shape: expected N,V with N and V > 0, for example 512,151936")
    return LogitsShape(rows, vocab)


def parse_hidden(text: str) -> HiddenShape:
    """``"1024,576,49152"`` -> 1024 hidden states of 576 and a head of 49152; ValueError for anything else."""
    return HiddenShape(*_numbers(text, 3, "--hidden: expected N,H,V, all > 0, for example 1024,576,49152"))


def _numbers(text: str, count: int, expected: str) -> list[int]:
    parts = text.replace("x", ",").replace("×", ",").split(",")
    if len(parts) != count or not all(part.strip().isdigit() and int(part) > 0 for part in parts):
        raise ValueError(f"{expected}, got {text!r}")
    return [int(part) for part in parts]


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

    The old log-probs are within .05 of the new ones, or .4 away: far enough from PPO's clip that bf16 does not move a
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

"""Batches for control: what a call is given, and the reference's tokens of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import entropy_kernels as ek
from reference_control import Token

Micro = dict[str, Any]  # arguments of ek.TokenBatch
FIELDS = ("logprob", "old_logprob", "advantages", "entropy", "old_entropy", "collision", "vocab_covariance")


def micro(
    rows: int, length: int, seed: int = 0, *, ties: bool = False, dtype: torch.dtype = torch.float32, **more: Any
) -> Micro:
    """(rows, length); NaN in padding; ties: entropies, covariances and log-probs of few values."""
    g = torch.Generator().manual_seed(seed)
    shape = rows, length

    def uniform(low: float = 0.0, high: float = 1.0) -> Tensor:
        x = low + (high - low) * torch.rand(shape, generator=g, dtype=torch.float64)
        return (4 * x).round() / 4 if ties else x

    mask = torch.arange(length) < torch.randint(0, length + 1, (rows, 1), generator=g)
    mask |= torch.rand(shape, generator=g) < 0.5
    logprob = uniform(-4.0, -0.01)
    made: Micro = {
        "logprob": logprob, "old_logprob": logprob + 0.3 * uniform(-1.0, 1.0),
        "advantages": uniform(-2.0, 2.0), "entropy": uniform(0.0, 1.5), "old_entropy": uniform(0.0, 1.5),
        "vocab_covariance": uniform(-1.0, 1.0) ** 3,
    }  # fmt: skip
    made["old_entropy"] = torch.where(
        uniform() < 0.5, made["entropy"] * (1 + 0.1 * uniform(-1, 1)), made["old_entropy"]
    )
    made = {name: torch.where(mask, x, torch.nan).to(dtype) for name, x in made.items()}
    return {**made, "mask": mask, **more}


def added(micros: list[Micro], group: Any = None, **options: Any) -> ek.SelectionBatch:
    batch = ek.SelectionBatch(group, **options)
    for each in micros:
        given = dict(each)
        batch.add(given.pop("logprob"), given.pop("advantages"), given.pop("mask"), **given)
    return batch


def one(given: Micro) -> ek.TokenBatch:
    given = dict(given)
    positional = [given.pop(name, None) for name in ("logprob", "old_logprob", "advantages", "mask")]
    return ek.TokenBatch(*positional, **given)


def tokens_of(micros: list[Micro]) -> list[Token]:
    """The valid tokens, in order."""
    found: list[Token] = []
    start = 0
    for given in micros:
        logprob = given["logprob"]
        mask = torch.ones_like(logprob, dtype=torch.bool) if given["mask"] is None else given["mask"] != 0
        index = given.get("token_index")
        index = torch.arange(start, start + logprob.numel()) if index is None else index.reshape(-1)
        start += logprob.numel()

        def column(name: str, default: Any = None, given: Micro = given, logprob: Tensor = logprob) -> list[Any]:
            value = given.get(name)
            value = default if value is None else value
            if not isinstance(value, Tensor):
                return [value] * logprob.numel()
            if name in ("advantages", "coefficient") and value.shape != logprob.shape and value.dim():
                ends = given.get("cu_seqlens")
                if ends is not None:
                    return value.reshape(-1).repeat_interleave(ends.diff()).tolist()
                value = value.reshape(-1, 1)
            return value.expand(logprob.shape).reshape(-1).tolist()

        nan = float("nan")
        rows = zip(
            column("logprob"), column("advantages"), index.tolist(), column("old_logprob", logprob),
            column("entropy", nan), column("old_entropy", nan), column("vocab_covariance", nan),
            column("coefficient", nan), column("temperature", 1.0), column("exclude", False), strict=True,
        )  # fmt: skip
        found += [Token(*row) for row, there in zip(rows, mask.reshape(-1).tolist(), strict=True) if there]
    for token in found:
        token.c = 1 / len(found) if token.c != token.c else token.c
        token.excluded = bool(token.excluded)
    return found


def valid(values: list[Tensor], micros: list[Micro]) -> list[Any]:
    """Of each micro-batch's tensor the entries of valid tokens, as the reference has them."""
    found = []
    for value, given in zip(values, micros, strict=True):
        assert value.shape == given["logprob"].shape
        mask = given["mask"]
        found += (value.reshape(-1) if mask is None else value[mask != 0]).tolist()
    return found

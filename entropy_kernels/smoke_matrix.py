"""Calls that reach every kernel on a GPU, and every way that its blocks share work, at the smallest size that takes it.

A *family* is what can fail by itself: each runs in a process of its own (:mod:`.verify`), because after an illegal
address or a hang nothing else of that process can be believed. Every result is compared with plain torch operations
on the CPU, so that a kernel that is only right by luck fails too.

``python -m entropy_kernels.smoke_matrix FAMILY [--device cuda:0]`` runs one. It prints a JSON line before each call,
``{"begin": NAME}``, and one behind it, ``{"call": NAME, "wrong": "", "seconds": S}``; exit code 1 if a result is wrong.

The names say what the calls reach on an H100. Where a GPU has no clusters, or other numbers of multiprocessors, the
same calls are shared out in the way that they would be there.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import itertools
import json
import signal
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

import entropy_kernels as ek
from entropy_kernels.backends import native, radix_select
from entropy_kernels.backends.radix_select import Band, Count

Results = tuple[Tensor, ...]
BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


class Call(NamedTuple):
    """``run(device, backend)`` on inputs of its own.

    ``exact``: the results are equal bit for bit on every backend; ``sums``: in half precision they are sums of rounded
    products, which may cancel.
    """

    name: str
    run: Callable[[str, str], Results]
    exact: bool = False
    sums: bool = False


class Family(NamedTuple):
    """Calls of one backend; ``ops`` cannot be verified if one of them goes wrong."""

    backend: str
    kind: str
    ops: tuple[str, ...]
    calls: Callable[[], Sequence[Call]]

    @property
    def name(self) -> str:
        return f"{self.backend}/{self.kind}"


# ---- statistics ------------------------------------------------------------------------------------------------------


def statistics(
    rows: int,
    vocab: int,
    dtype: torch.dtype,
    *,
    gradient: bool = False,
    layout: str = "contiguous",
    function: str = "token_stats",
    **options: Any,
) -> Call:
    """Layouts: "misaligned" rows begin off the 16 bytes, "strided" columns lie apart."""

    def run(device: str, backend: str) -> Results:
        generator = torch.Generator().manual_seed(rows + vocab)
        extra = 3 if layout == "misaligned" else 0
        wide = (3 * torch.randn(rows, vocab + extra, generator=generator)).to(device, dtype)
        if layout == "strided":
            wide = wide.t().contiguous().t()
        logits = wide[:, extra:].detach().requires_grad_(gradient)
        target = torch.randint(vocab, (rows,), generator=generator).to(device)
        target[rows // 2] = -100 if rows > 1 else target[0]
        given = logits * 1 if options.get("inplace_backward") else logits
        outputs = getattr(ek, function)(given, target, backend=backend, **options)
        results = tuple(output.detach() for output in outputs)
        if not gradient:
            return results
        # upstream gradients of stride 0, as .sum() hands them over
        total = sum(output.sum() for output in outputs if output.requires_grad)
        return (*results, *torch.autograd.grad(total, logits))

    what = " ".join(f"{name}={value}" for name, value in options.items())
    passes = "forward, backward" if gradient else "forward"
    return Call(f"{function} {rows}×{vocab} {str(dtype)[6:]} {layout} {what}".strip() + f", {passes}", run)


def forward(rows: Sequence[int], vocabs: dict[torch.dtype, int], **options: Any) -> list[Call]:
    """Every instance of a kernel: dtypes, with and without second-order statistics and a softcap."""
    return [
        statistics(n, vocab, dtype, function=function, softcap=softcap, temperature=0.7, **options)
        for n in rows
        for dtype, vocab in vocabs.items()
        for function, softcap in itertools.product(("token_stats", "logprob_entropy"), (None, 20.0))
    ]


def same(vocab: int, *dtypes: torch.dtype) -> dict[torch.dtype, int]:
    return dict.fromkeys(dtypes or (BF16, FP16, FP32), vocab)


def backward(vocabs: Sequence[int], **options: Any) -> list[Call]:
    """Few rows, whose blocks share them, and many; each statistic has a gradient."""
    return [
        statistics(n, vocab, dtype, gradient=True, softcap=softcap, **options)
        for n, vocab in itertools.product((2, 300), vocabs)
        for dtype, softcap in itertools.product((BF16, FP16, FP32), (None, 20.0))
    ]


def from_hidden(
    rows: int, features: int, vocab: int, dtype: torch.dtype, *, gradient: bool, odd: bool = False, **options: Any
) -> Call:
    """Rows of "odd" lie off the 16 bytes. With this budget bf16 makes its logits twice, in tiles; fp32 keeps them."""

    def run(device: str, backend: str) -> Results:
        generator = torch.Generator().manual_seed(rows + vocab)
        hidden, weight = (torch.randn(n, features + odd, generator=generator) for n in (rows, vocab))
        hidden, weight = (x.to(device, dtype)[:, int(odd) :].detach() for x in (hidden, weight / features**0.5))
        target = torch.randint(vocab, (rows,), generator=generator).to(device)
        for tensor in (hidden, weight):
            tensor.requires_grad_(gradient)
        # rounded to the dtype of the products, sums in another order would differ in more than their last digits
        given = {"logits_dtype": torch.float32, "memory_budget": 600_000, "backend": backend, **options}
        outputs = ek.linear_token_stats(hidden, weight, target, **given)
        results = tuple(output.detach() for output in outputs)
        if not gradient:
            return results
        return (*results, *torch.autograd.grad(outputs.logprob.sum() - outputs.entropy.sum(), (hidden, weight)))

    what = " ".join(f"{name}={value}" for name, value in options.items()) + (", gradients" if gradient else "")
    name = f"from hidden {rows}×{features}×{vocab} {str(dtype)[6:]} {'odd ' if odd else ''}{what}".strip()
    return Call(name, run, sums=True)


# ---- batches of tokens -----------------------------------------------------------------------------------------------


def batch(tokens: int, device: str) -> dict[str, Tensor]:
    """Covariances of which many tie, log-probs, advantages, masks, shuffled indices."""
    generator = torch.Generator().manual_seed(tokens)
    data = {
        "covariance": (8 * torch.randn(tokens, generator=generator)).round() / 4,
        "logprob": -2 * torch.rand(tokens, generator=generator),
        "advantages": torch.randn(tokens, generator=generator),
        "mask": torch.rand(tokens, generator=generator) < 0.8,
        "exclude": torch.rand(tokens, generator=generator) < 0.1,
        "token_index": torch.randperm(tokens, generator=generator) - 5,
    }
    return {name: value.to(device) for name, value in data.items()}


def covariance(tokens: int) -> Call:
    def run(device: str, backend: str) -> Results:
        data = batch(tokens, device)
        return (
            ek.token_covariance(data["logprob"], data["advantages"], data["mask"], backend=backend),
            ek.token_covariance(data["logprob"].double(), data["advantages"], backend=backend),
        )

    return Call(f"covariance of {tokens} tokens", run, exact=True)


def selection(tokens: int) -> Call:
    """Masks by value and by key, an absolute and a quantile range, given indices."""

    def run(device: str, backend: str) -> Results:
        data = batch(tokens, device)
        masked = data["covariance"], data["mask"]
        among: dict[str, Any] = {"exclude": data["exclude"], "token_index": data["token_index"]}
        quantile: dict[str, Any] = {"band": "quantile", "low": 0.2, "high": 0.9, "closed": True}
        return (
            ek.kl_cov_mask(*masked, ratio=0.1, backend=backend),
            ek.clip_cov_mask(*masked, seed=7, ratio=0.05, backend=backend, **among),
            ek.clip_cov_mask(data["covariance"], seed=7, k=tokens // 3 + 1, **quantile, backend=backend),
        )

    return Call(f"selection of {tokens} tokens", run, exact=True)


def selection_steps(tokens: int) -> Call:
    """The kernels of single steps, for batches over ranks, here of one."""

    def run(device: str, backend: str) -> Results:
        data = batch(tokens, device)
        steps: Any = native._steps if backend == "cuda" else _eager_steps()
        masks = (data["mask"], data["exclude"], data["token_index"])
        seed, count = torch.tensor(3, device=device), Count(0.05, None, True)
        band = Band(0.2, 0.9, True, False)
        return (
            radix_select.token_covariance(steps, data["logprob"], data["advantages"], data["mask"], ""),
            radix_select.kl_cov_mask(steps, data["covariance"], *masks, count, ""),
            radix_select.clip_cov_mask(steps, data["covariance"], *masks, seed, count, band, ""),
        )

    return Call(f"single steps on {tokens} tokens", run, exact=True)


def _eager_steps() -> Any:
    from entropy_kernels.backends.eager import selection

    return selection


# ---- the matrix ------------------------------------------------------------------------------------------------------

_STATISTICS = ("token_stats", "linear_token_stats")
_SELECTION = ("clip_cov_mask", "kl_cov_mask")
_ROW_BYTES = (20_000, 40_000, 140_000)  # few rows of them take clusters of 2, 4 and 8 blocks with bulk copies
_TOKENS = (700, 5000, 12_000, 30_000, 60_000)  # clusters of 1, 2, 4, 8 and 16 blocks
_GRID = 524_289
_DTYPES = (BF16, FP16, FP32)


def _cuda() -> Iterable[tuple[str, tuple[str, ...], Callable[[], list[Call]]]]:
    yield "forward-plain", _STATISTICS, lambda: forward((1, 300), same(97))
    yield "forward-bulk", _STATISTICS, lambda: forward((300,), same(9001))
    yield "forward-clusters", _STATISTICS, _clusters
    # states that meet in memory: strided columns take no bulk copies
    yield "forward-parts", _STATISTICS, lambda: forward((2,), same(40_000), layout="strided")
    yield "forward-misaligned", _STATISTICS, lambda: forward((2, 300), same(9001), layout="misaligned")
    yield "fp64", _STATISTICS, _doubles
    yield "backward-aligned", _STATISTICS, lambda: backward((96, 9000))
    yield "backward-misaligned", _STATISTICS, _misaligned
    yield "backward-strided", _STATISTICS, lambda: backward((203,), layout="strided")
    yield "backward-in-place", _STATISTICS, _in_place
    yield "linear", ("linear_token_stats",), lambda: _linear(*_DTYPES)
    yield "covariance", ("token_covariance",), lambda: _each(covariance, *_TOKENS, _GRID)
    yield "selection-clusters", _SELECTION, lambda: _each(selection, *_TOKENS)
    yield "selection-grid", _SELECTION, lambda: _each(selection, _GRID)
    yield "selection-steps", (*_SELECTION, "token_covariance"), lambda: _each(selection_steps, 5000)


def _triton() -> Iterable[tuple[str, tuple[str, ...], Callable[[], list[Call]]]]:
    for dtype in _DTYPES:  # apart, because each instance is compiled first
        name = str(dtype)[6:]
        yield f"forward-{name}", _STATISTICS, functools.partial(_triton_forward, dtype)
        yield f"backward-{name}", _STATISTICS, functools.partial(_triton_backward, dtype)
        yield f"linear-{name}", ("linear_token_stats",), functools.partial(_linear, dtype)
    tokens = (1, 700, 30_000)
    yield "covariance", ("token_covariance",), lambda: _each(covariance, *tokens)
    yield "selection", _SELECTION, lambda: _each(selection, *tokens)


def _each(call: Callable[[int], Call], *tokens: int) -> list[Call]:
    return [call(n) for n in tokens]


def _clusters() -> list[Call]:
    by_size = ({dtype: size // dtype.itemsize for dtype in _DTYPES} for size in _ROW_BYTES)
    return [call for vocabs in by_size for call in forward((1, 3), vocabs)]


def _doubles() -> list[Call]:
    return [
        statistics(rows, vocab, FP64, gradient=True, softcap=softcap, function=function)
        for (rows, vocab), softcap in itertools.product(((3, 500), (2, 20_001)), (None, 20.0))
        for function in ("token_stats", "logprob_entropy")
    ]


def _misaligned() -> list[Call]:
    """Logits and gradient off the 16 bytes by as much, and by different amounts."""
    return [*backward((203, 9001)), *backward((203, 9001), layout="misaligned")]


def _in_place() -> list[Call]:
    return [
        *backward((9000, 203), inplace_backward=True),
        *backward((203,), inplace_backward=True, layout="misaligned"),
        *backward((203,), inplace_backward=True, layout="strided"),
    ]


def _triton_forward(dtype: torch.dtype) -> list[Call]:
    return [
        *forward((3,), same(97, dtype)),
        *forward((2,), same(9001, dtype)),
        statistics(300, 9000, dtype),
        statistics(1, 40_000, dtype),
        statistics(2, 9001, dtype, layout="misaligned"),
        statistics(2, 203, dtype, layout="strided"),
    ]


def _triton_backward(dtype: torch.dtype) -> list[Call]:
    return [
        statistics(rows, vocab, dtype, gradient=True, layout=layout, softcap=softcap, inplace_backward=inplace)
        for rows, vocab, layout, softcap, inplace in (
            (3, 9000, "contiguous", None, False),
            (2, 203, "contiguous", 20.0, False),
            (2, 203, "misaligned", None, True),
            (5, 203, "strided", None, True),
        )
    ]


def _linear(*dtypes: torch.dtype) -> list[Call]:
    """Copies of blocks, loads, one and several tiles and parts."""
    return [
        from_hidden(rows, 136, 301, dtype, gradient=gradient, odd=odd, softcap=None if odd else 20.0)
        for dtype, rows in itertools.product(dtypes, (7, 140))
        for gradient, odd in ((False, False), (False, True), (True, False))
    ]


FAMILIES = {
    family.name: family
    for backend, kinds in (("cuda", _cuda), ("triton", _triton))
    for family in (Family(backend, *kind) for kind in kinds())
}


def difference(got: Sequence[Tensor], expected: Sequence[Tensor], exact: bool, sums: bool = False) -> str:
    """What differs, or ""."""
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        a = a.cpu()
        if exact and not torch.equal(a, b):
            return f"result {i}: {int((a != b).sum())} of {a.numel()} differ"
        # Each element by its own size: gradients are rounded to their dtype, and most are 1/V of the largest. What
        # sums in another order cancel to is a share of the largest.
        relative = {BF16: 1.6e-2, FP16: 2e-3}.get(a.dtype, 2e-5)
        wide, right = a.double(), b.double()
        scale = right.abs().amax().item() if b.numel() else 0.0
        floor = 2e-5 if a.dtype not in (BF16, FP16) else torch.finfo(a.dtype).eps if sums else 1e-6
        floor *= max(scale, 1e-6)
        off = (wide - right).abs()
        wrong = ~(off <= relative * right.abs() + floor)  # NaN is wrong
        if wrong.any():
            worst = off[wrong].nan_to_num(torch.inf).amax().item()
            return f"result {i}: {int(wrong.sum())} of {a.numel()} off, by up to {worst:.3g} at a scale of {scale:.3g}"
    return ""


def run(family: Family, device: str) -> int:
    """Run a family's calls, with a JSON line before and behind each; the number of wrong ones."""
    wrong = 0
    for call in family.calls():
        print(json.dumps({"begin": call.name}), flush=True)
        start = time.perf_counter()
        found = difference(call.run(device, family.backend), call.run("cpu", "torch"), call.exact, call.sums)
        seconds = round(time.perf_counter() - start, 3)
        print(json.dumps({"call": call.name, "wrong": found, "seconds": seconds}), flush=True)
        wrong += bool(found)
    return wrong


def end_with_parent() -> None:
    """However the process that started this one ends: a kernel that hangs would keep the GPU for ever."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="smoke_matrix", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("family", choices=FAMILIES, metavar="FAMILY")
    parser.add_argument("--device", default="cuda", help="default: %(default)s")
    arguments = parser.parse_args(argv)
    end_with_parent()
    if torch.device(arguments.device).type == "cuda":
        torch.cuda.set_device(torch.device(arguments.device).index or 0)
    return 1 if run(FAMILIES[arguments.family], arguments.device) else 0


if __name__ == "__main__":
    sys.exit(main())

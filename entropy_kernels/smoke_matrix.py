"""Small calls whose results are known: of every op for ``doctor``, of every kernel for ``verify`` and gpu_smoke.py.

Every result is compared with float64 (:mod:`.reference`), on the CPU, so that a kernel that is only right by luck fails
too. ``DOCTOR`` has a few calls per op, for any backend. ``FAMILIES`` reach every kernel on a GPU, and every way that
its blocks share work, at the smallest size that takes it: a *family* is what can fail by itself, and each runs in a
process of its own (:mod:`.verify`), because after an illegal address or a hang nothing else of that process can be
believed.

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
import math
import signal
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

import entropy_kernels as ek
from entropy_kernels import _rows, reference
from entropy_kernels.backends import native, radix_select
from entropy_kernels.backends.eager import selection as eager
from entropy_kernels.backends.radix_select import Band, Count

Results = tuple[Tensor, ...]
BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
DTYPES = BF16, FP16, FP32


class Call(NamedTuple):
    """``run(device, backend)`` on inputs of its own, and what comes of them in float64.

    ``exact``: the results are rounded once, and equal bit for bit on every backend; ``sums``: in half precision they
    are sums of rounded products, which may cancel.
    """

    name: str
    run: Callable[[str, str], Results]
    expected: Callable[[], Results]
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

_DIFFERENTIABLE = [statistic.name for statistic in _rows.STATISTICS if statistic.differentiable]


def _in_words(options: dict[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in options.items())


def _of_reference(
    logits: Tensor, target: Tensor, upstream: dict[str, Tensor], options: dict[str, Any], gradient: bool
) -> Results:
    """The statistics that ``upstream`` has gradients of, and the gradient of the logits that comes of these."""
    row = {name: options[name] for name in ("temperature", "softcap") if name in options}
    values = tuple(reference.statistics(logits, target, names=tuple(upstream), **row).values())
    into = {name: grad for name, grad in upstream.items() if name in _DIFFERENTIABLE}
    return (*values, reference.gradient(logits, target, into, **row)) if gradient else values


def _results(outputs: Sequence[Tensor], weights: Tensor | None, leaves: Sequence[Tensor]) -> Results:
    """The values, and the gradients of ``leaves`` that need some.

    Without weights (S, N) upstream gradients have stride 0, as .sum() hands them over.
    """
    values = tuple(output.detach() for output in outputs)
    if not leaves[0].requires_grad:
        return values
    weighted = outputs if weights is None else [x * w.to(x.device) for x, w in zip(outputs, weights, strict=True)]
    total = torch.stack([x.sum() for x, output in zip(weighted, outputs, strict=True) if output.requires_grad]).sum()
    return (*values, *torch.autograd.grad(total, leaves))


def on_logits(
    rows: int,
    vocab: int,
    dtype: torch.dtype,
    *,
    gradient: bool = False,
    layout: str = "contiguous",
    function: str = "token_stats",
    hard: bool = False,
    **options: Any,
) -> Call:
    """Layouts: "misaligned" rows begin off the 16 bytes, "strided" columns lie apart.

    ``hard``: an entry is masked, and each statistic of each token has a gradient of its own.
    """
    names = ek.TokenStats._fields if function == "token_stats" else ek.LogprobEntropy._fields
    extra = 3 if layout == "misaligned" else 0

    def inputs() -> tuple[Tensor, Tensor, Tensor | None]:
        generator = torch.Generator().manual_seed(rows + vocab)
        wide = (3 * torch.randn(rows, vocab + extra, generator=generator)).to(dtype)
        target = torch.randint(vocab, (rows,), generator=generator)
        target[rows // 2] = -100 if rows > 1 else target[0]
        if hard:
            wide[0, extra + (int(target[0]) + 1) % vocab] = -math.inf
        return wide, target, torch.randn(len(names), rows, generator=generator) if hard else None

    def run(device: str, backend: str) -> Results:
        wide, target, weights = inputs()
        wide = wide.to(device)
        if layout == "strided":
            wide = wide.t().contiguous().t()
        logits = wide[:, extra:].detach().requires_grad_(gradient)
        given = logits * 1 if options.get("inplace_backward") else logits
        outputs = getattr(ek, function)(given, target.to(device), backend=backend, **options)
        return _results(outputs, weights, [logits])

    def expected() -> Results:
        wide, target, weights = inputs()
        upstream = dict(zip(names, torch.ones(len(names), rows) if weights is None else weights, strict=True))
        return _of_reference(wide[:, extra:], target, upstream, options, gradient)

    passes = "forward, backward" if gradient else "forward"
    name = f"{function} {rows}×{vocab} {str(dtype)[6:]} {layout} {_in_words(options)}".strip() + f", {passes}"
    return Call(name, run, expected)


def forward_calls(
    rows: Sequence[int], vocab: int, dtypes: Sequence[torch.dtype] = DTYPES, **options: Any
) -> list[Call]:
    """Every instance of a kernel: dtypes, with and without second-order statistics and a softcap."""
    kinds = itertools.product(rows, dtypes, ("token_stats", "logprob_entropy"), (None, 20.0))
    return [
        on_logits(n, vocab, dtype, function=function, softcap=softcap, temperature=0.7, **options)
        for n, dtype, function, softcap in kinds
    ]


def backward_calls(vocabs: Sequence[int], layouts: Sequence[str] = ("contiguous",), **options: Any) -> list[Call]:
    """Few rows, whose blocks share them, and many; each statistic has a gradient."""
    return [
        on_logits(n, vocab, dtype, gradient=True, layout=layout, softcap=softcap, **options)
        for layout, n, vocab, dtype, softcap in itertools.product(layouts, (2, 300), vocabs, DTYPES, (None, 20.0))
    ]


def from_hidden(
    rows: int,
    features: int,
    vocab: int,
    dtype: torch.dtype,
    *,
    gradient: bool,
    odd: bool = False,
    hard: bool = False,
    **options: Any,
) -> Call:
    """Rows of "odd" lie off the 16 bytes. With this budget bf16 makes its logits twice, in tiles; fp32 keeps them.

    ``hard``: a label is ignored, and each statistic of each token has a gradient of its own.
    """
    names = ek.TokenStats._fields
    # rounded to the dtype of the products, sums in another order would differ in more than their last digits
    given = {"logits_dtype": torch.float32, "memory_budget": 600_000, **options}

    def inputs() -> tuple[list[Tensor], Tensor, Tensor]:
        generator = torch.Generator().manual_seed(rows + vocab)
        hidden, weight = (torch.randn(n, features + odd, generator=generator) for n in (rows, vocab))
        operands = [x.to(dtype) for x in (hidden, weight / features**0.5)]
        target = torch.randint(vocab, (rows,), generator=generator)
        weights = torch.zeros(len(names), rows)
        weights[names.index("logprob")], weights[names.index("entropy")] = 1.0, -1.0
        if hard:
            target[2], weights = -100, torch.randn(len(names), rows, generator=generator)
        return operands, target, weights

    def run(device: str, backend: str) -> Results:
        operands, target, weights = inputs()
        leaves = hidden, weight = [x.to(device)[:, int(odd) :].detach().requires_grad_(gradient) for x in operands]
        outputs = ek.linear_token_stats(hidden, weight, target.to(device), backend=backend, **given)
        return _results(outputs, weights, leaves)

    def expected() -> Results:
        operands, target, weights = inputs()
        hidden, weight = (x[:, int(odd) :].double() for x in operands)
        upstream = dict(zip(names, weights, strict=True))
        found = _of_reference(hidden @ weight.t(), target, upstream, options, gradient)
        return (*found[:-1], found[-1] @ weight, found[-1].t() @ hidden) if gradient else found

    what = _in_words(options) + (", gradients" if gradient else "")
    name = f"from hidden {rows}×{features}×{vocab} {str(dtype)[6:]} {'odd ' if odd else ''}{what}".strip()
    return Call(name, run, expected, sums=True)


# ---- batches of tokens -----------------------------------------------------------------------------------------------


def batch(tokens: int, device: str = "cpu") -> dict[str, Tensor]:
    """Covariances of which many tie, log-probs that are NaN where masked, advantages, masks, shuffled indices."""
    generator = torch.Generator().manual_seed(tokens)
    data = {
        "covariance": (8 * torch.randn(tokens, generator=generator)).round() / 4,
        "logprob": -2 * torch.rand(tokens, generator=generator),
        "advantages": torch.randn(tokens, generator=generator),
        "mask": torch.rand(tokens, generator=generator) < 0.8,
        "exclude": torch.rand(tokens, generator=generator) < 0.1,
        "token_index": torch.randperm(tokens, generator=generator) - 5,
    }
    data["masked_logprob"] = torch.where(data["mask"], data["logprob"], math.nan)
    return {name: value.to(device) for name, value in data.items()}


def on_batch(what: str, tokens: int, function: str, calls: Callable[..., Results]) -> Call:
    """``calls(function, data)`` of our function and of the reference's, on the same batch."""
    ours, right = getattr(ek, function), getattr(reference, function)
    return Call(
        what,
        lambda device, backend: calls(functools.partial(ours, backend=backend), batch(tokens, device)),
        lambda: calls(right, batch(tokens)),
        exact=True,
    )


def covariance(tokens: int) -> Call:
    def calls(of: Callable[..., Tensor], data: dict[str, Tensor]) -> Results:
        masked = of(data["masked_logprob"], data["advantages"], data["mask"])
        return masked, of(data["logprob"].double(), data["advantages"])

    return on_batch(f"covariance of {tokens} tokens", tokens, "token_covariance", calls)


def by_value(tokens: int) -> Call:
    """A mask by value."""

    def calls(mask: Callable[..., Tensor], data: dict[str, Tensor]) -> Results:
        return (mask(data["covariance"], data["mask"], ratio=0.1),)

    return on_batch(f"selection of {tokens} tokens by value", tokens, "kl_cov_mask", calls)


def by_key(tokens: int) -> Call:
    """Masks by key: an absolute and a quantile range, given indices, another seed."""

    def calls(mask: Callable[..., Tensor], data: dict[str, Tensor]) -> Results:
        among: dict[str, Any] = {"exclude": data["exclude"], "token_index": data["token_index"]}
        quantile: dict[str, Any] = {"band": "quantile", "low": 0.2, "high": 0.9, "closed": True}
        absolute = mask(data["covariance"], data["mask"], seed=7, ratio=0.05, **among)
        return absolute, mask(data["covariance"], seed=8, k=tokens // 3 + 1, **quantile)

    return on_batch(f"selection of {tokens} tokens by key", tokens, "clip_cov_mask", calls)


def by_budget(tokens: int) -> Call:
    """Masks by a budget: one that is reached among ties, what may be left, and a share."""

    def calls(mask: Callable[..., Tensor], data: dict[str, Tensor]) -> Results:
        among: dict[str, Any] = {"exclude": data["exclude"], "token_index": data["token_index"]}
        by_share = mask(data["covariance"], data["mask"], share=0.3, **among)
        return (
            mask(data["covariance"], budget=tokens / 8 + 0.1),
            mask(data["covariance"], data["mask"], limit=-tokens / 3, **among),
            by_share,
            mask(data["logprob"].exp() * data["advantages"], data["mask"], share=0.7),
        )

    return on_batch(f"selection of {tokens} tokens by a budget", tokens, "budget_tokens", calls)


def selection_steps(tokens: int) -> Call:
    """The kernels of single steps, for batches over ranks, here of one."""
    count, band = Count(0.05, None, True), Band(0.2, 0.9, True, False)

    def run(device: str, backend: str) -> Results:
        data = batch(tokens, device)
        steps: Any = native._steps if backend == "cuda" else eager
        scored = (data["covariance"], data["mask"], data["exclude"], data["token_index"])
        seed = torch.tensor(3, device=device)
        share = torch.tensor([math.nan, math.nan, 0.3], dtype=torch.float64, device=device)
        return (
            radix_select.token_covariance(steps, data["masked_logprob"], data["advantages"], data["mask"], ""),
            radix_select.kl_cov_mask(steps, *scored, count, ""),
            radix_select.clip_cov_mask(steps, *scored, seed, count, band, ""),
            radix_select.budget_mask(steps, *scored, share, ""),
        )

    def expected() -> Results:
        data = batch(tokens)
        masks: Any = {name: data[name] for name in ("mask", "exclude", "token_index")}
        options: Any = {"covariance": data["covariance"], **masks, "ratio": 0.05}
        return (
            reference.token_covariance(data["masked_logprob"], data["advantages"], data["mask"]),
            reference.kl_cov_mask(**options),
            reference.clip_cov_mask(**options, seed=3, low=0.2, high=0.9, band="quantile"),
            reference.budget_tokens(data["covariance"], **masks, share=0.3),
        )

    return Call(f"single steps on {tokens} tokens", run, expected, exact=True)


# ---- the matrix ------------------------------------------------------------------------------------------------------

# Few rows: Triton's interpreter takes a second for them
DOCTOR: dict[str, Callable[[], list[Call]]] = {
    "token_stats": lambda: [
        on_logits(8, 257, dtype, gradient=True, hard=True, temperature=0.7) for dtype in (FP32, BF16)
    ],
    "linear_token_stats": lambda: [
        from_hidden(8, 24, 257, FP32, gradient=False, hard=True, temperature=0.7),
        from_hidden(8, 24, 257, FP32, gradient=True, hard=True, temperature=0.7, memory_budget=10_000),
        from_hidden(8, 24, 257, BF16, gradient=False, hard=True, temperature=0.7),
    ],
    "token_covariance": lambda: [covariance(1000)],
    "clip_cov_mask": lambda: [by_key(1000)],
    "kl_cov_mask": lambda: [by_value(1000)],
    "budget_mask": lambda: [by_budget(1000)],
}

_STATISTICS = ("token_stats", "linear_token_stats")
_SELECTION = ("clip_cov_mask", "kl_cov_mask")
_BUDGET = ("budget_mask",)
_ROW_BYTES = (20_000, 40_000, 140_000)  # few rows of them take clusters of 2, 4 and 8 blocks with bulk copies
_TOKENS = (700, 5000, 12_000, 30_000, 60_000)  # covariances as clusters of 1, 2, 4, 8 and 16 blocks
_GRID = 600_001  # more than the registers of 132 multiprocessors hold


def _cuda() -> Iterable[tuple[str, tuple[str, ...], Callable[[], list[Call]]]]:
    yield "forward-plain", _STATISTICS, lambda: forward_calls((1, 300), 97)
    yield "forward-bulk", _STATISTICS, lambda: forward_calls((300,), 9001)
    yield "forward-clusters", _STATISTICS, _clusters
    # states that meet in memory: strided columns take no bulk copies
    yield "forward-parts", _STATISTICS, lambda: forward_calls((2,), 40_000, layout="strided")
    yield "forward-misaligned", _STATISTICS, lambda: forward_calls((2, 300), 9001, layout="misaligned")
    yield "fp64", _STATISTICS, _doubles
    yield "backward-aligned", _STATISTICS, lambda: backward_calls((96, 9000))
    # logits and gradient off the 16 bytes by as much, and by different amounts
    yield "backward-misaligned", _STATISTICS, lambda: backward_calls((203, 9001), ("contiguous", "misaligned"))
    yield "backward-strided", _STATISTICS, lambda: backward_calls((203,), ["strided"])
    yield "backward-in-place", _STATISTICS, _in_place
    yield "linear", ("linear_token_stats",), lambda: _linear(*DTYPES)
    yield "covariance", ("token_covariance",), lambda: [covariance(n) for n in (*_TOKENS, _GRID)]
    yield "selection-small", _SELECTION, lambda: _selections(*_TOKENS)
    yield "selection-grid", _SELECTION, lambda: _selections(_GRID)
    yield "budget", _BUDGET, lambda: [by_budget(n) for n in (*_TOKENS, _GRID)]
    yield "selection-steps", (*_SELECTION, *_BUDGET, "token_covariance"), lambda: [selection_steps(5000)]


def _triton() -> Iterable[tuple[str, tuple[str, ...], Callable[[], list[Call]]]]:
    for dtype in DTYPES:  # apart, because each instance is compiled first
        name = str(dtype)[6:]
        yield f"forward-{name}", _STATISTICS, functools.partial(_triton_forward, dtype)
        yield f"backward-{name}", _STATISTICS, functools.partial(_triton_backward, dtype)
        yield f"linear-{name}", ("linear_token_stats",), functools.partial(_linear, dtype)
    tokens = (1, 700, 30_000)
    yield "covariance", ("token_covariance",), lambda: [covariance(n) for n in tokens]
    yield "selection", _SELECTION, lambda: _selections(*tokens)
    yield "budget", _BUDGET, lambda: [by_budget(n) for n in tokens]


def _selections(*tokens: int) -> list[Call]:
    return [call(n) for n in tokens for call in (by_value, by_key)]


def _clusters() -> list[Call]:
    kinds = itertools.product(_ROW_BYTES, DTYPES)
    return [call for size, dtype in kinds for call in forward_calls((1, 3), size // dtype.itemsize, [dtype])]


def _doubles() -> list[Call]:
    return [
        on_logits(rows, vocab, FP64, gradient=True, softcap=softcap, function=function)
        for (rows, vocab), softcap in itertools.product(((3, 500), (2, 20_001)), (None, 20.0))
        for function in ("token_stats", "logprob_entropy")
    ]


def _in_place() -> list[Call]:
    return [
        *backward_calls((9000, 203), inplace_backward=True),
        *backward_calls((203,), ("misaligned", "strided"), inplace_backward=True),
    ]


def _triton_forward(dtype: torch.dtype) -> list[Call]:
    return [
        *forward_calls((3,), 97, [dtype]),
        *forward_calls((2,), 9001, [dtype]),
        on_logits(300, 9000, dtype),
        on_logits(1, 40_000, dtype),
        on_logits(2, 9001, dtype, layout="misaligned"),
        on_logits(2, 203, dtype, layout="strided"),
    ]


def _triton_backward(dtype: torch.dtype) -> list[Call]:
    return [
        on_logits(rows, vocab, dtype, gradient=True, layout=layout, softcap=softcap, inplace_backward=inplace)
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


def compare(call: Call, device: str, backend: str) -> tuple[str, float]:
    """What is wrong, or "", and the largest error as a share of what is allowed."""
    got = [result.cpu() for result in call.run(device, backend)]
    wrong, share = difference(got, call.expected(), call.exact, call.sums)
    # of a mask the reference has the bits, too
    in_bits = call.exact and any(result.is_floating_point() for result in got)
    if in_bits and not wrong and (device, backend) != ("cpu", "torch"):
        for i, (ours, bits) in enumerate(zip(got, call.run("cpu", "torch"), strict=True)):
            if not torch.equal(ours, bits):
                return f"result {i}: {int((ours != bits).sum())} of {ours.numel()} differ from plain torch's", math.inf
    return wrong, share


def difference(
    got: Sequence[Tensor], expected: Sequence[Tensor], exact: bool = False, sums: bool = False
) -> tuple[str, float]:
    """The same of results (of the dtypes that are to be judged) and what they should be (bool or float64)."""
    share = 0.0
    for i, (ours, right) in enumerate(zip(got, expected, strict=True)):
        if ours.dtype == torch.bool:
            if not torch.equal(ours, right):
                return f"result {i}: {int((ours != right).sum())} of {ours.numel()} differ", math.inf
            continue
        off = (ours.double() - right.double()).abs()
        # NaN is wrong; an infinity is right where it has to be one
        off = torch.where(ours.double() == right, 0.0, off).nan_to_num(math.inf)
        if not off.numel():
            continue
        error = off / _allowed(right.double().abs(), ours.dtype, exact, sums)
        share = max(share, float(error.amax()))
        if share > 1:
            scale, wrong = float(right.abs().amax()), error > 1
            worst = float(off[wrong].amax())
            text = f"{int(wrong.sum())} of {ours.numel()} off, by up to {worst:.3g} at a scale of {scale:.3g}"
            return f"result {i}: {text}", share
    return "", share


# of an element's own size, by the dtype that it is rounded to: half a unit in its last place, and fp32 arithmetic
_RELATIVE = {BF16: 2.0**-8 + 2e-5, FP16: 2.0**-11 + 2e-5}
_RELATIVE_OF_SUMS = {BF16: 1.6e-2, FP16: 2e-3}


def _allowed(size: Tensor, dtype: torch.dtype, exact: bool, sums: bool) -> Tensor:
    """Each element by its own size: gradients are rounded to their dtype, and most are 1/V of the largest.

    What sums in another order cancel to is a share of the largest: of a row of a gradient, of the whole of a product,
    of 1 among values that are larger.
    """
    known = size.nan_to_num(0.0, 0.0, 0.0)
    scale = known.amax(-1, keepdim=True) if size.dim() > 1 and not sums else known.amax()
    scale = scale.clamp(1e-6, math.inf if size.dim() > 1 else 1.0)
    if exact:
        return 2.0**-23 * size + 1e-12 * scale
    plain = 1e-9 if dtype == FP64 else 2e-5
    floor = plain if dtype not in _RELATIVE else torch.finfo(dtype).eps if sums else 1e-6
    return (_RELATIVE_OF_SUMS if sums else _RELATIVE).get(dtype, plain) * size + floor * scale


def run(family: Family, device: str) -> int:
    """Run a family's calls, with a JSON line before and behind each; the number of wrong ones."""
    wrong = 0
    for call in family.calls():
        print(json.dumps({"begin": call.name}), flush=True)
        start = time.perf_counter()
        found, _ = compare(call, device, family.backend)
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

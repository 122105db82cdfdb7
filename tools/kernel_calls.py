"""Calls that reach every variant of our GPU kernels once: small ones for compute-sanitizer, large ones for a profiler.

``python tools/kernel_calls.py small`` compares each result with the torch backend on the CPU, so that a kernel that is
only right by luck fails here too; exit code 1 if one differs. ``large`` only runs. Which sizes take which path (bulk
copies, clusters, parts that meet in memory, cooperative grids) is decided in csrc/cuda; docs/gpu.md has the table.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import entropy_kernels as ek
from entropy_kernels.backends import native, radix_select
from entropy_kernels.backends.policy_names import Selected
from entropy_kernels.backends.radix_select import Band, Count

BACKENDS = ("cuda", "triton")
Results = tuple[Tensor, ...]


class Call(NamedTuple):
    """``run(device, backend)`` on inputs of its own; ``exact``: the results are equal bit for bit on every backend."""

    name: str
    run: Callable[[str, str], Results]
    exact: bool = False
    backends: tuple[str, ...] = BACKENDS


def statistics(
    rows: int,
    vocab: int,
    dtype: torch.dtype,
    *,
    layout: str = "contiguous",
    function: str = "token_stats",
    **options: Any,
) -> Call:
    """Forward and backward. Layouts: "misaligned" rows begin off the 16 bytes, "strided" columns lie apart."""

    def run(device: str, backend: str) -> Results:
        generator = torch.Generator().manual_seed(rows + vocab)
        extra = 3 if layout == "misaligned" else 0
        wide = (3 * torch.randn(rows, vocab + extra, generator=generator)).to(device, dtype)
        if layout == "strided":
            wide = wide.t().contiguous().t()
        logits = wide[:, extra:].detach().requires_grad_()
        target = torch.randint(vocab, (rows,), generator=generator).to(device)
        target[rows // 2] = -100 if rows > 1 else target[0]
        given = logits * 1 if options.get("inplace_backward") else logits
        outputs = getattr(ek, function)(given, target, backend=backend, **options)
        # upstream gradients of stride 0, as .sum() hands them over
        (gradient,) = torch.autograd.grad(sum(output.sum() for output in outputs if output.requires_grad), logits)
        return (*(output.detach() for output in outputs), gradient)

    what = " ".join(f"{name}={value}" for name, value in options.items())
    return Call(f"{function} {rows}×{vocab} {str(dtype)[6:]} {layout} {what}".strip(), run)


def from_hidden(rows: int, features: int, vocab: int, dtype: torch.dtype, *, layout: str = "", **options: Any) -> Call:
    """Without a gradient; in Triton the product is the kernel's. Layout "odd": rows lie off the 16 bytes."""

    def run(device: str, backend: str) -> Results:
        generator = torch.Generator().manual_seed(rows + vocab)
        extra = 1 if layout == "odd" else 0
        hidden, weight = (torch.randn(n, features + extra, generator=generator) for n in (rows, vocab))
        hidden, weight = (x.to(device, dtype)[:, extra:] for x in (hidden, weight / features**0.5))
        target = torch.randint(vocab, (rows,), generator=generator).to(device)
        # rounded to the dtype of the products, sums in another order would differ in more than their last digits
        return tuple(
            ek.linear_token_stats(hidden, weight, target, backend=backend, logits_dtype=torch.float32, **options)
        )

    what = " ".join(f"{name}={value}" for name, value in options.items())
    return Call(f"from hidden {rows}×{features}×{vocab} {str(dtype)[6:]} {layout} {what}".strip(), run)


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


def selection(tokens: int) -> Call:
    """Covariance in both dtypes, masks by value and by key, an absolute and a quantile band, given indices."""

    def run(device: str, backend: str) -> Results:
        data = batch(tokens, device)
        masked, index = (data["covariance"], data["mask"]), {"token_index": data["token_index"]}
        quantile: dict[str, Any] = {"band": "quantile", "low": 0.2, "high": 0.9, "closed": True}
        return (
            ek.token_covariance(data["logprob"], data["advantages"], data["mask"], backend=backend),
            ek.token_covariance(data["logprob"].double(), data["advantages"], backend=backend),
            ek.kl_cov_mask(*masked, ratio=0.1, backend=backend),
            ek.clip_cov_mask(*masked, seed=7, exclude=data["exclude"], ratio=0.05, **index, backend=backend),
            ek.clip_cov_mask(data["covariance"], seed=7, k=tokens // 3 + 1, **quantile, backend=backend),
        )

    return Call(f"selection of {tokens} tokens", run, exact=True)


def selection_steps(tokens: int) -> Call:
    """The kernels of single steps, for batches over ranks, here of one."""

    def run(device: str, backend: str) -> Results:
        data = batch(tokens, device)
        steps: Any = native._steps if backend == "cuda" else _eager()
        masks = (data["mask"], data["exclude"], data["token_index"])
        seed, count = torch.tensor(3, device=device), Count(0.05, None, True)
        return (
            radix_select.token_covariance(steps, data["logprob"], data["advantages"], data["mask"], ""),
            radix_select.kl_cov_mask(steps, data["covariance"], *masks, count, ""),
            radix_select.clip_cov_mask(
                steps, data["covariance"], *masks, seed, count, Band(0.2, 0.9, True, False), ""
            ),
        )  # fmt: skip

    return Call(f"single steps on {tokens} tokens", run, exact=True, backends=("cuda",))


def _eager() -> Any:
    from entropy_kernels.backends.eager import selection

    return selection


def fused_loss(tokens: int) -> Call:
    """The operator below the losses: plain PPO, Clip-Cov with both kinds of band, KL-Cov."""

    def run(device: str, backend: str) -> Results:
        data = batch(tokens, device)
        seed, coefficient = torch.tensor(5, device=device), torch.tensor(0.7, device=device)
        old = data["logprob"] + 0.1 * data["advantages"].sign()
        results: list[Tensor] = []
        for kind, selects, clip, exclude, band in (
            (Selected.UNCHANGED, False, False, False, (0.0, 0.0, False, False)),
            (Selected.DROPPED, True, True, True, (0.05, 2.0, False, False)),
            (Selected.DETACHED, True, True, False, (0.3, 0.9, True, True)),
            (Selected.PENALISED, True, False, False, (0.0, 0.0, False, False)),
        ):
            results += torch.ops.entropy_kernels.policy_loss(
                data["logprob"], old, data["advantages"], data["mask"], None, None, data["token_index"],
                seed if clip else None, coefficient if kind == Selected.PENALISED else None, 0.8, 1.2, 3.0, int(kind),
                selects, exclude, 1, False, 0.05 if selects else None, None, True, *band, backend,
            )  # fmt: skip
        return tuple(results)

    return Call(f"fused policy loss of {tokens} tokens", run)


def small() -> Iterator[Call]:
    """Every kernel, and every way that its blocks share work, at the smallest size that takes it."""
    bf16, fp16, fp32, fp64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
    # plain loads, bulk copies; all instances of dtype, softcap and second moments
    for dtype, vocab, softcap in itertools.product((bf16, fp16, fp32), (97, 9001), (None, 20.0)):
        for function in ("token_stats", "logprob_entropy"):
            yield statistics(3, vocab, dtype, function=function, softcap=softcap, temperature=0.7)
    for function, softcap in itertools.product(("token_stats", "logprob_entropy"), (None, 20.0)):
        yield statistics(3, 500, fp64, function=function, softcap=softcap)._replace(backends=("cuda",))
    # bulk copies of whole rows, which takes enough of them; rows in parts: clusters of 2, 4 and 8 with bulk copies,
    # through memory with strided columns, and with doubles
    yield statistics(300, 9001, bf16)
    for vocab in (10_000, 20_000, 40_000, 70_000):
        yield statistics(1, vocab, bf16)
    yield statistics(2, 40_000, fp32, layout="strided")
    yield statistics(2, 20_001, fp64)._replace(backends=("cuda",))
    # misaligned rows, in one part and in several; strided columns; gradients over the logits
    for vocab in (203, 40_001):
        yield statistics(2, vocab, bf16, layout="misaligned")
        yield statistics(2, vocab, fp32, layout="misaligned", inplace_backward=True)
    yield statistics(5, 203, fp16, layout="strided", inplace_backward=True)
    # products with the statistics in their epilogue: copies of blocks, loads, one and several tiles and parts
    for dtype, rows, layout in itertools.product((bf16, fp16, fp32), (7, 200), ("", "odd")):
        yield from_hidden(rows, 136, 1001, dtype, layout=layout, softcap=None if layout else 20.0)
    # clusters of 1, 2, 4, 8 and 16 blocks; a cooperative grid
    for tokens in (1, 700, 5000, 12_000, 30_000, 60_000, 524_289):
        yield selection(tokens)
    yield selection_steps(5000)
    for tokens in (700, 30_000, 524_289):
        yield fused_loss(tokens)


def large() -> Iterator[Call]:
    """Sizes of a training step, for a profiler: one call per kernel that matters."""
    for dtype, function in itertools.product((torch.bfloat16, torch.float32), ("logprob_entropy", "token_stats")):
        yield statistics(2048, 151_936, dtype, function=function)
    yield statistics(64, 151_936, torch.bfloat16)
    yield from_hidden(2048, 4096, 151_936, torch.bfloat16)
    for tokens in (1 << 16, 1 << 22):
        yield selection(tokens)
        yield fused_loss(tokens)


SETS = {"small": small, "large": large}


def difference(got: Sequence[Tensor], expected: Sequence[Tensor], exact: bool) -> str:
    """What differs, or ""."""
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        a = a.cpu()
        if exact and not torch.equal(a, b):
            return f"result {i}: {int((a != b).sum())} of {a.numel()} differ"
        # gradients are rounded to their dtype; a wrong term is off by far more
        tolerance = {torch.bfloat16: 2e-2, torch.float16: 3e-3}.get(a.dtype, 2e-5)
        scale = b.double().abs().amax().item() if b.numel() else 0.0
        error = (a.double() - b.double()).abs().amax().item() if b.numel() else 0.0
        if not error <= tolerance * max(scale, 1e-6):
            return f"result {i}: off by {error:.3g} at a scale of {scale:.3g}"
    return ""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a set; 1 if a result is wrong."""
    parser = argparse.ArgumentParser(prog="kernel_calls", description=__doc__.splitlines()[0])
    parser.add_argument("set", choices=SETS)
    parser.add_argument("--backend", choices=BACKENDS, action="append", help="by default both, where they can run")
    parser.add_argument("--device", default="cuda", help="default: %(default)s")
    arguments = parser.parse_args(argv)
    here = [name for name in BACKENDS if ek.backends()["token_stats"][name] == "available"]
    ran = wrong = 0
    for call in SETS[arguments.set]():
        expected: Results | None = None
        for backend in arguments.backend or here:
            if backend not in here or backend not in call.backends:
                continue
            got = call.run(arguments.device, backend)
            ran += 1
            if arguments.set == "large":
                continue
            if expected is None:
                expected = call.run("cpu", "torch")
            found = difference(got, expected, call.exact) if expected else ""
            wrong += bool(found)
            print(f"{'WRONG' if found else 'ok':5} {backend:6} {call.name} {found}", flush=True)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    print(f"{ran} calls, {wrong} wrong")
    return 1 if wrong or not ran else 0


if __name__ == "__main__":
    sys.exit(main())

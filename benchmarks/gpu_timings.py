"""Times our kernels on a GPU, the most telling calls first: a JSON line for each, as soon as it is known.

    python -m benchmarks.gpu_timings --seconds 50 [--only forward,selection]
    python -m benchmarks.gpu_timings --profile    # one large call of each CUDA kernel, untimed, for Nsight Compute

Only what `entropy-kernels verify` found right here is timed, and only after the result of this very call was found
right too. Calls and caches are warm; CUDA events time them behind a kernel that hides the host (benchmarks/timing.py).
``of_copy`` says how near a call comes to a copy of the same logits, covariances or log-probs, ``of_product`` how near
to its matrix products alone. Triton kernels run on their default tiles.
"""

# ruff: noqa: E402  (the clock starts before torch is imported)
from __future__ import annotations

import time

START = time.monotonic()

import argparse
import functools
import gc
import itertools
import json
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

import entropy_kernels as ek
from benchmarks import checks
from benchmarks.cases import BatchShape, Case, HiddenShape, Inputs, LogitsShape, TokensShape, make_inputs
from benchmarks.measure import DeviceLost, replay, same_bits, tensors_in
from benchmarks.ours import LOSS_OPTIONS as LOSSES
from benchmarks.ours import OURS, REGISTRY, SELECTION, Implementation, Prepared, always, fits, loss, plain
from benchmarks.timing import AHEAD, calls_between_events, cuda_clock, host_seconds_of, least_traffic, summarise
from entropy_kernels._console import print_table
from entropy_kernels.backends import native, registry, verdict

ROOFLINE = "roofline"  # the group of copies, reads and products, which the others are measured by
SAMPLES, WARM = 12, 2
STOP = 1.0  # seconds before the end at which a run stops, whatever it is doing
BF16, FP32, K = torch.bfloat16, torch.float32, 1024
ROWS, VOCABS = (8192, 1, 64, 600), (128256, 151936, 32000, 248320, 151937)  # the last one misaligns rows
WAYS = {"cluster": ("cluster_tokens", 2**62), "grid": ("cluster_tokens", 0)}  # of the covariance
CLUSTER_AT_MOST = 512 * K  # tokens: far beyond where a grid is faster
ORDERS = {"": None, ", rows reversed": ("backward_reversed", 1)}
#: What must be verified for an op of the benchmark, where that is not an op of the same name.
NEEDS: dict[str, tuple[str, ...]] = dict.fromkeys(
    ("logprob_entropy", "logprob_entropy_bwd", "logprob_entropy_fwdbwd"), ("token_stats",)
)
NEEDS |= {"policy_loss": ("token_covariance",), "kl_cov_loss": ("token_covariance", "kl_cov_mask")}
NEEDS["clip_cov_loss"] = ("token_covariance", "clip_cov_mask")
NEEDS |= {"linear_logprob_entropy": ("linear_token_stats",)}
NEEDS |= {"linear_clip_cov_loss": ("linear_token_stats", *NEEDS["clip_cov_loss"])}


class Timed(NamedTuple):
    output: Any
    bytes: int
    seconds: float


@dataclass
class Run:
    """Times calls and tells of them. ``scale`` divides sizes, for a rehearsal."""

    device: torch.device
    groups: Sequence[str]
    scale: int = 1
    now: str = ""
    lines: list[dict[str, Any]] = field(default_factory=list)
    _lock: Any = field(default_factory=threading.RLock)

    def tell(self, line: dict[str, Any]) -> None:
        with self._lock:
            self.lines.append(line)
            print(json.dumps(line), flush=True)

    def case(self, kind: Callable[..., Any], *sizes: int, dtype: torch.dtype = FP32) -> Case:
        return Case(kind(*(max(1, size // self.scale) for size in sizes)), dtype, self.device)

    def has_room(self, case: Case, copies: float) -> bool:
        """For so many fp32 tensors of the size of the logits."""
        reason = fits(case, copies)
        if reason is not None:
            self.tell({"timing": str(case), "skipped": reason})
        return reason is None

    def time(
        self, group: str, case: Case, inputs: Inputs, implementation: Implementation, backend: str = "torch",
        variant: str = "", *, beside: Timed | None = None, same_as: Timed | None = None, bytes: int | None = None,
        switch: tuple[str, int] | None = None, graph: bool = False,
    ) -> Timed | None:  # fmt: skip
        """Time an implementation if its result is right; None if it is not timed.

        Args:
            beside: the copy or the products that it is measured by.
            same_as: whose result its own equals bit for bit.
            switch: of native.set_cuda_switch.
            graph: time replays of the call, captured.
        """
        if group not in self.groups:
            return None
        op, shape = implementation.op, [size for size in vars(case.shape).values() if isinstance(size, int)]
        variant = implementation.name if group == ROOFLINE else variant
        self.now = f"{op} {'×'.join(map(str, shape))} {case.dtype_name} {backend} {variant}".strip()
        line: dict[str, Any] = {"timing": self.now, "group": group, "op": op, "backend": backend, "variant": variant}
        line |= {"shape": shape, "dtype": case.dtype_name}
        for need in NEEDS.get(op, (op,)):
            if reason := registry.skipped(need, backend, self.device):
                self.tell({**line, "skipped": f"{need}: {reason}"})
                return None
        before = None
        try:
            before = native.set_cuda_switch(*switch) if switch else None
            prepared = implementation.make(case, inputs)
            if prepared.reset is not None:
                prepared.reset()
            output = prepared.call()
            wrong = checks.check(implementation, case, inputs, output).failures
            pairs = (tensors_in(output), tensors_in(same_as.output)) if same_as else ((), ())
            if wrong or not all(map(same_bits, *pairs)):
                raise ValueError(f"wrong, so not timed: {'; '.join(wrong) or 'differs from its other variant'}")
            samples, more = self._samples(prepared, graph)
        except Exception as error:
            self.failed(line, error)
            return None
        finally:
            if switch and before is not None:
                native.set_cuda_switch(switch[0], before)
        found = summarise(samples)
        moved = least_traffic(op, implementation.name, case).total if bytes is None else bytes
        line |= {"samples_us": [round(1e6 * seconds, 2) for seconds in samples], **more}
        line |= {f"{name}_us": round(1e6 * getattr(found, name), 2) for name in ("median", "p10", "p90")}
        line |= {"spread": round(found.spread, 3), "bytes": moved, "gbps": round(1e-9 * moved / found.median, 2)}
        if beside is not None:
            product = isinstance(case.shape, HiddenShape)
            ratio = beside.seconds / found.median * (1 if product else moved / beside.bytes)
            line["of_product" if product else "of_copy"] = round(ratio, 3)
        self.tell(line)
        return Timed(output, moved, found.median)

    def _samples(self, prepared: Prepared, graph: bool) -> tuple[list[float], dict[str, Any]]:
        """Seconds; how many calls stand between two events, what one takes the host, and whether that is hidden."""
        clock = cuda_clock(self.device, "hot")
        if graph:
            found = replay(lambda: prepared, self.device, clock, SAMPLES)
            if not found.equal:
                raise ValueError("wrong, so not timed: a replay's result differs from that of an eager call")
            return found.samples, {}
        host = host_seconds_of(prepared, self.device, WARM)
        count = calls_between_events(prepared, clock.time(prepared, 1, host), host)
        samples = [clock.time(prepared, count, host) for _ in range(SAMPLES)]
        return samples, {"calls": count, "host_us": round(1e6 * host, 1), "hidden": 1.5 * count * host < AHEAD}

    def failed(self, line: dict[str, Any], error: Exception) -> None:
        """Tell of it; DeviceLost if the device answers no more."""
        self.tell({**line, "error": f"{type(error).__name__}: {error}"[:500]})
        try:
            torch.cuda.synchronize(self.device)
        except RuntimeError as lost:
            raise DeviceLost(f"{self.now}: {lost}") from error

    def stop(self) -> None:
        """When time is up, from another thread: a call that compiles or hangs would not come back."""
        self._lock.acquire()  # for good: nothing comes behind this
        self.tell({"stopped": "no time left", "in": self.now})
        self.table()
        os._exit(self.code)

    def table(self) -> None:
        cells: dict[tuple[str, ...], list[str]] = {}
        for line in filter(lambda line: "timing" in line, self.lines):
            text = "skipped: " + line["skipped"] if "skipped" in line else line.get("error", "")
            if "median_us" in line:
                of = line.get("of_copy", line.get("of_product"))
                text = f"{'×'.join(map(str, line['shape']))} {line['median_us']:.1f}" + (f" ({of:.0%})" if of else "")
            row = tuple(line.get(name, "") for name in ("op", "backend", "variant", "dtype"))
            cells.setdefault(row, []).append(text)
        title = "Median µs (share of a copy's rate, or of the products' time)"
        rows = [(*row, ", ".join(dict.fromkeys(texts))) for row, texts in cells.items()]
        if rows:
            print_table(title, rows, ("op", "backend", "variant", "dtype", "by shape"), sys.stderr)
        counts = {name: sum(name in line for line in self.lines) for name in ("median_us", "skipped", "error")}
        print("{} timings, {} skipped, {} errors".format(*counts.values()), file=sys.stderr, flush=True)

    @property
    def code(self) -> int:
        return int(any("error" in line or "lost" in line for line in self.lines))


def ours(op: str, make: Callable[..., Prepared], *arguments: Any) -> Implementation:
    """One that the benchmark does not have; ``make`` also takes a case and its inputs."""
    return Implementation(op, "ours", "ours", functools.partial(make, *arguments), always)


def copy_and_read(run: Run, tensor: Tensor) -> Timed | None:
    """Of a tensor (N, V); the copy."""
    case = Case(LogitsShape(*tensor.shape), tensor.dtype, run.device)
    copy, _ = (
        run.time(ROOFLINE, case, {"logits": tensor}, REGISTRY["logits_roofline", name]) for name in ("copy", "read")
    )
    return copy


# ---- statistics ------------------------------------------------------------------------------------------------------


def statistics(run: Run, rows: int, vocab: int, dtype: torch.dtype, backend: str) -> None:
    case, name = run.case(LogitsShape, rows, vocab, dtype=dtype), f"ours-{backend}"
    if not run.has_room(case, 7 * dtype.itemsize / 4):  # copies, gradients to compare
        return
    inputs = make_inputs(case)
    copy = copy_and_read(run, inputs["logits"])
    time = functools.partial(run.time, case=case, inputs=inputs, backend=backend, beside=copy)
    for op in ("logprob_entropy", "token_stats"):
        time("forward", implementation=REGISTRY[op, name])
    first = time("backward", implementation=REGISTRY["logprob_entropy_bwd", name])
    for order, switch in ORDERS.items() if backend == "cuda" else [("", None)]:
        for inplace, variant in enumerate(("out of place", "in place")):
            alone = ours("logprob_entropy_bwd", backward, backend, bool(inplace))
            variant += f", behind forward{order}"
            time("backward", implementation=alone, variant=variant, switch=switch, same_as=first)
        both = REGISTRY["logprob_entropy_fwdbwd", name]
        time("backward", implementation=both, variant=f"both passes{order}", switch=switch)


def backward(backend: str, inplace: bool, case: Case, inputs: Inputs) -> Prepared:
    """The backward pass alone, with what its forward pass has just left in the L2 cache."""
    graph: list[Any] = []

    def reset() -> None:
        graph.clear()
        leaf = (inputs["logits"].clone() if inplace else inputs["logits"].detach()).requires_grad_()
        outputs = ek.logprob_entropy(leaf, inputs["target"], inplace_backward=inplace, backend=backend)
        graph[:] = outputs, [leaf], [inputs["grad_logprob"], inputs["grad_entropy"]]

    return Prepared(lambda: torch.autograd.grad(*graph), reset)


# ---- batches of tokens -----------------------------------------------------------------------------------------------


def selection(run: Run, tokens: int, backend: str) -> None:
    case = run.case(TokensShape, tokens)
    inputs = make_inputs(case)
    copy = copy_and_read(run, inputs["covariance"][None])
    run.time(ROOFLINE, case, inputs, REGISTRY["tokens_roofline", "topk"])
    batch = [inputs[name] for name in SELECTION["token_covariance"][0]]
    of_batch = {**inputs, "covariance": ek.token_covariance(*batch, backend="torch")}
    time = functools.partial(run.time, "selection", case, backend=backend, beside=copy)
    for op in ("clip_cov_mask", "kl_cov_mask"):
        time(inputs, REGISTRY[op, f"ours-{backend}"])
    covariance, both = None, None
    for way, switch in WAYS.items() if backend == "cuda" else [("", None)]:
        if way == "cluster" and tokens > CLUSTER_AT_MOST:
            continue
        mine = REGISTRY["token_covariance", f"ours-{backend}"]
        found = time(inputs, mine, variant=way, switch=switch, same_as=covariance)
        covariance = covariance or found
        if found is None:
            continue
        pair = ours("clip_cov_mask", covariance_and_mask, backend)
        moved = 18 * len(inputs["mask"])  # 9 bytes read and 4 written of the covariance, 4 and 1 of the mask
        variant = f"with covariance {way}".strip()
        found = time(of_batch, pair, variant=variant, switch=switch, bytes=moved, same_as=both)
        both = both or found


def covariance_and_mask(backend: str, case: Case, inputs: Inputs) -> Prepared:
    batch = [inputs[name] for name in SELECTION["token_covariance"][0]]
    options = {**SELECTION["clip_cov_mask"][1], "backend": backend}
    return Prepared(lambda: ek.clip_cov_mask(ek.token_covariance(*batch, backend=backend), **options))


def losses(run: Run, sequences: int, how: str) -> None:
    """With their backward pass: torch's operations as they come, captured and compiled; the selection's backend."""
    case = Case(BatchShape(sequences, max(8, K // run.scale)), FP32, run.device)
    inputs = make_inputs(case)
    time = functools.partial(run.time, "losses", case, inputs, beside=copy_and_read(run, inputs["logprob"]))
    for op in LOSSES:
        named = {"ours": "torch"} if (op, "ours") in REGISTRY else {f"ours-{name}": name for name in ("cuda", "torch")}
        for name, backend in named.items():
            if how == "compiled":
                time(ours(op, loss, functools.partial(compiled, op, name)), backend, "compiled")
                continue
            time(REGISTRY[op, name], backend, "eager")
            time(REGISTRY[op, name], backend, "graph", graph=True)


def compiled(op: str, name: str, case: Case) -> Callable[..., Any]:
    options = {**LOSSES[op], **({} if name == "ours" else {"backend": OURS[name]})}

    def of_batch(*batch: Tensor) -> Any:
        return getattr(ek, op)(*batch, **options)

    of_batch.__code__ = of_batch.__code__.replace()  # one of its own: other sizes are no recompilations of it
    return torch.compile(of_batch, dynamic=False)


# ---- products --------------------------------------------------------------------------------------------------------


def products(run: Run, rows: int, features: int, vocab: int) -> None:
    case = run.case(HiddenShape, rows, features, vocab, dtype=BF16)
    if not run.has_room(case, 5):  # logits, head and its gradients, the head in fp64 for the check
        return
    inputs = make_inputs(case)
    one, three = (
        run.time(ROOFLINE, case, inputs, REGISTRY["linear_roofline", n]) for n in ("product", "three products")
    )
    for variant, budget in {"default budget": None, "3 GiB": 3 << 30, "1 GiB": 1 << 30}.items():
        options = {**LOSSES["clip_cov_loss"], "method": "clip_cov", "memory_budget": budget, "backend": "cuda"}
        function = functools.partial(ek.linear_policy_loss, **options)
        call = ours("linear_clip_cov_loss", loss, plain(function))
        run.time("linear", case, inputs, call, "cuda", variant, beside=three)
    run.time("linear", case, inputs, REGISTRY["linear_logprob_entropy", "ours-cuda"], "cuda", beside=one)


# ---- the whole -------------------------------------------------------------------------------------------------------

GROUPS = {statistics: ("forward", "backward"), selection: ("selection",), losses: ("losses",), products: ("linear",)}
EVERY = list(itertools.chain(*GROUPS.values()))


def steps() -> Iterator[tuple[Any, ...]]:
    """Functions and what they take. After a few there is something of every group; what compiles long comes last."""
    yield statistics, ROWS[0], VOCABS[0], BF16, "cuda"
    yield selection, 64 * K, "cuda"
    yield losses, 64, "eager"
    yield products, 8192, 4096, 128256
    yield statistics, ROWS[0], VOCABS[0], BF16, "triton"
    yield selection, 64 * K, "triton"
    yield from ((selection, tokens * K, "cuda") for tokens in (512, 128, 256, 4096))
    yield from ((losses, sequences, "eager") for sequences in (8, 512))
    every = itertools.product((BF16, FP32), ROWS, VOCABS)
    yield from ((statistics, rows, vocab, dtype, "cuda") for dtype, rows, vocab in itertools.islice(every, 1, None))
    yield statistics, ROWS[0], VOCABS[-1], BF16, "triton"
    yield statistics, 64, VOCABS[0], BF16, "triton"
    yield selection, 4096 * K, "triton"
    yield from ((losses, sequences, "compiled") for sequences in (64, 8, 512))


def profile(device: torch.device, scale: int) -> None:
    """Few kernels beside ours: under a profiler each costs time."""
    logits = torch.randn(4096 // scale, VOCABS[0] // scale, dtype=BF16, device=device).requires_grad_()
    upstream = torch.ones(len(logits), device=device)
    outputs = ek.token_stats(logits, torch.zeros_like(upstream, dtype=torch.int64), backend="cuda")
    torch.autograd.grad(outputs[:2], [logits], [upstream, upstream])
    for tokens, op in itertools.product((64 * K, 4096 * K), ("clip_cov_mask", "kl_cov_mask")):
        getattr(ek, op)(torch.randn(tokens // scale, device=device), **SELECTION[op][1], backend="cuda")
    torch.cuda.synchronize(device)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="gpu_timings", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=50, help="of the whole run; default: %(default)s")
    parser.add_argument("--only", default=",".join(EVERY), help="groups of timings; default: %(default)s")
    parser.add_argument("--list", action="store_true", help="what would be timed, in that order")
    parser.add_argument("--profile", action="store_true", help="one large call of each CUDA kernel, untimed")
    parser.add_argument("--scale", type=int, default=1, help="divide all sizes, for a rehearsal; default: %(default)s")
    given = parser.parse_args(argv)
    only = given.only.split(",")
    if unknown := sorted({*only} - {*EVERY}):
        parser.error(f"--only: expected some of {', '.join(EVERY)}, got {', '.join(unknown)}")
    wanted = {
        " ".join(str(word).removeprefix("torch.") for word in (function.__name__, *arguments)): (function, arguments)
        for function, *arguments in steps()
        if {*GROUPS[function]} & {*only}
    }
    if given.list:
        print(*wanted, sep="\n")
        return 0
    if not torch.cuda.is_available():
        parser.error("expected a GPU that torch can use, got none")
    device = torch.device("cuda", torch.cuda.current_device())
    if given.profile:
        profile(device, given.scale)
        return 0
    run = Run(device, (ROOFLINE, *only), given.scale)
    watch = threading.Timer(given.seconds - STOP - (time.monotonic() - START), run.stop)
    watch.daemon = True
    watch.start()
    run.tell({"machine": asdict(verdict.machine(device))})
    try:
        for run.now, (function, arguments) in wanted.items():
            try:
                function(run, *arguments)
                gc.collect(1)
                torch.cuda.empty_cache()
            except DeviceLost:
                raise
            except Exception as error:
                run.failed({"timing": run.now}, error)
    except DeviceLost as lost:
        run.tell({"lost": str(lost)})
    watch.cancel()
    run.table()
    return run.code


if __name__ == "__main__":
    sys.exit(main())

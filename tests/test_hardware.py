"""What only a GPU can show, of every backend: no host sync, CUDA graphs, 2³¹ logits, the same tokens as on the CPU.

Tests that CPUs run as well have the fixture `on`, and run there too; test_cuda_*.py ask what is particular to CUDA C++.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import entropy_kernels as ek
from calls import bound, same_bits, upstream
from cases import Sample, labels, normal
from conftest import BackendDevice, gpu_backend_devices, on_gpu
from loss_cases import MODES
from stub_gpu import serve_auto_with

SELECTION = ("token_covariance", "clip_cov_mask", "kl_cov_mask")
STATISTICS = ("token_stats", "linear_token_stats")


def every_backend(*ops: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("on", gpu_backend_devices(*ops))


pytestmark = pytest.mark.usefixtures("undisturbed", "forgetful_registry")

REPLAYS = 1000


@contextmanager
def no_sync() -> Iterator[None]:
    """Any wait of the host for the device is an error."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_()


# ---- everything that a training step calls, as functions of nothing --------------------------------------------------


def statistics(on: BackendDevice) -> dict[str, Callable[[], tuple[Tensor, ...]]]:
    """Calls with their gradients: functions, dtypes, layouts, temperatures; rows that are split and that are not."""
    calls: dict[str, Callable[[], tuple[Tensor, ...]]] = {}

    def add(name: str, sample: Sample, function: str = "token_stats", **options: Any) -> None:
        logits = leaf(sample.logits)
        names = ("logprob", "entropy", "collision")[: 3 if function == "token_stats" else 2]
        grads = list(upstream(sample, *names).values())

        def call() -> tuple[Tensor, ...]:
            # as after a matmul, so that an in-place gradient overwrites nothing that is needed again
            given = logits * 1 if options.get("inplace_backward") else logits
            outputs = getattr(ek, function)(given, sample.target, **sample.kwargs, **options, backend=on.backend)
            (gradient,) = torch.autograd.grad(list(outputs[: len(grads)]), logits, grads)
            return (*(output.detach() for output in outputs), gradient)

        calls[name] = call

    def sample(rows: int, vocab: int, dtype: torch.dtype = torch.bfloat16, **kwargs: Any) -> Sample:
        target = labels(rows, vocab=vocab, device="cuda")
        target[rows // 2] = -100
        return Sample(normal(rows, vocab, dtype=dtype, device="cuda"), target, kwargs)

    per_token = torch.linspace(0.5, 2, 300, device="cuda")
    add("many rows", sample(300, 9001, temperature=0.7))
    add("two statistics", sample(300, 9001, torch.float32), "logprob_entropy")
    add("one row", sample(1, 151_937, torch.float16))
    add("few rows", sample(40, 151_936, temperature=torch.tensor(0.7, device="cuda")))
    add("in place", sample(300, 9000, softcap=30.0), inplace_backward=True)
    add("temperature per token", sample(300, 203, torch.float32, temperature=per_token))
    strided = sample(4, 40_000, torch.float32, vocab_size=39_000)
    strided.target.clamp_(max=38_999)
    strided.logits = strided.logits.t().contiguous().t()
    add("strided columns, padded", strided)
    batch = Sample(
        normal(3, 8, 1500, dtype=torch.bfloat16, device="cuda")[:, 2:-1], labels(3, 5, vocab=1500, device="cuda")
    )
    batch.target = batch.target.int()
    add("sliced batch, int32", batch)
    return calls


def tokens(count: int, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    data = {
        "covariance": 2 * torch.randn(count, generator=generator),
        "logprob": -2 * torch.rand(count, generator=generator),
        "advantages": torch.randn(count, generator=generator),
        "mask": torch.rand(count, generator=generator) < 0.8,
        "exclude": torch.rand(count, generator=generator) < 0.1,
        "token_index": torch.randperm(count, generator=generator),
    }
    return {name: value.cuda() for name, value in data.items()}


def selection(on: BackendDevice) -> dict[str, Callable[[], tuple[Tensor, ...]]]:
    """Covariance and masks with every kind of band, count, seed and index; below and above what one cluster holds."""
    calls: dict[str, Callable[[], tuple[Tensor, ...]]] = {}
    seed = torch.tensor(11, device="cuda")
    for count in (3000, 60_000, 700_000):
        data = tokens(count)

        def call(data: dict[str, Tensor] = data) -> tuple[Tensor, ...]:
            backend = {"backend": on.backend}
            masked = (data["covariance"], data["mask"])
            more = {name: data[name] for name in ("exclude", "token_index")}
            quantile: dict[str, Any] = {"band": "quantile", "low": 0.2, "high": 0.9, "closed": True}
            return (
                ek.token_covariance(data["logprob"], data["advantages"], data["mask"], **backend),
                ek.token_covariance(data["logprob"].double(), data["advantages"], **backend),
                ek.clip_cov_mask(*masked, seed=7, **backend),
                ek.clip_cov_mask(*masked, seed=seed, k=100, **more, **backend),
                ek.clip_cov_mask(*masked, seed=seed, ratio=0.3, **quantile, **backend),
                ek.kl_cov_mask(*masked, **backend),
                ek.kl_cov_mask(data["covariance"].round(), k=500, **more, **backend),
            )

        calls[f"{count} tokens"] = call
    return calls


def losses(on: BackendDevice) -> dict[str, Callable[[], tuple[Tensor, ...]]]:
    """Every loss and preset with its metrics and gradients. Selections inside them are "auto": see serve_auto_with."""
    data = {name: value.view(256, 64) for name, value in tokens(256 * 64, seed=1).items()}
    data["mask"][3] = False
    old = data["logprob"] + 0.2 * torch.randn_like(data["logprob"])
    number = torch.tensor(5000, device="cuda")
    options: dict[str, tuple[Any, dict[str, Any]]] = {
        "policy": (ek.policy_loss, {"dual_clip": 3.0, "kl_estimator": "k3+", "batch_num_tokens": number}),
        "clip_cov verl": (ek.clip_cov_loss, {"seed": 3, "ratio": 0.01, "low": 0.1}),
        "clip_cov paper": (ek.clip_cov_loss, {"preset": "paper", "seed": torch.tensor(3, device="cuda"), "low": 0.1}),
        "clip_cov quantile": (ek.clip_cov_loss, {"seed": 3, "band": "quantile", "low": 0.2, "high": 0.9}),
        "clip_cov given": (ek.clip_cov_loss, {"dropped": data["exclude"]}),
        "kl_cov verl": (ek.kl_cov_loss, {"ratio": 0.02, "penalty_estimator": "k2"}),
        "kl_cov paper": (ek.kl_cov_loss, {"preset": "paper", "kl_coef": torch.tensor(0.5, device="cuda")}),
        "kl_cov given": (ek.kl_cov_loss, {"penalized": data["exclude"]}),
    }
    calls: dict[str, Callable[[], tuple[Tensor, ...]]] = {}
    for number_of, (name, (function, more)) in enumerate(options.items()):
        logprob, entropy = leaf(data["logprob"]), leaf(data["covariance"].abs())

        def call(
            function: Any = function, more: dict[str, Any] = more, logprob: Tensor = logprob, entropy: Tensor = entropy,
            mode: str = MODES[number_of % len(MODES)],
        ) -> tuple[Tensor, ...]:  # fmt: skip
            out = function(
                logprob, old, data["advantages"], data["mask"], entropy=entropy, entropy_coef=0.01,
                ref_logprob=old, ref_kl_coef=0.02, loss_agg_mode=mode, **more,
            )  # fmt: skip
            gradients = torch.autograd.grad(out.loss, [logprob, entropy])
            return (out.loss.detach(), *out.metrics.values(), *gradients)

        calls[name] = call
    return calls


# what a training step calls -> the ops that it is about
KINDS = {statistics: STATISTICS, selection: SELECTION, losses: SELECTION}
every_kind = pytest.mark.parametrize(
    ("kind", "on"),
    [
        pytest.param(kind, *param.values, marks=param.marks, id=param.id)
        for kind, ops in KINDS.items()
        for param in gpu_backend_devices(*ops, name=f"-{kind.__name__}")
    ],
)


@pytest.fixture
def calls(kind: Any, on: BackendDevice, monkeypatch: pytest.MonkeyPatch) -> dict[str, Callable[[], tuple[Tensor, ...]]]:
    serve_auto_with(monkeypatch, on.backend)
    return kind(on)


@every_kind
def test_no_path_waits_for_the_device(calls: dict[str, Callable[[], tuple[Tensor, ...]]]) -> None:
    for name, call in calls.items():
        call()  # compiles, and asks the device what it can
        with no_sync():
            try:
                call()
            except RuntimeError as error:
                raise AssertionError(f"{name}: {error}") from error


# a thousand replays of torch's hundred small kernels, on a device that other processes share
@pytest.mark.timeout(120, method="thread")
@every_kind
def test_replays_of_a_graph_equal_the_call_bit_for_bit(calls: dict[str, Callable[[], tuple[Tensor, ...]]]) -> None:
    """A thousand replays, back to back, of all calls in one graph; outputs are overwritten in between now and then."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls.values():
            call()
    torch.cuda.synchronize()
    expected = [[output.clone() for output in call()] for call in calls.values()]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = [call() for call in calls.values()]
    different = torch.zeros((), dtype=torch.int64, device="cuda")
    for replay in range(REPLAYS):
        check = replay % 50 == 0 or replay == REPLAYS - 1
        if check:
            for output in (output for outputs in captured for output in outputs):
                output.fill_(1 if output.dtype == torch.bool else torch.nan)
        graph.replay()
        if check:
            for outputs, wanted in zip(captured, expected, strict=True):
                for output, right in zip(outputs, wanted, strict=True):
                    different += ((output != right) & ~(output.isnan() & right.isnan())).sum()
    assert int(different) == 0
    for name, outputs, wanted in zip(calls, captured, expected, strict=True):
        assert all(same_bits(a, b) for a, b in zip(outputs, wanted, strict=True)), name


@every_backend(*SELECTION)
@pytest.mark.parametrize("count", [1, 5000, 524_288, 524_289, 1_000_003])
def test_selection_is_that_of_the_cpu(on: BackendDevice, count: int) -> None:
    """The same tokens and the same bits for the same seed, so that a run can move between devices."""
    there = tokens(count, seed=count)
    here = {name: value.cpu() for name, value in there.items()}
    cpu = "cpu" if ek.backends()["clip_cov_mask"]["cpu"] == "available" else "torch"
    for levels in (None, 2):
        if levels:
            for data in (there, here):
                data["covariance"] = (data["covariance"] * levels).round() / levels
        pair = ((there, on.backend), (here, cpu))
        covariances = [ek.token_covariance(d["logprob"], d["advantages"], d["mask"], backend=b).cpu() for d, b in pair]
        assert same_bits(*covariances)
        for function, options in (
            (ek.kl_cov_mask, {"ratio": 0.01}),
            (ek.clip_cov_mask, {"seed": -5, "ratio": 0.01}),
            (ek.clip_cov_mask, {"seed": 2**40, "k": 77, "band": "quantile", "low": 0.3, "high": 0.95}),
        ):
            for names in (("mask",), ("mask", "exclude", "token_index")):
                masks = [
                    function(d["covariance"], **{n: d[n] for n in names}, **options, backend=b).cpu() for d, b in pair
                ]
                assert torch.equal(*masks), (function.__name__, options, names)


@every_backend(*STATISTICS)
def test_more_than_2_31_logits(on: BackendDevice, large_memory: Callable[[float], None]) -> None:
    """Forward and the gradient in place; only the first and the last row have one, the last begins beyond 2³¹."""
    large_memory(10)
    rows, vocab = 17_000, 131_072
    assert rows * vocab > 2**31
    ends = [0, rows - 1]
    sample = Sample(normal(2, vocab, dtype=torch.bfloat16, device="cuda"), labels(2, vocab=vocab, device="cuda"))
    logits = torch.zeros(rows, vocab, dtype=torch.bfloat16, device="cuda")
    target = torch.zeros(rows, dtype=torch.int64, device="cuda")
    logits[ends], target[ends] = sample.logits, sample.target
    weight = torch.zeros(rows, device="cuda")
    weight[ends] = torch.tensor([1.0, -2.0], device="cuda")
    logits.requires_grad_()
    out = ek.logprob_entropy(logits, target, inplace_backward=True, backend=on.backend)
    references = bound(sample)
    references.check_values(logprob=out.logprob[ends], entropy=out.entropy[ends])
    assert bool((out.entropy[1:-1] - torch.tensor(float(vocab)).log()).abs().amax() < 1e-5)
    (gradient,) = torch.autograd.grad([out.logprob, out.entropy], logits, [weight, weight])
    references.check_gradient(gradient[ends], logprob=weight[ends], entropy=weight[ends])
    assert not gradient[1:-1].any()


@every_backend(*STATISTICS, *SELECTION)
def test_a_whole_step_compiles(on: BackendDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    """Head → statistics → selection → loss in one graph, by the real compiler, with the gradients of eager code."""
    serve_auto_with(monkeypatch, on.backend)
    torch._dynamo.reset()
    hidden, weight = (normal(*shape, dtype=torch.float32, device="cuda", scale=0.3) for shape in ((64, 32), (999, 32)))
    target, old = labels(64, vocab=999, device="cuda"), torch.full((4, 16), -7.0, device="cuda")
    advantages, seed = torch.linspace(-1, 1, 4, device="cuda")[:, None], torch.tensor(3, device="cuda")

    def step(hidden: Tensor, weight: Tensor, seed: Tensor) -> Tensor:
        stats = ek.logprob_entropy(hidden @ weight.t(), target, temperature=0.9, backend=on.backend)
        logprob, entropy = (value.view(4, 16) for value in stats)
        options: dict[str, Any] = {"entropy": entropy, "entropy_coef": 0.01, "seed": seed, "ratio": 0.1, "low": 0.01}
        return ek.clip_cov_loss(logprob, old, advantages, torch.ones_like(old), **options).loss

    results = []
    for function in (step, torch.compile(step, fullgraph=True)):
        inputs = [leaf(hidden), leaf(weight)]
        loss = function(*inputs, seed)
        results.append((loss.detach(), *torch.autograd.grad(loss, inputs)))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-6)


# its products are torch's: a failure says nothing of a backend's ops
@pytest.mark.parametrize("backend", [pytest.param(name, marks=on_gpu(name)) for name in ("torch", "triton", "cuda")])
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("budget", (1 << 30, 3 << 20), ids=("in one part", "in parts"))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32), ids=str)
def test_from_hidden_states(backend: str, budget: int, dtype: torch.dtype) -> None:
    """No sync, the same results in a graph that is replayed, a bounded memory; the head's gradient also in a buffer."""
    states = {op: ek.backends()[op][backend] for op in ("token_stats", *SELECTION)}
    if set(states.values()) != {"available"}:
        pytest.skip(f"backend {backend}: {states}")
    rows, features, vocab = 512, 64, 9000
    hidden, weight = (
        normal(*shape, dtype=dtype, device="cuda", scale=0.3).requires_grad_()
        for shape in ((rows, features), (vocab, features))
    )
    target = labels(rows, vocab=vocab, device="cuda")
    target[5] = -100
    old, advantages = torch.full((rows,), -9.0, device="cuda"), torch.linspace(-2, 1, rows, device="cuda")
    buffer = torch.zeros(vocab, features, device="cuda")
    seed = torch.tensor(3, device="cuda")
    options: dict[str, Any] = {"memory_budget": budget, "backend": backend}

    def call() -> list[Tensor]:
        found: list[Tensor] = []
        outputs = ek.linear_logprob_entropy(hidden, weight, target, **options)
        found += torch.autograd.grad(outputs.logprob.sum() - outputs.entropy.sum(), (hidden, weight))
        for method, more in (("ppo", {}), ("clip_cov", {"seed": seed, "low": 0.01, "ratio": 0.02}), ("kl_cov", {})):
            args = (hidden, weight, target, old, advantages, None)
            result = ek.linear_policy_loss(*args, method=method, entropy_coef=0.01, **more, **options)
            found += [result.loss.detach(), *torch.autograd.grad(result.loss, (hidden, weight))]
        buffer.zero_()
        loss = ek.linear_policy_loss(hidden, weight, target, old, advantages, None, grad_buffer=buffer, **options).loss
        return [*found, *torch.autograd.grad(loss, (hidden,)), buffer.clone()]

    call()
    with no_sync():
        expected = call()
    plan = ek.linear_plan(hidden, weight, memory_budget=budget, policy_loss=True)
    assert (plan.row_chunks > 2) == (budget < 1 << 30)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    for _ in range(3):
        graph.replay()
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-4
    for ours, right in zip(captured, expected, strict=True):
        assert (ours.float() - right.float()).norm() <= tolerance * right.float().norm()
    on_cpu = [x.detach().cpu().requires_grad_() for x in (hidden, weight)]
    loss = ek.linear_policy_loss(
        *on_cpu, target.cpu(), old.cpu(), advantages.cpu(), None, method="kl_cov", entropy_coef=0.01
    )
    for ours, right in zip(captured[9:11], torch.autograd.grad(loss.loss, on_cpu), strict=True):  # of kl_cov
        assert (ours.cpu().float() - right.float()).norm() <= 5 * tolerance * right.float().norm()


@pytest.mark.parametrize("on", gpu_backend_devices(*STATISTICS)[1:2])
def test_triton_takes_the_tilings_that_were_measured(
    on: BackendDevice, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    """By the command, on tensors of its own; whoever reads the same file gets the same bits."""
    from entropy_kernels import cli
    from entropy_kernels.backends import switches
    from entropy_kernels.backends.triton import tuning

    logits = normal(256, 32_000, dtype=torch.bfloat16, device=on.device)
    target = labels(256, vocab=32_000, device=on.device)

    def run() -> list[Tensor]:
        x = leaf(logits)
        logprob, entropy = ek.logprob_entropy(x, target, backend=on.backend)
        return [logprob, entropy, *torch.autograd.grad((logprob + entropy).sum(), x)]

    plain = run()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(switches, "TRITON_TUNE", True)
    assert cli.main(["tune", "--vocab", "32000", "--rows", "256"]) == 0
    results = []
    for _ in range(2):
        for cached in (tuning.kept, tuning._kept_one):
            cached.cache_clear()
        results.append(run())
        assert {name.partition("-")[0] for name in tuning.kept(logits.device)} == {"forward", "backward"}
    for cached in (tuning.kept, tuning._kept_one):
        cached.cache_clear()
    tuned, again = results
    assert all(same_bits(a, b) for a, b in zip(tuned, again, strict=True))
    for a, b in zip(plain, tuned, strict=True):
        torch.testing.assert_close(a, b, rtol=2**-7, atol=1e-5)


_WRONG_BOUNDARIES = """
import sys, torch, entropy_kernels as ek
lp, old, adv = (torch.zeros(12, device="cuda") for _ in range(3))
def call(ends):
    ek.policy_loss(lp, old, adv, None, cu_seqlens=ends, surrogate="gspo", loss_agg_mode="seq-mean-token-mean")

right, given = (torch.tensor(x, dtype=torch.int32, device="cuda") for x in ([0, 3, 10, 10, 12], eval(sys.argv[1])))
call(right)  # loads the kernels, for which CUDA may wait
torch.cuda._sleep(2_000_000_000)  # a second, in which the next call is launched to its end
call(given)
print("launched", flush=True)
torch.cuda.synchronize()
"""


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(
    "ends", ("[0, 3, 10, 10, 12]", "[0, 30, 10, 10, 12]", "[5, 3, 10, 10, 12]", "[0, -7, 10, 10, 12]")
)
def test_boundaries_are_asserted_on_the_device(ends: str) -> None:
    """No value is read back for it; in a process of its own, because a failed assertion is the last thing of one."""
    done = subprocess.run([sys.executable, "-c", _WRONG_BOUNDARIES, ends], capture_output=True, text=True, timeout=100)
    if ends == "[0, 3, 10, 10, 12]":
        assert done.returncode == 0, done.stderr
    else:
        assert done.returncode != 0 and "launched" in done.stdout and "assert" in done.stderr, done.stderr

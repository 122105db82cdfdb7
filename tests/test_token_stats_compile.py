"""The ops under torch's tools: opcheck, torch.compile, export, fake tensors, CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

import entropy_kernels as ek
from calls import bound, upstream
from conftest import BackendDevice
from sample import Sample, normal, plain


@pytest.fixture(autouse=True)
def fresh_dynamo() -> None:
    torch._dynamo.reset()


# ---- opcheck --------------------------------------------------------------------------------------------------------


def op_samples(on: BackendDevice, requires_grad: bool) -> list[tuple[Any, ...]]:
    """Arguments of the op: flat and batched, strided, per-token temperature, every bitmask that a function uses."""
    temperature = torch.ones(1, device=on.device)
    samples = []
    for want in (3, 15):
        logits = normal(1, 3, 17, dtype=torch.float32, device=on.device).requires_grad_(requires_grad)
        target = torch.tensor([0, -100, 16], device=on.device)
        samples.append((logits, target, temperature, 0.0, -100, 0, 17, want, False, "", on.backend))
    half = normal(2, 4, 40, dtype=torch.bfloat16, device=on.device)[:, ::2, 1:38].requires_grad_(requires_grad)
    per_token = torch.tensor([0.5, 1.0, 2.0, 3.0], device=on.device)
    target = torch.arange(4, device=on.device, dtype=torch.int32)
    samples.append((half, target, per_token, 30.0, -1, 0, 30, 15, False, "", on.backend))
    empty = torch.empty(2, 0, 17, device=on.device, requires_grad=requires_grad)
    samples.append((empty, target[:0], temperature, 0.0, -100, 0, 17, 7, False, "", on.backend))
    return samples[1:3] if on.interpreted else samples


@pytest.mark.parametrize("requires_grad", (False, True))
def test_opcheck_forward(requires_grad: bool, on: BackendDevice) -> None:
    for arguments in op_samples(on, requires_grad):
        torch.library.opcheck(torch.ops.entropy_kernels.token_stats.default, arguments)


@pytest.mark.parametrize("inplace", (False, True))
def test_opcheck_backward(inplace: bool, on: BackendDevice) -> None:
    name = "token_stats_backward_" if inplace else "token_stats_backward"
    op = getattr(torch.ops.entropy_kernels, name).default
    for logits, target, temperature, *numbers, want, _, _, backend in op_samples(on, False):
        forward = torch.ops.entropy_kernels.token_stats.default
        stats, state = forward(logits, target, temperature, *numbers, want, False, "", backend)
        grad = torch.randn_like(stats)
        torch.library.opcheck(op, (grad, logits.clone(), target, temperature, state, *numbers, want, backend))


# ---- fake tensors, export -------------------------------------------------------------------------------------------


def test_fake_tensors_have_the_shapes_and_dtypes_of_real_ones(on: BackendDevice) -> None:
    for dtype in on.dtypes:
        for shape in ((5,), (3, 5), (2, 3, 5), (2, 1, 3, 5), (0, 5)):
            sample = Sample(
                torch.zeros(shape, dtype=dtype, device=on.device),
                torch.zeros(shape[:-1], dtype=torch.long, device=on.device),
            )
            real = ek.token_stats(sample.logits, sample.target, backend=on.backend)
            with FakeTensorMode(allow_non_fake_inputs=False) as mode:
                fake = ek.token_stats(
                    mode.from_tensor(sample.logits), mode.from_tensor(sample.target), backend=on.backend
                )
            for a, b in zip(real, fake, strict=True):
                assert (a.shape, a.dtype, a.stride(), a.device) == (b.shape, b.dtype, b.stride(), b.device)


def test_export() -> None:
    class Head(torch.nn.Module):
        def forward(self, logits: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return ek.logprob_entropy(logits, target, temperature=0.7)

    sample = plain(torch.float32, "cpu", temperature=0.7)
    rows = torch.export.Dim("rows", min=2)
    program = torch.export.export(
        Head(), (sample.logits, sample.target), dynamic_shapes={"logits": {0: rows}, "target": {0: rows}}
    )
    other = plain(torch.float32, "cpu", rows=9, temperature=0.7)
    logprob, entropy = program.module()(other.logits, other.target)
    bound(other).check_values(logprob=logprob, entropy=entropy)


# ---- torch.compile --------------------------------------------------------------------------------------------------


def step(function: Callable, on: BackendDevice, **kwargs: Any) -> Callable:
    """A loss of all differentiable outputs, as a policy loss mixes them, and its gradient."""

    def loss(logits: torch.Tensor, target: torch.Tensor, temperature: Any) -> torch.Tensor:
        outputs = function(logits, target, temperature=temperature, backend=on.backend, **kwargs)
        total = outputs.logprob * 1.5 - 0.25 * outputs.entropy
        if hasattr(outputs, "collision"):
            total = total + outputs.collision + outputs.vocab_covariance.detach()
        return total.sum()

    return loss


def both(eager: Callable, compiled: Callable, sample: Sample, temperature: Any) -> None:
    """Value and gradient of the two are the same."""
    results = []
    for function in (eager, compiled):
        logits = sample.logits.clone().requires_grad_()
        value = function(logits, sample.target, temperature)
        (gradient,) = torch.autograd.grad(value, logits)
        results.append((value.detach(), gradient))
    torch.testing.assert_close(results[1][0], results[0][0])
    torch.testing.assert_close(results[1][1], results[0][1])


@pytest.mark.parametrize(
    ("function", "dtype"), ((ek.logprob_entropy, torch.bfloat16), (ek.token_stats, torch.float32)), ids=("bf16", "fp32")
)
def test_fullgraph(function: Callable, dtype: torch.dtype, on: BackendDevice) -> None:
    eager = step(function, on, softcap=30.0, vocab_size=90)
    compiled = torch.compile(eager, fullgraph=True, backend="aot_eager")
    sample = plain(dtype, on.device)
    sample.target.clamp_(max=89)
    sample.target[1] = -100
    both(eager, compiled, sample, 0.7)
    both(eager, compiled, sample, torch.tensor([0.5, 1.0, 2.0, 0.7, 3.0], device=on.device))


@pytest.mark.parametrize("shape", ((97,), (2, 1, 2, 97)), ids=str)
def test_fullgraph_shapes(shape: tuple[int, ...], on: BackendDevice) -> None:
    eager = step(ek.logprob_entropy, on)
    sample = Sample(normal(*shape, dtype=torch.float32, device=on.device), torch.full(shape[:-1], 5, device=on.device))
    both(eager, torch.compile(eager, fullgraph=True, backend="aot_eager"), sample, 0.7)


@pytest.mark.parametrize("function", (ek.logprob_entropy, ek.token_stats), ids=lambda f: f.__name__)
def test_inductor(function: Callable, on: BackendDevice, inductor: Callable) -> None:
    """One test per op with the real compiler: 3 to 4 s a graph."""
    if on.interpreted:
        pytest.skip("the interpreter has no part in what inductor generates")
    eager = step(function, on)
    both(eager, inductor(eager), plain(torch.float32, on.device), 0.7)


def test_a_new_temperature_does_not_recompile(on: BackendDevice) -> None:
    """A Python number is symbolic from its second value on (that is dynamo's one recompilation), a tensor at once."""
    if on.interpreted:
        pytest.skip("the number of graphs does not depend on the kernel, and each runs in the interpreter")
    eager = step(ek.logprob_entropy, on)
    for convert, allowed in ((float, 2), (lambda t: torch.tensor(t, device=on.device), 1)):
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(eager, fullgraph=True, backend=counter)
        for temperature in (0.7, 0.8, 0.9, 1.1, 1.2):
            both(eager, compiled, plain(torch.float32, on.device), convert(temperature))
        assert counter.frame_count <= allowed, f"{counter.frame_count} graphs for five temperatures"


def test_a_new_batch_size_recompiles_once(on: BackendDevice) -> None:
    if on.interpreted:
        pytest.skip("the number of graphs does not depend on the kernel, and each runs in the interpreter")
    eager = step(ek.logprob_entropy, on)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(eager, fullgraph=True, backend=counter)
    for rows in (3, 4, 6, 9):
        both(eager, compiled, plain(torch.float32, on.device, rows=rows), 0.7)
    assert counter.frame_count <= 2


def test_compiled_code_leaves_the_logits_alone(on: BackendDevice) -> None:
    """inplace_backward is a promise that the logits are free, not a demand: the compiler plans its own memory."""
    eager, inplace = step(ek.logprob_entropy, on), step(ek.logprob_entropy, on, inplace_backward=True)
    both(eager, torch.compile(inplace, fullgraph=True, backend="aot_eager"), plain(torch.float32, on.device), 0.7)


def test_compiled_under_no_grad(on: BackendDevice) -> None:
    sample = plain(torch.float32, on.device, temperature=0.7)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def rollout(logits: torch.Tensor, target: torch.Tensor) -> Any:
        return ek.token_stats(logits, target, temperature=0.7, backend=on.backend)

    with torch.no_grad():
        bound(sample).check_values(**rollout(sample.logits, sample.target)._asdict())


def test_compiled_with_the_matmul_before_it(on: BackendDevice) -> None:
    """The op in the middle of a graph: hidden → head → statistics → loss, gradients of hidden and head."""

    def loss(hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        out = ek.logprob_entropy(hidden @ weight.t(), target, temperature=0.9, backend=on.backend)
        return (-out.logprob - 0.01 * out.entropy).mean()

    results = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(0)
        hidden = torch.randn(6, 8, device=on.device, requires_grad=True)
        weight = torch.randn(33, 8, device=on.device, requires_grad=True)
        target = torch.arange(6, device=on.device)
        results.append(torch.autograd.grad(function(hidden, weight, target), (hidden, weight)))
    torch.testing.assert_close(results[0], results[1])


def test_activation_checkpointing(on: BackendDevice) -> None:
    """Recomputed in the backward pass: the same values and gradient."""
    from torch.utils.checkpoint import checkpoint

    loss = step(ek.token_stats, on)
    both(loss, lambda *a: checkpoint(loss, *a, use_reentrant=False), plain(torch.bfloat16, on.device), 0.7)


def test_autocast_changes_nothing(on: BackendDevice) -> None:
    sample = plain(torch.float32, on.device)
    with torch.autocast(on.device, dtype=torch.bfloat16):
        out = ek.logprob_entropy(sample.logits, sample.target, backend=on.backend)
    bound(sample).check_values(**out._asdict())


# ---- CUDA -----------------------------------------------------------------------------------------------------------


def on_gpu(on: BackendDevice) -> None:
    if on.device != "cuda":
        pytest.skip("needs a GPU")


def test_no_host_sync(on: BackendDevice, undisturbed: None) -> None:
    on_gpu(on)
    sample = plain(torch.bfloat16, "cuda", temperature=torch.ones(5, device="cuda"))
    grads = upstream(sample, "logprob", "entropy")
    logits = sample.logits.requires_grad_()
    for _ in range(2):  # the first call compiles
        torch.cuda.set_sync_debug_mode("error" if _ else "default")
        try:
            out = ek.token_stats(logits, sample.target, **sample.kwargs, backend=on.backend)
            torch.autograd.grad([out.logprob, out.entropy], logits, list(grads.values()))
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_cuda_graph(on: BackendDevice, undisturbed: None) -> None:
    on_gpu(on)
    sample = plain(torch.bfloat16, "cuda")
    temperature = torch.ones(1, device="cuda")
    static = sample.logits.clone().requires_grad_()

    def run() -> tuple[Any, torch.Tensor]:
        out = ek.token_stats(static, sample.target, temperature=temperature, backend=on.backend)
        return out, torch.autograd.grad((out.logprob + out.entropy).sum(), static)[0]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, gradient = run()
    new = normal(5, 97, dtype=torch.bfloat16, device="cuda", seed=9)
    with torch.no_grad():
        static.copy_(new)
        temperature.fill_(0.7)
    graph.replay()
    references = bound(Sample(new, sample.target, {"temperature": 0.7}))
    references.check_values(**out._asdict())
    ones = torch.ones(5, device="cuda")
    references.check_gradient(gradient, logprob=ones, entropy=ones)

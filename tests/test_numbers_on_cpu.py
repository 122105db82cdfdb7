"""Numbers beside a GPU's tensors: 0-d tensors on the CPU, which operators read without a launch and without a wait.

On a fake GPU, which counts the operations that a call asks of the device; test_cuda_selection.py has the kernels' side.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import entropy_kernels as ek
from conftest import needs_fake_gpu
from test_fake_gpu import FOLDER, run

PROGRAM = """
import torch
import entropy_kernels as ek
import interpreter
from torch.utils._python_dispatch import TorchDispatchMode

interpreter.speed_up()

class Asked(TorchDispatchMode):
    @classmethod
    def _should_skip_dynamo(cls):
        return False  # without its wrapper torch imports no compiler

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        values = [*args, *(kwargs or {}).values()]
        if any(getattr(x, "is_cuda", False) or getattr(x, "type", None) == "cuda" for x in values):
            self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))

def launches(call):
    # What makes or changes values on the device; the native kernels are called inside of our operators
    with Asked() as mode:
        mode.names = []
        call()
    views = ("view", "_unsafe_view", "detach", "unbind", "unsqueeze", "reshape", "alias", "empty", "permute")
    return [x for x in mode.names if x.split("::")[1] not in views]

logits = torch.randn(5, 9, device="cuda", requires_grad=True)
target = torch.arange(5, device="cuda")
score = torch.randn(5, 7, device="cuda")
mask = torch.rand(5, 7, device="cuda") < 0.8

def stats(backend, temperature):
    out = ek.token_stats(logits, target, temperature=temperature, backend=backend)
    return [*out, *torch.autograd.grad(out.logprob.sum() - out.collision.sum(), logits)]

def masks(backend, seed, ratio, k, low, high):
    kinds = [(band, size) for band in ("absolute", "quantile") for size in ({"ratio": ratio}, {"k": k})]
    drawn = [ek.clip_cov_mask(score, mask, seed=seed, low=low, high=high, band=band, backend=backend, **size)
             for band, size in (kinds if backend == "cuda" else kinds[1:3])]
    return [*drawn, ek.kl_cov_mask(score, mask, ratio=ratio, backend=backend),
            ek.kl_cov_mask(score, k=k, backend=backend)]

def alike(results):
    for result in results[1:]:
        for a, b in zip(results[0], result, strict=True):
            assert a.is_cuda and b.is_cuda and torch.equal(a.cpu(), b.cpu())

for backend in ("cuda", "torch", "triton"):
    numbers, cpu = (3, 0.3, 4, 0.1, 0.9), torch.device("cpu")
    tensors = [torch.tensor(x, dtype=torch.int64 if isinstance(x, int) else torch.float64) for x in numbers]
    mixed = [*tensors[:2], tensors[2].cuda(), *tensors[3:]]
    everywhere, temperatures = [x.cuda() for x in tensors], [0.7, torch.tensor(0.7), torch.tensor([0.7]).cuda()]
    temperatures += [torch.full((5,), 0.7, device="cuda"), torch.tensor(0.7).cuda()]
    places = (numbers, tensors, everywhere, mixed)
    if backend == "triton":  # whose interpreter is slow
        temperatures, places = temperatures[:3], (numbers, mixed)
    torch.cuda.set_sync_debug_mode("error")
    found = [stats(backend, t) for t in temperatures]
    chosen = [masks(backend, *given) for given in places]
    torch.cuda.set_sync_debug_mode("default")
    alike(found)
    alike(chosen)
    print(backend, int(sum(x.sum() for x in chosen[0])) > 5)

with torch.no_grad():
    for temperature in (0.7, torch.tensor(0.7)):
        asked = launches(lambda: ek.logprob_entropy(logits, target, temperature=temperature, backend="cuda"))
        assert asked == ["entropy_kernels::token_stats"], asked
for seed in (3, torch.tensor(3)):
    asked = launches(lambda: ek.clip_cov_mask(score, mask, seed=seed, k=2, backend="cuda"))
    assert asked == ["entropy_kernels::clip_cov_mask"], asked

# a temperature that is changed between the passes is that of the forward pass in both
t = torch.tensor(0.5)
out = ek.logprob_entropy(logits, target, temperature=t, backend="cuda")
t.fill_(3.0)
(got,) = torch.autograd.grad(out.entropy.sum(), logits)
out = ek.logprob_entropy(logits, target, temperature=0.5, backend="cuda")
(right,) = torch.autograd.grad(out.entropy.sum(), logits)
assert torch.equal(got.cpu(), right.cpu())

counter = ek.SeedCounter(3)
for step in range(3):
    drawn = ek.clip_cov_mask(score, seed=counter, k=3, low=-9.0, high=9.0, backend="cuda")
    same = ek.clip_cov_mask(score, seed=3 + step, k=3, low=-9.0, high=9.0, backend="cuda")
    assert torch.equal(drawn.cpu(), same.cpu())
print("no launch")
"""


@needs_fake_gpu
def test_numbers_are_the_same_wherever_they_are_and_cost_no_launch(tmp_path: Path) -> None:
    done = run(PROGRAM, tmp_path, paths=(FOLDER.parents[1], FOLDER.parent))
    assert done.stdout == "cuda True\ntorch True\ntriton True\nno launch\n", done.stderr


def test_fakes_take_a_number_on_the_cpu() -> None:
    with FakeTensorMode():
        logits, target = torch.randn(3, 9, device="cuda"), torch.zeros(3, dtype=torch.int64, device="cuda")
        for temperature in (0.7, torch.tensor(0.7)):
            out = ek.logprob_entropy(logits, target, temperature=temperature)
            assert out.logprob.device.type == "cuda" and out.entropy.shape == (3,)
        score = torch.randn(7, device="cuda")
        for number in (0.3, torch.tensor(0.3), torch.tensor(0.3, device="cuda")):
            for seed in (1, torch.tensor(1)):
                assert ek.clip_cov_mask(score, seed=seed, ratio=number).device.type == "cuda"


@pytest.mark.parametrize("name", ("temperature", "seed", "numbers"))
def test_a_number_from_elsewhere_is_named(name: str) -> None:
    temperature = torch.ones((), device="meta" if name == "temperature" else "cpu")
    seed = torch.zeros((), dtype=torch.int64, device="meta" if name == "seed" else "cpu")
    numbers = torch.zeros(4, dtype=torch.float64, device="meta" if name == "numbers" else "cpu")
    ops = torch.ops.entropy_kernels
    with pytest.raises(ValueError, match=f"{name}: expected on cpu, got meta"):
        if name == "temperature":
            ops.token_stats(
                torch.randn(1, 2, 9), torch.zeros(2).long(), temperature, 0.0, -100, 0, 9, 3, False, "", "auto"
            )
        else:
            ops.clip_cov_mask(
                torch.randn(5), None, None, None, seed, numbers, None, None, True, 0.0, 1.0, False, False, "", "auto"
            )


@pytest.mark.parametrize("device", ("cpu", "meta"))
def test_only_a_0d_temperature_is_a_number(device: str) -> None:
    logits, target = torch.randn(1, 2, 9, device="meta"), torch.zeros(2, dtype=torch.int64, device="meta")
    rest = (0.0, -100, 0, 9, 3, False, "", "auto")
    op = torch.ops.entropy_kernels.token_stats
    assert op(logits, target, torch.ones((), device=device), *rest)[0].shape == (2, 2)
    with pytest.raises(ValueError, match="temperature: expected on meta, got cpu"):
        op(logits, target, torch.ones(1), *rest)


def test_an_operator_takes_a_number() -> None:
    """As opcheck sees it: schema, fake and autograd."""
    logits = torch.randn(1, 3, 9, requires_grad=True)
    arguments = (logits, torch.arange(3), torch.tensor(0.7), 0.0, -100, 0, 9, 3, False, "", "auto")
    torch.library.opcheck(torch.ops.entropy_kernels.token_stats.default, arguments)
    as_row = (*arguments[:2], torch.tensor([0.7]), *arguments[3:])
    for number, row in zip(*(torch.ops.entropy_kernels.token_stats(*x) for x in (arguments, as_row)), strict=True):
        assert torch.equal(number, row)

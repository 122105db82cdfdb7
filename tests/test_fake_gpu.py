"""The pretended GPU is as strict as a real one: what it is for is to fail where a GPU would."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).resolve().parent.parent / "tools" / "gpu_pretence.py"
PROGRAM = """
import torch
import entropy_kernels as ek

def refused(call, words):
    try:
        call()
    except (RuntimeError, TypeError) as error:
        assert words in str(error), error
    else:
        raise AssertionError(f"expected an error: {words}")

x = torch.randn(3, 9, device="cuda", requires_grad=True)
target = torch.tensor([1, 2, 3], device="cuda")
assert x.is_cuda and not x.cpu().is_cuda and torch.zeros_like(x).device == target.device == x.device
assert (x + torch.tensor(1.0)).is_cuda  # a number on the CPU may join
refused(lambda: x + torch.ones(9), "same device")
refused(lambda: x.detach().numpy(), "numpy")
refused(lambda: torch.rand(2, device="cuda", generator=torch.Generator()), "generator")

def results(backend, logits, target):
    out = ek.logprob_entropy(logits, target, backend=backend)
    return [*out, *torch.autograd.grad(out.logprob.sum() - out.entropy.sum(), logits)]

expected = results("torch", x.detach().cpu().requires_grad_(), target.cpu())
for backend in ("torch", "cuda"):
    for got, right in zip(results(backend, x, target), expected, strict=True):
        assert got.is_cuda
        torch.testing.assert_close(got.cpu(), right)

torch.cuda.set_sync_debug_mode("error")
results("cuda", x, target)
for wait in (lambda: x.sum().item(), lambda: x[x > 0], lambda: x.cpu(), lambda: torch.tensor(1.0, device="cuda"),
             lambda: bool((x > 0).any()), lambda: torch.ones(3).cuda(), lambda: x[[0, 1]]):
    refused(wait, "synchronizing")
torch.cuda.set_sync_debug_mode("default")

graph, held = torch.cuda.CUDAGraph(), torch.zeros(3, device="cuda")
with torch.cuda.graph(graph):
    refused(lambda: held.sum().item(), "capturing")
    doubled = held * 2
    held += 1
graph.replay()
assert held.tolist() == [2.0] * 3 and doubled.tolist() == [2.0] * 3
print("as a GPU")
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_what_a_gpu_refuses_is_refused(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    done = subprocess.run([sys.executable, TOOL, program], capture_output=True, text=True, cwd=TOOL.parent.parent)
    assert done.returncode == 0 and done.stdout.endswith("as a GPU\n"), done.stderr

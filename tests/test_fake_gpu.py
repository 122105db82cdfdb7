"""The fake GPU is as strict as a real one: what it is for is to fail where a GPU would. Faults can be planted."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from conftest import needs_fake_gpu
from stub_gpu import run_on_fake_gpu

FOLDER = Path(__file__).resolve().parent / "fake_gpu"
STRICT = """
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
print("as a GPU", flush=True)
"""


FAULTY = """
import ctypes, os, signal, threading, time
import torch
import entropy_kernels as ek

def results(backend):
    out = ek.logprob_entropy(x, torch.tensor([1, 2, 3], device="cuda"), backend=backend)
    (grad,) = torch.autograd.grad(out.logprob.sum() - out.entropy.sum(), x)
    mask = ek.kl_cov_mask(out.logprob.detach(), k=1, backend=backend)
    return [value.detach().cpu() for value in (out.logprob, out.entropy, grad, mask)]

x = torch.randn(3, 9, device="cuda", requires_grad=True)
backends = ("torch", "cuda", "triton")
right = {backend: results(backend) for backend in backends}
os.environ["PYTEST_CURRENT_TEST"] = "test_wrong (call)"
for backend in backends:
    same = [torch.allclose(ours, good) for ours, good in zip(results(backend), right[backend], strict=True)]
    assert same == [backend == "torch"] * 4, (backend, same)

os.environ["PYTEST_CURRENT_TEST"] = "test_lost (call)"
for test in ("test_lost (call)", "test_next (call)"):  # the error is sticky
    os.environ["PYTEST_CURRENT_TEST"] = test
    for call in (lambda: x + 1, torch.cuda.synchronize, lambda: torch.ones(2, device="cuda")):
        try:
            call()
        except RuntimeError as error:
            assert "illegal memory access" in str(error), error
        else:
            raise AssertionError("expected an error")
assert torch.ones(2).sum() == 2

def handler(*args):
    print("a signal's handler ran")

def end():
    hangs = ctypes.c_int.in_dll(ctypes.CDLL(None), "fake_gpu_hangs")
    while not hangs.value:
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGALRM)
    time.sleep(0.5)  # no longer is needed: a handler that runs late goes unseen, and none that runs is right
    print("hangs", flush=True)
    os._exit(7)

signal.signal(signal.SIGALRM, handler)
threading.Thread(target=end).start()
os.environ["PYTEST_CURRENT_TEST"] = "test_hang (call)"
torch.cuda.synchronize()
print("returned", flush=True)
"""


def run(program: str, folder: Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """In ``folder``, where Python finds only what is installed."""
    (folder / "program.py").write_text(program)
    return run_on_fake_gpu("program.py", cwd=folder, **options)


@needs_fake_gpu
def test_what_a_gpu_refuses_is_refused_and_faults_can_be_planted(tmp_path: Path) -> None:
    done = run(STRICT + FAULTY, tmp_path, faults={f"test_{fault} ": fault for fault in ("wrong", "lost", "hang")})
    assert (done.returncode, done.stdout) == (7, "as a GPU\nhangs\n"), done.stderr


def test_programs_without_torch_and_a_sitecustomize_behind_ours(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("print('behind')")
    program = "import json, sys; print('torch' in sys.modules, 'fake_gpu' in sys.modules)"
    done = run(program, tmp_path, PYTHONPATH=f"{FOLDER}{os.pathsep}{tmp_path}")
    assert (done.stdout, done.stderr) == ("behind\nFalse False\n", "")


def test_programs_of_the_driver_and_the_toolkit() -> None:
    def output(*command: str, code: int = 0) -> str:
        program, *arguments = command
        done = subprocess.run([str(FOLDER / "bin" / program), *arguments], capture_output=True, text=True)
        assert done.returncode == code, done.stderr
        return done.stdout

    query = ("--query-gpu=driver_version", "--format=csv,noheader")
    assert output("nvidia-smi", *query) == "999.99\n"
    assert output("nvidia-smi", "-q")
    program = (sys.executable, "-c", "import sys; print(sys.argv[1:]); sys.exit(3)", "--tool")
    checked = output("compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9", *program, code=3)
    assert checked == "['--tool']\n========= ERROR SUMMARY: 0 errors\n"
    profiled = output("ncu", "--section", "SpeedOfLight", "--section", "Occupancy", *program, code=3)
    assert profiled.startswith("['--tool']\n") and profiled.count("Section: ") == 2

"""entropy-kernels verify: every family of kernels in a process of its own, and what is made of what they say."""

from __future__ import annotations

import contextlib
import inspect
import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from entropy_kernels import cli, smoke_matrix, verify
from entropy_kernels.backends import registry
from entropy_kernels.smoke_matrix import FAMILIES, Call, Family
from entropy_kernels.verify import Outcome
from stub_gpu import add_stub_gpu
from waiting import Clock, has_begun, lives, was_ended

ROOT = Path(__file__).resolve().parent.parent
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def family(kind: str, *ops: str) -> Family:
    return Family("cuda", kind, ops or ("token_stats",), tuple)


# ---- the matrix ------------------------------------------------------------------------------------------------------


def test_every_op_has_families_of_every_gpu_backend() -> None:
    for backend in ("cuda", "triton"):
        assert {op for f in FAMILIES.values() if f.backend == backend for op in f.ops} == set(registry.OPS)
    for f in FAMILIES.values():
        names = [call.name for call in f.calls()]
        assert len(names) == len(set(names)), f.name


@pytest.mark.parametrize("name", ["cuda/backward-strided", "cuda/linear", "cuda/selection-steps", "triton/selection"])
def test_the_calls_are_right_where_the_kernels_are(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """By the C++ kernels here, which a GPU has under the same names."""
    if registry.unavailable("token_stats", "cpu"):
        pytest.skip("the C++ kernels are not built")
    assert smoke_matrix.run(FAMILIES[name]._replace(backend="cpu"), "cpu") == 0
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [("begin" in line, "call" in line) for line in told] == [(True, False), (False, True)] * (len(told) // 2)
    assert len(told) == 2 * len(FAMILIES[name].calls())


def test_a_wrong_result_is_seen(capsys: pytest.CaptureFixture[str]) -> None:
    value = torch.linspace(-1, 1, 9)

    def calls(change: Any, exact: bool = False) -> int:
        def run(device: str, backend: str) -> tuple[torch.Tensor, ...]:
            return (value if backend == "torch" else change(value.clone()),)

        call = Call("x", run, lambda: (value.double(),), exact)
        return smoke_matrix.run(Family("cuda", "x", (), lambda: [call]), "cpu")

    assert calls(lambda v: v) == calls(lambda v: v * (1 + 1e-6)) == calls(lambda v: v, exact=True) == 0
    assert calls(lambda v: v * (1 + 1e-6), exact=True) == 1
    for wrong in (lambda v: v + 1e-3, torch.zeros_like, lambda v: v.index_fill(0, torch.tensor([3]), torch.nan)):
        assert calls(wrong) == 1
    assert " off, by up to " in capsys.readouterr().out


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32), ids=str)
def test_each_element_of_a_gradient_counts(dtype: torch.dtype) -> None:
    """Most are 1/V of the target's: a share of the largest would let them all be 0."""
    call = smoke_matrix.on_logits(20, 9001, dtype, gradient=True)
    right, exact = call.run("cpu", "torch"), call.expected()
    assert smoke_matrix.difference(right, exact)[0] == ""
    gradient = right[-1]
    rounded = exact[-1].to(dtype)
    assert smoke_matrix.difference([*right[:-1], rounded], exact)[0] == ""
    small = gradient.abs() < gradient.abs().float().quantile(0.99)
    last = torch.zeros_like(small).index_fill(1, torch.tensor([9000]), True)
    for wrong in (gradient.masked_fill(small, 0), gradient.masked_fill(last, 0), gradient * 1.1):
        assert smoke_matrix.difference([*right[:-1], wrong], exact)[0] != ""


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_sums_of_rounded_products_may_cancel(dtype: torch.dtype) -> None:
    """By as much as one rounding of the largest, and not by a term more."""
    right = torch.linspace(-1, 1, 1000).to(dtype)
    near = (right.double() + torch.finfo(dtype).eps * 0.4).to(dtype)
    assert smoke_matrix.difference([near], [right], sums=True)[0] == ""
    assert smoke_matrix.difference([near], [right])[0] != ""
    for wrong in (right * 1.1, right.masked_fill(right.abs() < 0.1, 0), right.roll(5)):
        assert smoke_matrix.difference([wrong], [right], sums=True)[0] != ""


# ---- the processes ---------------------------------------------------------------------------------------------------


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Families whose process is a Python program: ``run({"name": "program"}, ...)``."""

    def run(programs: dict[str, str], **options: Any) -> dict[str, Outcome]:
        for name, text in programs.items():
            (tmp_path / name).write_text(text)
        # the prefix gets the command of the real process behind it, and leaves it alone
        starter = f"import os, sys; os.execv(sys.executable, ['python', {str(tmp_path)!r} + '/' + sys.argv[5][5:]])"
        families = [family(name) for name in programs]
        options = {"prefix": (sys.executable, "-c", starter), **options}
        return {o.family.kind: o for o in verify.run_families(families, CPU, **options)}

    return run


BEGIN, END = 'print(\'{"begin": "one call"}\', flush=True)\n', 'print(\'{"call": "one call", "wrong": ""}\')\n'


def test_what_becomes_of_a_process(scripted: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    child, over = tmp_path / "child", list[Outcome]()
    # the two that hang are left to the clock, once all others have ended by themselves
    monkeypatch.setattr(verify, "time", Clock(lambda: has_begun(child) and len(over) >= 7))
    found = scripted(
        {
            "right": BEGIN + END + BEGIN + END,
            "wrong": BEGIN
            + 'print(\'{"call": "one call", "wrong": "off by 2"}\')\n'
            + BEGIN
            + END
            + "raise SystemExit(1)",
            "raises": BEGIN + "raise RuntimeError('CUDA error: an illegal memory access')",
            "crashes": BEGIN + "import os; os.kill(os.getpid(), 11)",
            "crashes at its end": BEGIN + END + "print('terminate', flush=True); import os; os.kill(os.getpid(), 6)",
            "hangs": f"{BEGIN}import subprocess, sys, time\n"
            f"subprocess.Popen([sys.executable, '-c', {lives(child)!r}])\ntime.sleep(600)",
            "never begins": "import time; time.sleep(600)",
            "says nothing": "",
            "is no JSON": BEGIN + "print('{broken'); print('[1]')\n" + END,
        },
        at_once=8,
        ended=over.append,
    )
    assert {name: outcome.state for name, outcome in found.items()} == {
        "right": "passed", "wrong": "wrong", "raises": "raised", "crashes": "died", "crashes at its end": "died",
        "hangs": "hung", "never begins": "hung", "says nothing": "raised", "is no JSON": "passed",
    }  # fmt: skip
    assert {name for name, outcome in found.items() if not outcome.judged} == set()
    assert {name for name, outcome in found.items() if outcome.doubtful} == {
        "raises",
        "says nothing",
        "crashes at its end",
    }
    assert (found["right"].calls, found["wrong"].calls) == (2, 1) and found["wrong"].detail == "one call: off by 2"
    assert found["raises"].detail == "RuntimeError: CUDA error: an illegal memory access in 'one call'"
    assert found["crashes"].detail == "signal 11, Segmentation fault in 'one call'"
    assert found["crashes at its end"].detail == "signal 6, Aborted: terminate after its calls"
    assert found["hangs"].detail == f"nothing heard for {verify.CALL_LIMIT:.0f} s in 'one call'"
    assert "before its first call" in found["never begins"].detail
    assert was_ended(child), "its child went with it"


def test_a_time_for_all(scripted: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    begun = tmp_path / "begun"
    monkeypatch.setattr(verify, "time", Clock(begun.exists, step=2.0))  # less than the limit of a call
    programs = dict.fromkeys(
        ("first", "second"), f"{BEGIN}import pathlib, time; pathlib.Path({str(begun)!r}).touch(); time.sleep(600)"
    )
    seen: list[str] = []
    found = scripted(programs, at_once=1, seconds=1.0, ended=lambda outcome: seen.append(outcome.family.kind))
    assert seen == ["first", "second"]
    assert (found["first"].state, found["second"].state) == ("out of time", "not run")


def test_a_prefix_has_to_have_been_there(scripted: Any) -> None:
    """compute-sanitizer may let a program run unseen."""
    found = scripted(
        {"seen": BEGIN + END + "print('== SUMMARY: 0 errors')", "unseen": BEGIN + END}, needed="SUMMARY: 0"
    )
    assert (found["seen"].state, found["unseen"].state) == ("passed", "raised")


def test_a_program_that_is_missing(scripted: Any) -> None:
    with pytest.raises(FileNotFoundError, match="no/such"):
        scripted({"any": ""}, prefix=("/no/such/program",))


def test_the_processes_have_this_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Elsewhere, where another lies."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "entropy_kernels").mkdir()
    (tmp_path / "entropy_kernels" / "__init__.py").write_text("raise SystemExit('another')")
    (outcome,) = verify.run_families([FAMILIES["cuda/selection-steps"]], CPU)
    assert outcome.state == "passed", outcome  # by the C++ steps: torch picks by the device


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux's")
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_behind(tmp_path: Path, how: signal.Signals) -> None:
    """However the command ends: a kernel that hangs would keep the GPU for ever."""
    path = tmp_path / "child"
    # the function alone: its module imports torch
    ends = inspect.getsource(smoke_matrix.end_with_parent)
    child = f"import ctypes, signal, sys\n{ends}\nend_with_parent(); {lives(path)}"
    text = (
        "import sys, torch\nfrom entropy_kernels import verify\n"
        f"verify._CHILD = {child!r}\nverify.end_when_told()\n"
        "verify.run_families([verify.FAMILIES['cuda/linear']], torch.device('cpu'))"
    )
    process = subprocess.Popen([sys.executable, "-c", text], cwd=ROOT)
    while not has_begun(path):
        with contextlib.suppress(subprocess.TimeoutExpired):
            pytest.fail(f"ended with {process.wait(0.05)} before its child began")
    process.send_signal(how)
    process.wait()
    assert was_ended(path)


@pytest.fixture
def families(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, forgetful_registry: None) -> Any:
    """A function that takes the names of all there are on a stub GPU, and what is called to run them."""
    add_stub_gpu(monkeypatch, kernels="")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def are(names: Iterable[str], run: Callable[..., list[Outcome]]) -> None:
        monkeypatch.setattr(verify, "FAMILIES", {name: FAMILIES[name] for name in names})
        monkeypatch.setattr(verify, "run_families", run)

    return are


def test_what_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, families: Any) -> None:
    """What raised runs again alone; what was not judged is no verdict; nothing is lost where nothing can be kept."""
    states = {
        "cuda/forward-plain": ("passed", ""),
        "cuda/covariance": ("raised", "CUDA out of memory"),
        "cuda/selection-grid": ("wrong", "3 of 7 differ"),
        "cuda/linear": ("not run", "no time left"),
        "cuda/budget": ("not run", "no time left"),
        "cuda/fp64": ("died", "signal 6, Aborted after its calls"),
    }
    ran: list[tuple[str, ...]] = []

    def run(families: Any, device: Any, **options: Any) -> list[Outcome]:
        ran.append((*(f.name for f in families), str(options["at_once"])))
        again = len(ran) % 2 == 0
        said = {name: ("passed", "") if again and name == "cuda/fp64" else state for name, state in states.items()}
        return [Outcome(f, said[f.name][0], 2, said[f.name][1], between=f.name == "cuda/fp64") for f in families]

    families(states, run)
    found, where, outcomes = verify.verify(GPU, at_once=4)
    assert [set(names) for names in ran] == [{*states, "4"}, {"cuda/covariance", "cuda/fp64", "1"}] and len(
        outcomes
    ) == 6
    assert {pair.op for pair in found.pairs} == set(registry.OPS)
    kept = registry.verdict_of(GPU)
    assert kept is not None and where.startswith("kept in ")
    assert {pair.op: pair.verified for pair in kept.pairs} == {
        "token_stats": True, "clip_cov_mask": False, "kl_cov_mask": False,
    }  # fmt: skip
    assert "not verified on this" in (registry.unverified("token_covariance", "cuda", GPU) or "")
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    _, where, outcomes = verify.verify(GPU)
    assert where.startswith("not kept") and len(outcomes) == 6


def test_pairs() -> None:
    """An op needs all of its families, and one right call."""
    passed, hung = Outcome(family("a", "x", "y"), "passed", 3), Outcome(family("b", "y"), "hung", 1, "in 'c'")
    pairs = {pair.op: pair for pair in verify.pairs_of([passed, hung, Outcome(family("c", "z"), "passed", 0)])}
    assert {op: pair.verified for op, pair in pairs.items()} == {"x": True, "y": False, "z": False}
    assert pairs["y"].calls == 4 and pairs["y"].failed == {"cuda/b": "hung, in 'c'"}


# ---- the command -----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["verify"]) == 2
    assert capsys.readouterr().err == (
        "entropy-kernels verify: error: expected a GPU, on which the kernels are to run, got none that torch can use\n"
    )
    assert cli.main(["verify", "--at-once", "0"]) == 2
    assert "--at-once: expected 1 or more, got 0" in capsys.readouterr().err


def test_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], families: Any) -> None:
    """One family wrong, one that hangs, one that loses the device: each is named, auto takes what is right.

    The rehearsal in test_gpu_smoke.py runs real families.
    """
    states = {
        "cuda/backward-strided": ("wrong", "token_stats of 300 rows: 3 of 7 off"),
        "cuda/selection-grid": ("hung", "nothing heard for 25 s in 'selection of 600001 tokens'"),
        "cuda/covariance": ("raised", "an illegal memory access"),
        "cuda/selection-steps": ("passed", ""),
        "triton/selection": ("passed", ""),
    }

    def run(families: Any, device: Any, *, ended: Any, **options: Any) -> list[Outcome]:
        outcomes = [Outcome(f, states[f.name][0], 2, states[f.name][1]) for f in families]
        for outcome in outcomes:
            ended(outcome)
        return outcomes

    families(states, run)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    assert cli.main(["verify", "--at-once", "3"]) == 1
    told = capsys.readouterr()
    for name, (state, detail) in states.items():
        assert any(name in line and f" {state} " in line and detail in line for line in told.err.splitlines())
    ops = ("token_stats", "token_covariance", "clip_cov_mask", "kl_cov_mask")
    with pytest.warns(UserWarning, match="with plain torch operations") as caught:
        assert [registry.resolve(op, "auto", GPU) for op in ops] == ["torch", "torch", "triton", "triton"]
    assert len(caught) == 1
    reason = registry.unverified("token_stats", "cuda", GPU) or ""
    assert reason.startswith("not right here, says `entropy-kernels verify`: cuda/backward-strided: wrong, token_stats")

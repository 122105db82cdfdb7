"""backend="auto": the first backend that can run and that hardware has verified; doctor says why."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import entropy_kernels as ek
from entropy_kernels import doctor, smoke_matrix
from entropy_kernels.backends import registry, verdict
from entropy_kernels.backends.verdict import Pair, Verdict
from stub_gpu import add_stub_gpu, verify

pytestmark = pytest.mark.usefixtures("forgetful_registry")
GPU = torch.device("cuda", 0)
ROOT = Path(__file__).resolve().parent.parent


def chosen(op: str, device: torch.device = GPU) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return registry.resolve(op, "auto", device)


def keep(monkeypatch: pytest.MonkeyPatch, folder: Path, *pairs: Pair, **fields: str) -> Path:
    """A verdict of the GPU that is there, in a cache folder; ``fields``: what was otherwise on the machine."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    registry.forget()
    machine = replace(verdict.machine(GPU), **fields)
    return verdict.write(Verdict(machine, "2026-01-02T03:04:05+00:00", pairs))


def test_what_has_shown_a_backend_to_be_right_is_there() -> None:
    for (op, backend, architecture), folder in registry.VERIFIED.items():
        found = json.loads((ROOT / folder / "verification.json").read_text())
        assert found["architecture"] == architecture, folder
        pair = next(pair for pair in found["pairs"] if (pair["op"], pair["backend"]) == (op, backend))
        assert pair["verified"] and pair["tests"] > 0, (op, backend, folder)


def test_on_a_cpu_nothing_has_to_be_verified() -> None:
    here = ek.backends()["token_stats"]["cpu"] == "available"
    assert chosen("token_stats", torch.device("cpu")) == ("cpu" if here else "torch")
    assert chosen("token_stats", torch.device("xpu")) == "torch"
    assert registry.preference("token_stats", "cpu") == ("cpu", "torch")


def test_an_unverified_gpu_backend_is_never_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    add_stub_gpu(monkeypatch)
    # verified, but as another op, another backend, or on another GPU
    for pairs in (
        [],
        [("kl_cov_mask", "cuda", "sm_90")],
        [("token_stats", "triton", "sm_90")],
        [("token_stats", "cuda", "sm_80")],
    ):
        verify(monkeypatch, *pairs)
        assert chosen("token_stats") != "cuda"
        assert registry.resolve("token_stats", "cuda", GPU) == "cuda"
    reason = registry.unverified("token_stats", "cuda", GPU)
    assert reason == "not verified on this sm_90 yet: run `entropy-kernels verify`"
    assert registry.unverified("token_stats", "torch", GPU) is None


def test_a_verified_one_is(monkeypatch: pytest.MonkeyPatch) -> None:
    add_stub_gpu(monkeypatch)
    verify(monkeypatch, ("token_stats", "cuda", "sm_90"))
    assert (chosen("token_stats"), chosen("kl_cov_mask")) == ("cuda", "torch")
    # the next one serves where the first cannot run
    verify(monkeypatch, *(("token_stats", backend, "sm_90") for backend in ("cuda", "triton")))
    monkeypatch.setattr(registry, "unavailable", lambda op, backend, device: "broken" if backend == "cuda" else None)
    registry.resolve.cache_clear()
    assert chosen("token_stats") == "triton"


def test_what_was_found_here_comes_before_the_projects(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    add_stub_gpu(monkeypatch)
    keep(monkeypatch, tmp_path, Pair("token_stats", "cuda", 3, {"cuda/forward-plain": "wrong, off by 1"}))
    monkeypatch.setattr(registry, "VERIFIED", {(op, "cuda", "sm_90"): "" for op in ("token_stats", "kl_cov_mask")})
    assert (chosen("token_stats"), registry.unverified("kl_cov_mask", "cuda", GPU)) == ("torch", None)
    assert "cuda/forward-plain: wrong, off by 1" in (registry.unverified("token_stats", "cuda", GPU) or "")


def test_two_gpus_that_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    """The GPU that holds the tensor decides, whichever was asked about first and whichever is the current one."""
    add_stub_gpu(monkeypatch, (9, 0), (8, 0), (7, 5), (9, 0))
    hopper, ampere, turing = (torch.device("cuda", index) for index in range(3))
    verify(monkeypatch, ("token_stats", "cuda", "sm_90"))
    for _ in range(2):  # the second time from memory
        assert (chosen("token_stats", hopper), chosen("token_stats", ampere)) == ("cuda", "torch")
        assert registry.resolve("token_stats", "cuda", ampere) == "cuda"
        assert chosen("token_stats", turing) == "torch"
        with pytest.raises(RuntimeError, match=r"needs compute capability 8\.0 or higher, this GPU is sm_75"):
            registry.resolve("token_stats", "cuda", turing)
    tensors = [SimpleNamespace(device=device) for device in (hopper, ampere)]
    modules = [registry.kernel("token_stats", "token_stats_forward", "auto", t).__module__ for t in tensors]
    assert [name.rpartition(".")[2] for name in modules] == ["native", "token_stats"]
    assert registry.gpus() == [hopper, ampere, turing], "one of each model"
    monkeypatch.setattr(doctor, "device_types", lambda: ["cuda"])
    choices = {c.device: c.backend for c in doctor.auto_choices() if c.op == "token_stats"}
    assert choices == {"cuda:0": "cuda", "cuda:1": "torch", "cuda:2": "torch"}


def test_it_is_told_once_what_to_type(monkeypatch: pytest.MonkeyPatch) -> None:
    add_stub_gpu(monkeypatch, kernels="")
    verify(monkeypatch)
    with pytest.warns(UserWarning, match="run `entropy-kernels verify`") as caught:
        for op in registry.OPS:
            registry.resolve(op, "auto", GPU)
    assert len(caught) == 1 and "Stub 90" in str(caught[0].message)
    verify(monkeypatch, *((op, "cuda", "sm_90") for op in registry.OPS))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        registry.resolve("token_stats", "auto", GPU)
        registry.resolve("kl_cov_mask", "auto", GPU)
        registry.resolve("token_stats", "auto", torch.device("cpu"))
        registry.resolve("token_stats", "torch", GPU)


# ---- the user's own verdict ------------------------------------------------------------------------------------------


def test_auto_follows_what_was_found_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    add_stub_gpu(monkeypatch)
    right = Pair("token_stats", "cuda", 12, {})
    path = keep(monkeypatch, tmp_path, right, Pair("kl_cov_mask", "cuda", 3, {"cuda/selection-grid": "hung, in 'x'"}))
    assert path.parent == tmp_path / "entropy_kernels" / "verified" and path.name.startswith("stub-90-")
    assert (chosen("token_stats"), chosen("kl_cov_mask")) == ("cuda", "torch")
    reason = registry.unverified("kl_cov_mask", "cuda", GPU)
    assert reason == "not right here, says `entropy-kernels verify`: cuda/selection-grid: hung, in 'x'"
    keep(monkeypatch, tmp_path, replace(right, calls=0))
    assert "no call of it ran" in (registry.unverified("token_stats", "cuda", GPU) or "")


@pytest.mark.parametrize("field", ["gpu", "driver", "torch", "triton", "entropy_kernels", "kernels"])
def test_of_something_else_it_says_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, field: str) -> None:
    add_stub_gpu(monkeypatch)
    pair = Pair("token_stats", "cuda", 12, {})
    other = keep(monkeypatch, tmp_path, pair, **{field: "another"})
    assert chosen("token_stats") == "torch"
    # nor when it is copied to where this machine's belongs
    other.rename(verdict.file(verdict.machine(GPU)))
    registry.forget()
    with pytest.warns(UserWarning, match="machine: expected"):
        assert registry.verdict_of(GPU) is None
    keep(monkeypatch, tmp_path, pair)
    assert chosen("token_stats") == "cuda"


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda text: text[:-20], "ignored"),
        (lambda text: "[]", "expected an object of format 1"),
        (lambda text: text.replace('"format": 1', '"format": 2'), "expected an object of format 1"),
        (lambda text: text.replace('"pairs"', '"lines"'), "verdict: expected the fields"),
        (lambda text: text.replace('"op"', '"operator"'), "pair: expected the fields"),
        (lambda text: text.replace('"calls": 12', '"calls": "12"'), "calls: expected int, got '12'"),
        (lambda text: text.replace('"calls": 12', '"calls": true'), "calls: expected int, got True"),
        (lambda text: text.replace('"calls": 12', '"calls": -1'), "expected calls >= 0"),
        (lambda text: text.replace('"failed": {}', '"failed": {"x": 1}'), "a text for each failure"),
        (lambda text: text.replace('"gpu"', '"card"'), "machine: expected the fields"),
        (
            lambda text: text.replace('"date": "2026', '"date": ["2026').replace('00:00"', '00:00"]'),
            "date: expected str",
        ),
        (lambda text: text.replace("kl_cov_mask", "token_stats"), "expected each op and backend once"),
        (lambda text: "\x00\xff", "ignored"),
        (lambda text: "[" * 200_000, "ignored"),
    ],
)
def test_a_damaged_one_is_ignored_with_a_note(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, damage: Any, words: str
) -> None:
    add_stub_gpu(monkeypatch)
    path = keep(monkeypatch, tmp_path, Pair("token_stats", "cuda", 12, {}), Pair("kl_cov_mask", "cuda", 12, {}))
    text = path.read_text()
    assert damage(text) != text
    path.write_text(damage(text), encoding="latin-1")
    with pytest.warns(UserWarning, match="entropy-kernels verify` writes it anew") as caught:
        assert registry.resolve("token_stats", "auto", GPU) == "torch"
    assert any(words in str(w.message) and str(path) in str(w.message) for w in caught)


def test_without_a_home_nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """As for a user without an entry in /etc/passwd; a relative $XDG_CACHE_HOME is no folder, says its standard."""

    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    add_stub_gpu(monkeypatch)
    monkeypatch.setattr(Path, "home", home)
    for value in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        registry.forget()
        assert chosen("token_stats") == "torch"
        with pytest.raises(OSError, match="Set XDG_CACHE_HOME"):
            verdict.folder()


def test_one_that_cannot_be_read_is_ignored_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    add_stub_gpu(monkeypatch)
    path = keep(monkeypatch, tmp_path, Pair("token_stats", "cuda", 12, {}))
    path.unlink()
    path.mkdir()
    with pytest.warns(UserWarning, match="ignored"):
        assert registry.verdict_of(GPU) is None


# ---- doctor ----------------------------------------------------------------------------------------------------------


def test_doctor_shows_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    add_stub_gpu(monkeypatch)
    monkeypatch.setattr(doctor, "device_types", lambda: ["cuda"])
    monkeypatch.setattr(doctor, "hardware", lambda: [("GPU 0", "a stub")])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    registry.forget()
    (found,) = doctor.verdicts()
    assert found == {"device": "cuda:0", "text": "nothing yet: run `entropy-kernels verify`"}
    keep(monkeypatch, tmp_path, Pair("token_stats", "cuda", 12, {}), Pair("kl_cov_mask", "cuda", 0, {}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert doctor.run(check=False, as_json=True) == 0
    report = json.loads(capsys.readouterr().out)
    assert "1 of 2 pairs of op and backend, 2026-01-02" in report["verdicts"][0]["text"]
    by_op = {choice["op"]: choice for choice in report["auto"]}
    assert set(by_op) == set(registry.OPS)
    assert by_op["token_stats"]["backend"] == "cuda" and not by_op["token_stats"]["skipped"]
    assert by_op["kl_cov_mask"]["backend"] == "torch"
    assert "no CUDA kernel kl_cov_mask yet" in by_op["kl_cov_mask"]["skipped"]["cuda"]
    assert doctor.run(check=False) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert (
        "verified on cuda:0: 1 of 2 pairs" in out
        and "cuda kl_cov_mask not right here" in out
        and "first choice (order: cuda, triton, torch)" in out
    )


def test_doctor_runs_no_kernel_that_might_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    add_stub_gpu(monkeypatch)
    ran: list[tuple[str, str]] = []
    monkeypatch.setattr(doctor.ek, "backends", lambda: {"token_stats": dict.fromkeys(("cuda", "torch"), "available")})
    call = smoke_matrix.Call("x", lambda *on: ran.append(on) or (), tuple)
    monkeypatch.setitem(smoke_matrix.DOCTOR, "token_stats", lambda: [call])
    for pairs, expected in (((), []), ([("token_stats", "cuda", "sm_90")], [("cuda", "cuda")])):
        verify(monkeypatch, *pairs)
        ran.clear()
        doctor.self_check(doctor._safe)
        assert ran == [*expected, ("cpu", "torch"), ("cuda", "torch")]

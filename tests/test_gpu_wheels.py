"""The wheels for the GPU machine: which, which versions, and not too many."""

from __future__ import annotations

from pathlib import Path

import pytest

import gpu_wheels


def test_versions_are_those_of_the_bench_extra() -> None:
    wanted = gpu_wheels.requirements((gpu_wheels.ROOT / "pyproject.toml").read_text())
    assert {requirement.partition("==")[0] for requirement in wanted} == {*gpu_wheels.PEERS, "einops", "setuptools"}
    assert all(requirement.partition("==")[2] for requirement in wanted)
    command = gpu_wheels.command(wanted, Path("x"), "3.12")
    assert "--no-deps" in command and "--only-binary=:all:" in command and command[-len(wanted) :] == wanted


def test_a_peer_without_a_version_is_an_error() -> None:
    with pytest.raises(ValueError, match="none for verl, trl, fla-core, cut-cross-entropy"):
        gpu_wheels.requirements('bench = [\n  "liger-kernel==0.8.5",\n  "verl",\n]')


def test_too_many_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a-1-py3-none-any.whl").write_bytes(bytes(3 << 20))
    assert gpu_wheels.report(tmp_path) == 0
    monkeypatch.setattr(gpu_wheels, "LIMIT", 2 << 20)
    assert gpu_wheels.report(tmp_path) == 1 and "too large" in capsys.readouterr().err

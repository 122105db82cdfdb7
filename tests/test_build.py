"""The build backend asks for torch where it is needed and missing, and nowhere else."""

from __future__ import annotations

from pathlib import Path

import pytest

import build_backend as backend


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(backend.__file__).parent.parent)  # setuptools runs setup.py of the working directory
    monkeypatch.delenv("ENTROPY_KERNELS_SKIP_CPP", raising=False)


def test_torch_that_is_there_is_used() -> None:
    assert backend.torch_is_there() and not backend._torch()


def test_a_wheel_needs_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "torch_is_there", lambda: False)
    for name in ("get_requires_for_build_wheel", "get_requires_for_build_editable"):
        monkeypatch.setattr(backend.build_meta, name, lambda settings: ["wheel"])
        assert getattr(backend, name)() == ["wheel", "torch>=2.10", "numpy"]


def test_a_source_archive_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "torch_is_there", lambda: False)
    assert backend.get_requires_for_build_sdist is backend.build_meta.get_requires_for_build_sdist


@pytest.mark.parametrize(("name", "value"), [("ENTROPY_KERNELS_SKIP_CPP", "1"), ("CXX", "/no/compiler")])
def test_pure_python_needs_no_torch(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setattr(backend, "torch_is_there", lambda: False)
    monkeypatch.setenv(name, value)
    assert backend.skip_reason() and not backend._torch()

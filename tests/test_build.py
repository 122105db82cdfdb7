"""The build backend asks for torch where it is needed and missing, and nowhere else."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

FILE = Path(__file__).parent.parent / "tools" / "build_backend.py"


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    pytest.importorskip("setuptools")
    monkeypatch.chdir(FILE.parent.parent)  # setuptools runs setup.py of the working directory
    monkeypatch.delenv("ENTROPY_KERNELS_SKIP_CPP", raising=False)
    spec = importlib.util.spec_from_file_location("build_backend", FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_torch_that_is_there_is_used(backend: ModuleType) -> None:
    assert backend.torch_is_there() and not backend._torch()


def test_a_wheel_needs_torch(backend: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "torch_is_there", lambda: False)
    for name in ("get_requires_for_build_wheel", "get_requires_for_build_editable"):
        monkeypatch.setattr(backend.build_meta, name, lambda settings: ["wheel"])
        assert getattr(backend, name)() == ["wheel", "torch>=2.10", "numpy"]


def test_a_source_archive_does_not(backend: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "torch_is_there", lambda: False)
    assert backend.get_requires_for_build_sdist is backend.build_meta.get_requires_for_build_sdist


@pytest.mark.parametrize(("name", "value"), [("ENTROPY_KERNELS_SKIP_CPP", "1"), ("CXX", "/no/compiler")])
def test_pure_python_needs_no_torch(
    backend: ModuleType, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setattr(backend, "torch_is_there", lambda: False)
    monkeypatch.setenv(name, value)
    assert backend.skip_reason() and not backend._torch()

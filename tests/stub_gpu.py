"""GPUs that are not there: a stub of one in this process with what was verified on it; programs on the fake GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from entropy_kernels.backends import native, registry, verdict

HERE = Path(__file__).resolve().parent


def run_on_fake_gpu(
    *arguments: str | Path, cwd: Path = HERE.parent, paths: tuple[Path, ...] = (), faults: dict[str, str] | None = None,
    **variables: str,
) -> subprocess.CompletedProcess[str]:  # fmt: skip
    """Python with ``arguments`` on the fake GPU; ``paths``: where else modules are; ``faults``: planted (fake_gpu.py).

    No limit of its own: a busy machine is slow, and pytest has one.
    """
    search = os.pathsep.join(map(str, (HERE / "fake_gpu", *paths)))
    environment = {**os.environ, "PYTHONPATH": search, "FAKE_GPU_FAULTS": json.dumps(faults or {}), **variables}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment)


def add_stub_gpu(
    monkeypatch: pytest.MonkeyPatch, *capabilities: tuple[int, int], gpu: bool = True, kernels: str = "token_stats"
) -> None:
    """A CUDA half that loads, with kernels whose names begin with ``kernels``, and GPUs (one of sm_90) or none.

    The project has verified nothing on them: :func:`verify`.
    """
    gpus = capabilities or ((9, 0),)

    def capability(device: torch.device | None = None) -> tuple[int, int]:
        return gpus[0 if device is None or device.index is None else device.index]

    def properties(device: torch.device | None = None) -> SimpleNamespace:
        major, minor = capability(device)
        return SimpleNamespace(name=f"Stub {major}{minor}", major=major, minor=minor, total_memory=80 << 30)

    monkeypatch.setattr(registry, "VERIFIED", {})
    monkeypatch.setattr(native, "cuda_load_error", None)
    monkeypatch.setattr(native, "has_cuda_kernel", lambda name: name.startswith(kernels))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus) if gpu else 0)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", capability)
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    monkeypatch.setattr(torch.version, "hip", None)


def serve_auto_with(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    """ "auto" takes ``backend``, verified or not: for what has no argument of that name, such as the losses."""
    monkeypatch.setattr(registry, "preference", lambda op, *rest: (backend, "torch"))
    monkeypatch.setattr(registry, "unverified", lambda *_: None)
    registry.forget()


def verify(monkeypatch: pytest.MonkeyPatch, *pairs: tuple[str, str, str]) -> None:
    """The registry finds these (op, backend, architecture) verified by the project, and no verdict of the user's."""
    monkeypatch.setattr(registry, "VERIFIED", dict.fromkeys(pairs, "benchmarks/results/some-gpu"))
    monkeypatch.setattr(verdict, "read", lambda machine: None)
    registry.forget()

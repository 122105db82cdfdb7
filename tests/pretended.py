"""A GPU that is not there, and tables behind "auto" as a test wants them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from entropy_kernels.backends import auto_table, native, registry

SOURCE = auto_table.Source("benchmarks/results/some/bench.json", "some-machine", "0123456789abcdef", "2026-01-02")


def pretend_gpu(
    monkeypatch: pytest.MonkeyPatch, *capabilities: tuple[int, int], gpu: bool = True, kernels: str = "token_stats"
) -> None:
    """A CUDA half that loads, with kernels whose names begin with ``kernels``, and GPUs (one of sm_90) or none."""
    gpus = capabilities or ((9, 0),)

    def capability(device: torch.device | None = None) -> tuple[int, int]:
        return gpus[0 if device is None or device.index is None else device.index]

    monkeypatch.setattr(native, "cuda_load_error", None)
    monkeypatch.setattr(native, "has_cuda_kernel", lambda name: name.startswith(kernels))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus) if gpu else 0)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", capability)
    monkeypatch.setattr(registry, "architecture", lambda device=None: "sm_{}{}".format(*capability(device)))


def row(op: str, architecture: str, dtype: str, size: str, **times: float) -> auto_table.Row:
    """A row of the table whose backends are ``times``, in that order."""
    return auto_table.Row(op, architecture, dtype, size, tuple(times), times, 1, (SOURCE,), {})


def verified(op: str, backend: str, architecture: str) -> auto_table.Verified:
    return auto_table.Verified(op, backend, architecture, 100, SOURCE)


def serve_auto_with(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    """ "auto" takes ``backend``, verified or not: for what has no argument of that name, such as the losses."""
    monkeypatch.setattr(registry, "preference", lambda op, *rest: (backend, "torch"))
    monkeypatch.setattr(registry, "unverified", lambda *_: None)
    registry.resolve.cache_clear()
    registry._kernel.cache_clear()


def use_table(monkeypatch: pytest.MonkeyPatch, *entries: Any) -> None:
    """The registry finds these rows and verified pairs, and nothing else."""
    rows = [entry for entry in entries if isinstance(entry, auto_table.Row)]
    table = auto_table.Table.of(rows, [entry for entry in entries if isinstance(entry, auto_table.Verified)])
    monkeypatch.setattr(auto_table, "load", lambda: table)
    registry.resolve.cache_clear()
    registry._kernel.cache_clear()

"""Files that are whole or not there: checkpoints, JSON, text, all written beside their name and moved into place."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch

#: Number of the checkpoint's layout; goes up when the meaning of a saved field changes.
FORMAT = 1


def write_atomic(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """Call `write` on a temporary file beside `path`, flush it to disk, and move it into place.

    If `write` raises, or the process dies at any point, `path` still holds what it held before.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(scratch, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes) -> None:
    """Bytes, atomically."""

    def write(file: BinaryIO) -> None:
        file.write(data)

    write_atomic(path, write)


def write_text(path: Path, text: str) -> None:
    """UTF-8 text, atomically."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=2, sort_keys=False) + "\n")


def save_checkpoint(
    path: Path,
    *,
    step: int,
    config: dict[str, Any],
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    generators: dict[str, torch.Generator],
) -> None:
    """Write everything that the rest of the run depends on.

    `step` is the number of finished steps. Besides the named generators, torch's global ones are saved, for models
    that use them.
    """
    state = {
        "format": FORMAT,
        "step": step,
        "config": config,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "generators": {name: generator.get_state() for name, generator in generators.items()},
        "torch_rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }
    write_atomic(path, lambda file: torch.save(state, file))


def load_checkpoint(path: Path) -> dict[str, Any]:
    """The dictionary that :func:`save_checkpoint` wrote, on the CPU.

    Raises FileNotFoundError without a checkpoint, ValueError for one of another format.
    """
    if not path.exists():
        raise FileNotFoundError(
            f"resume: expected a checkpoint at {path}, got none; a run that ended before its first one (save_every) "
            "starts again with --overwrite"
        )
    state = torch.load(path, map_location="cpu", weights_only=True)
    if state.get("format") != FORMAT:
        raise ValueError(f"resume: expected a checkpoint of format {FORMAT}, got {state.get('format')!r} in {path}")
    return state


def restore(
    state: dict[str, Any],
    *,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    generators: dict[str, torch.Generator],
) -> int:
    """Put a loaded checkpoint back in place; returns the number of finished steps."""
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    for name, generator in generators.items():
        generator.set_state(state["generators"][name])
    torch.set_rng_state(state["torch_rng"])
    if torch.cuda.is_available() and state["cuda_rng"]:
        torch.cuda.set_rng_state_all(state["cuda_rng"])
    return int(state["step"])

"""Checkpoints (everything that the rest of a run depends on, with a checksum, and the one before), and a run's folder:
which files in it are the run's, and whether it may be written. What the user put there is never touched (files.py).
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import entropy_kernels as ek
from entropy_kernels.trainer.config import TrainerConfig
from entropy_kernels.trainer.critic import Critic
from entropy_kernels.trainer.files import OwnFiles, append
from entropy_kernels.trainer.model import Policy
from entropy_kernels.trainer.reference import REFERENCE
from entropy_kernels.trainer.tensorfile import read_tree, save_tree

#: Number of the checkpoint's layout; goes up when the meaning of a saved field changes.
FORMAT = 3
CHECKPOINT = "checkpoint.safetensors"

#: What a checkpoint has the tensors of.
Weights = torch.nn.Module | Policy | Critic


def previous_of(path: Path) -> Path:
    """Where the checkpoint before `path` is kept."""
    return path.with_name(f"{path.stem}.previous{path.suffix}")


def save_checkpoint(
    path: Path,
    *,
    step: int,
    config: dict[str, Any],
    modules: Mapping[str, Weights],
    optimizers: Mapping[str, torch.optim.Optimizer],
    generators: Mapping[str, torch.Generator],
    controller: ek.Controller | None = None,
    row: dict[str, Any] | None = None,
    changes: list[dict[str, Any]] | None = None,
) -> None:
    """Write everything that the rest of the run depends on. What `path` held becomes :func:`previous_of` it.

    `step` is the number of finished steps; `row` the last one of the log, which tells whose log it is; `changes` of the
    configuration are those under which the run was resumed. Besides the named generators, torch's global ones are
    saved, for models that use them. OSError where it cannot be written: `path` is as it was then.
    """
    state = {
        "format": FORMAT,
        "step": step,
        "config": config,
        "row": row,
        "changes": changes or [],
        "modules": {name: module.state_dict() for name, module in modules.items()},
        "optimizers": {name: optimizer.state_dict() for name, optimizer in optimizers.items()},
        "generators": {name: generator.get_state() for name, generator in generators.items()},
        "controller": None if controller is None else controller.state_dict(),
        "torch_rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }
    save_tree(path, state, keep_old=previous_of(path))


def load_checkpoint(path: Path) -> dict[str, Any]:
    """The dictionary that :func:`save_checkpoint` wrote, on the CPU, to be read.

    Raises FileNotFoundError without a checkpoint, ValueError for one that is damaged, of a newer version, or of another
    program, OSError for one that cannot be read; each says what to do.
    """
    expect_checkpoint(path)
    expected = f"resume: expected a checkpoint at {path}, got "
    state = read_tree(path, expected, f"; {_way_out(path)}")
    if type(state.get("format")) is int and state["format"] > FORMAT:
        raise ValueError(
            f"{expected}one of format {state['format']}, from a newer version: this one reads format {FORMAT}; "
            "update entropy_kernels"
        )
    if not _is_whole(state):
        raise ValueError(f"{expected}a file of another program; {_way_out(path)}")
    return state


#: What :func:`save_checkpoint` writes, but for tensors and what may be None.
_PARTS = {"format": int, "step": int, "torch_rng": Tensor, "cuda_rng": list, "changes": list} | dict.fromkeys(
    ("config", "modules", "optimizers", "generators"), dict
)


def _is_whole(state: dict[str, Any]) -> bool:
    row = state.get("row")
    if not all(isinstance(state.get(name), kind) for name, kind in _PARTS.items()):
        return False
    weights, optimizers = state["modules"].values(), state["optimizers"].values()
    if not all(isinstance(value, dict) for value in (*weights, *optimizers)):
        return False
    tensors = [*(x for module in weights for x in module.values()), *state["generators"].values(), *state["cuda_rng"]]
    return (
        state["format"] == FORMAT
        and type(state["step"]) is int
        and state["step"] >= 0
        and (row is None or (type(row) is dict and type(row.get("step")) is int))
        and all({"state", "param_groups"} <= optimizer.keys() for optimizer in optimizers)
        and all(isinstance(tensor, Tensor) for tensor in tensors)
    )


def expect_checkpoint(path: Path) -> None:
    """Raise FileNotFoundError or IsADirectoryError, with the way out, if there is no file at `path`."""
    expected = f"resume: expected a checkpoint at {path}, got "
    if path.is_dir():
        raise IsADirectoryError(f"{expected}a folder; {_way_out(path)}")
    if not path.exists():
        raise FileNotFoundError(f"{expected}none; {_way_out(path)}")


def _way_out(path: Path) -> str:
    again = "a run that ended before its first one (save_every) starts again with --overwrite, or under another --out"
    if previous_of(path).is_file():
        return f"the one before is kept: mv {previous_of(path)} {path}, then --resume; {again}"
    return again


def restore(
    state: dict[str, Any],
    path: Path,
    *,
    modules: Mapping[str, Weights],
    optimizers: Mapping[str, torch.optim.Optimizer],
    generators: Mapping[str, torch.Generator],
    controller: ek.Controller | None = None,
) -> int:
    """Put the checkpoint that was loaded from `path` back in place; returns the number of finished steps.

    What is named here must be in it; what it has beside is left. ValueError, with the way out, for one whose weights
    have other names or shapes, or whose optimizer, generators or method are others.
    """
    part = "model"
    try:
        for name, module in modules.items():
            part = "model" if name == "policy" else name
            module.load_state_dict(state["modules"][name])
        for name, optimizer in optimizers.items():
            part = "optimizer" if name == "policy" else f"{name}'s optimizer"
            # a copy: what was loaded may be the pages of the file
            optimizer.load_state_dict(copy.deepcopy(state["optimizers"][name]))
            for parameter, values in optimizer.state.items():  # torch looks at shapes in its first step
                if any(v.dim() and v.shape != parameter.shape for v in values.values() if isinstance(v, Tensor)):
                    raise ValueError
        part = "method"
        if controller is not None and state["controller"] is not None:
            controller.load_state_dict(copy.deepcopy(state["controller"]))
        part = "generator"
        for name, generator in generators.items():
            generator.set_state(state["generators"][name])
        torch.set_rng_state(state["torch_rng"])
        if torch.cuda.is_available() and state["cuda_rng"]:
            torch.cuda.set_rng_state_all(state["cuda_rng"])
    except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(
            f"resume: expected a checkpoint at {path} of this configuration's {part}, got one of another {part}; "
            f"{_way_out(path)}"
        ) from error
    return int(state["step"])


# --- the folder -------------------------------------------------------------------------------------------------------

#: Where lines of the log that are no rows are kept.
BROKEN = "metrics.broken"
#: The first answers that could not be judged.
UNSCORED = "unscored.jsonl"
#: A batch that could not be learned from.
NONFINITE = "nonfinite.safetensors"
#: What a run writes besides its folders, and whatever a driver that starts it adds.
RUN_FILES = (
    *("config.json", "metrics.jsonl", CHECKPOINT, previous_of(Path(CHECKPOINT)).name, BROKEN),
    *(UNSCORED, "samples.jsonl", NONFINITE, REFERENCE),
)
DRIVER_FILES = ("request.json", "run.log")
#: Its folders.
_FOLDERS = ("model", "tensorboard")
#: In the folder of a shared start, written last: the settings that it was made under.
STAMP = "warm_start.json"


def prepare_directory(config: TrainerConfig) -> OwnFiles:
    """Whether the run may be written into its directory; nothing is removed yet.

    FileExistsError for a run that is there and is neither resumed nor replaced, and for files that we did not write
    under the names of ours.
    """
    there = any((config.out / name).exists() for name in ("metrics.jsonl", CHECKPOINT))
    files = own_files(config.out)
    if there and not (config.overwrite or config.resume):
        resume = "--resume to continue it, " if files.has(CHECKPOINT) else ""
        raise FileExistsError(
            f"out: expected a directory without a run, got {config.out}, which holds one; pass {resume}"
            "--overwrite to replace it, or another --out"
        )
    return files


def own_files(out: Path) -> OwnFiles:
    """The files of a run's directory, those of RUN_FILES being ours or not there; leftovers of killed processes are
    removed."""
    files = OwnFiles(out, "run")
    files.check(*RUN_FILES)
    files.tidy()
    for name in _FOLDERS:
        if (out / name).exists():
            OwnFiles(out / name, name, alone=True).tidy()
    return files


def remove_run(files: OwnFiles) -> None:
    """Remove what an earlier run wrote into its directory; the user's own files stay."""
    files.remove(*RUN_FILES)
    for name in _FOLDERS:
        if (files.folder / name).is_dir():
            OwnFiles(files.folder / name, name).remove()


#: Answers that could not be judged and are kept to be looked at.
_KEPT = 20


def note_unscored(path: Path, step: int, unscored: list[dict[str, Any]]) -> None:
    """Keep the first answers that a verifier could not judge, a JSON object a line; a warning for the very first."""
    kept = path.read_bytes().count(b"\n") if unscored and path.exists() else 0
    if unscored and not kept:
        reason = unscored[0]["reason"]
        warnings.warn(f"an answer could not be judged, its reward is 0 ({reason}); see {path}", stacklevel=2)
    if unscored and kept < _KEPT:
        append(path, "".join(json.dumps({"step": step, **answer}) + "\n" for answer in unscored[: _KEPT - kept]))

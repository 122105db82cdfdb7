"""Checkpoints (everything that the rest of a run depends on, with a checksum, and the one before), and a run's folder:
which files in it are the run's, and whether it may be written. What the user put there is never touched (files.py).
"""

from __future__ import annotations

import hashlib
import json
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import torch

import entropy_kernels as ek
from entropy_kernels.trainer.config import TrainerConfig
from entropy_kernels.trainer.files import OwnFiles, read_json, write_atomic

#: Number of the checkpoint's layout; goes up when the meaning of a saved field changes. 2: a checksum at the end.
FORMAT = 2
#: What ends the file: this, the SHA-256 of all before it in hexadecimal digits, a line feed.
_SEAL = b"\nentropy_kernels sha256 "
_SEAL_LENGTH = len(_SEAL) + 64 + 1


class _Hashed:
    """A file that is written once from front to back, hashed on the way."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.hash = hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            count = self._file.write(data)
        except OSError as error:  # torch makes an error of its own of it, without the reason
            self.error = error
            raise
        self.hash.update(data)
        return count

    def flush(self) -> None:
        self._file.flush()


def previous_of(path: Path) -> Path:
    """Where the checkpoint before `path` is kept."""
    return path.with_name(f"{path.stem}.previous{path.suffix}")


def save_checkpoint(
    path: Path,
    *,
    step: int,
    config: dict[str, Any],
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    generators: dict[str, torch.Generator],
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
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "generators": {name: generator.get_state() for name, generator in generators.items()},
        "controller": None if controller is None else controller.state_dict(),
        "torch_rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }

    def write(file: BinaryIO) -> None:
        hashed = _Hashed(file)
        try:
            torch.save(state, hashed)  # type: ignore[arg-type]
        except RuntimeError as error:
            raise hashed.error or error from error
        file.write(_SEAL + hashed.hash.hexdigest().encode() + b"\n")

    try:
        write_atomic(path, write, keep_old=previous_of(path))
    except OSError as error:
        raise OSError(f"{error}; with space to write, --resume continues from it") from error


def load_checkpoint(path: Path) -> dict[str, Any]:
    """The dictionary that :func:`save_checkpoint` wrote, on the CPU.

    Raises FileNotFoundError without a checkpoint, ValueError for one that is damaged, of a newer version, or of another
    program, OSError for one that cannot be read; each says what to do.
    """
    expect_checkpoint(path)
    expected = f"resume: expected a checkpoint at {path}, got "
    state: Any = None
    cause = None
    try:
        got = _damage(path)
    except OSError as error:
        raise OSError(f"{expected}a file that cannot be read ({error.strerror})") from error
    if got is None:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # whole, as its checksums say, but not made by save_checkpoint
            cause = error
        form = state.get("format") if isinstance(state, dict) else None
        if type(form) is int and form > FORMAT:
            raise ValueError(
                f"{expected}one of format {form}, from a newer version: this one reads up to {FORMAT}; update "
                "entropy_kernels"
            )
        if form == FORMAT and not _sealed(path):
            got = "a file whose end, with the checksum, is damaged"
        elif type(form) is not int or form < 1 or not _is_whole(state):
            got = "a file of another program"
    if got is not None:
        raise ValueError(f"{expected}{got}; {_way_out(path)}") from cause
    return state


#: What :func:`save_checkpoint` writes; formats before 2 have no row.
_PARTS = {"step": int, "torch_rng": torch.Tensor, "cuda_rng": list} | dict.fromkeys(
    ("config", "model", "optimizer", "generators"), dict
)


def _is_whole(state: dict[str, Any]) -> bool:
    row = state.get("row")
    if not all(isinstance(state.get(name), kind) for name, kind in _PARTS.items()):
        return False
    tensors = [*state["model"].values(), *state["generators"].values(), *state["cuda_rng"]]
    return (
        type(state["step"]) is int
        and state["step"] >= 0
        and (row is None or (type(row) is dict and type(row.get("step")) is int))
        and {"state", "param_groups"} <= state["optimizer"].keys()
        and all(isinstance(tensor, torch.Tensor) for tensor in tensors)
    )


def expect_checkpoint(path: Path) -> None:
    """Raise FileNotFoundError or IsADirectoryError, with the way out, if there is no file at `path`."""
    if path.is_dir():
        raise IsADirectoryError(f"resume: expected a checkpoint at {path}, got a folder; {_way_out(path)}")
    if not path.exists():
        raise FileNotFoundError(f"resume: expected a checkpoint at {path}, got none; {_way_out(path)}")


def _way_out(path: Path) -> str:
    again = "a run that ended before its first one (save_every) starts again with --overwrite, or under another --out"
    if previous_of(path).is_file():
        return f"the one before is kept: mv {previous_of(path)} {path}, then --resume; {again}"
    return again


def _sealed(path: Path) -> bool:
    with open(path, "rb") as file:
        file.seek(-min(_SEAL_LENGTH, path.stat().st_size), 2)
        return file.read(len(_SEAL)) == _SEAL


def _damage(path: Path) -> str | None:
    """What is wrong with a file, by its checksums: the SHA-256 at its end, or those of a zip file from before that."""
    size = path.stat().st_size
    if size == 0:
        return "an empty file"
    if not _sealed(path):
        try:
            with zipfile.ZipFile(path) as archive:
                return None if archive.testzip() is None else "a damaged file (its checksums do not match)"
        except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, ValueError):
            return f"a file that was cut off, is damaged, or is of another program ({size} bytes)"
    left, found = size - _SEAL_LENGTH, hashlib.sha256()
    with open(path, "rb") as file:
        while left:
            data = file.read(min(left, 1 << 20))
            found.update(data)
            left -= len(data)
        whole = file.read() == _SEAL + found.hexdigest().encode() + b"\n"
    return None if whole else "a damaged file (its checksum does not match)"


def restore(
    state: dict[str, Any],
    path: Path,
    *,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    generators: dict[str, torch.Generator],
    controller: ek.Controller | None = None,
) -> int:
    """Put the checkpoint that was loaded from `path` back in place; returns the number of finished steps.

    ValueError, with the way out, for one that is of another model, or whose optimizer, generators or method are.
    """
    part = "model"
    try:
        model.load_state_dict(state["model"])
        part = "optimizer"
        optimizer.load_state_dict(state["optimizer"])
        for parameter, values in optimizer.state.items():  # torch looks at shapes in its first step
            if any(v.dim() and v.shape != parameter.shape for v in values.values() if isinstance(v, torch.Tensor)):
                raise ValueError
        part = "method"
        if controller is not None and state.get("controller") is not None:  # of a version before it: no memory
            controller.load_state_dict(state["controller"])
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
#: What a run writes besides its folders, and whatever a driver that starts it adds.
RUN_FILES = ("config.json", "metrics.jsonl", "checkpoint.pt", "checkpoint.previous.pt", BROKEN, "unscored.jsonl")
DRIVER_FILES = ("request.json", "run.log")
#: Its folders, and what may stand in them that a version before there were records wrote: these names, no others.
_FOLDERS = {
    "model": re.compile(
        r"(generation_)?config\.json|model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json"
        r"|tokenizer(_config)?\.json|special_tokens_map\.json|added_tokens\.json|chat_template\.jinja"
        r"|vocab\.(json|txt)|merges\.txt|(tokenizer|spiece|sentencepiece\.bpe)\.model"
    ),
    "tensorboard": re.compile(r"events\.out\.tfevents\.\d{10}\.[^/]+\.\d+\.\d+"),
}
#: In the folder of a shared start, written last: the settings that it was made under.
STAMP = "warm_start.json"


def prepare_directory(config: TrainerConfig) -> OwnFiles:
    """Whether the run may be written into its directory; nothing is removed yet.

    FileExistsError for a run that is there and is neither resumed nor replaced, and for files that we did not write
    under the names of ours.
    """
    there = any((config.out / name).exists() for name in ("metrics.jsonl", "checkpoint.pt"))
    files = own_files(config.out, *RUN_FILES, loaded=config.resume)
    if there and not (config.overwrite or config.resume):
        files.tidy()
        resume = "--resume to continue it, " if files.has("checkpoint.pt") else ""
        raise FileExistsError(
            f"out: expected a directory without a run, got {config.out}, which holds one; pass {resume}"
            "--overwrite to replace it, or another --out"
        )
    return files


def own_files(out: Path, *names: str, loaded: bool = False) -> OwnFiles:
    """The files of a run's directory with `names` among them, once leftovers of killed processes are removed.

    What a run left before there were records of files is ours too, as its config.json or a driver's request proves;
    its checkpoint also if it could be `loaded`.
    """
    files = OwnFiles(out, "run")
    ran, asked = (not files.names and check(out) for check in (_has_run, _was_asked_for))
    if asked:
        files.adopt(*DRIVER_FILES)
    if loaded:
        files.adopt("checkpoint.pt")
    if ran:
        files.adopt("config.json", "metrics.jsonl", "checkpoint.pt")
    files.claim(*names)
    files.tidy()
    for name in _FOLDERS:
        if (out / name).exists():
            inner = OwnFiles(out / name, name, alone=not ran)
            if ran:
                adopt_unrecorded(inner, name)
            inner.tidy()
    files.claim(*names)  # once more: names of files that are not there yet are forgotten by tidy
    return files


def adopt_unrecorded(files: OwnFiles, kind: str) -> None:
    """Make ours what a version without records wrote into a folder of a run, which is known to be ours."""
    if not files.names:
        files.adopt(*(path.name for path in files.folder.iterdir() if _FOLDERS[kind].fullmatch(path.name)))


def model_files(folder: Path) -> OwnFiles:
    """The files of a shared start's folder; its stamp proves that it is ours where there is no record."""
    stamp = _fields(folder / STAMP)
    ours = {"warm_seed", "warm_steps", "threads", "torch"} <= stamp.keys()
    files = OwnFiles(folder, "model", alone=not ours)
    if ours and not files.names:
        adopt_unrecorded(files, "model")
        files.adopt(STAMP)
    return files


def report_files(out: Path, kind: str, *names: str) -> OwnFiles:
    """The files of an experiment with its reports, `names`; summary.json proves that earlier ones are ours."""
    files = OwnFiles(out, kind)
    command = f"python -m entropy_kernels.trainer {kind} "
    if not files.names and str(_fields(out / "summary.json").get("command")).startswith(command):
        files.adopt(*names)
    files.tidy()
    files.claim(*names)
    return files


def _has_run(out: Path) -> bool:
    versions = _fields(out / "config.json").get("versions")
    return isinstance(versions, dict) and "entropy_kernels" in versions


def _was_asked_for(out: Path) -> bool:
    """Whether a driver has written a request for the run, with all fields of a configuration at that time."""
    request = _fields(out / "request.json")
    fields = {"out", "seed", "steps", "method", "warm_start_from", "overwrite", "resume", "progress"}
    return fields <= request.keys() and Path(str(request["out"])).name == out.name


def _fields(path: Path) -> dict[str, Any]:
    """Of an object in a JSON file; none if it holds something else."""
    try:
        value = read_json(path)
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def remove_run(files: OwnFiles) -> None:
    """Remove what an earlier run wrote into its directory; the user's own files stay."""
    files.remove(*RUN_FILES)
    for name in _FOLDERS:
        if (files.folder / name).is_dir():
            OwnFiles(files.folder / name, name).remove()


#: Answers that could not be judged and are kept to be looked at.
_KEPT = 20


def note_unscored(path: Path, step: int, unscored: list[dict[str, str]]) -> None:
    """Keep the first answers that a verifier could not judge, a JSON object a line; a warning for the very first."""
    kept = path.read_bytes().count(b"\n") if unscored and path.exists() else 0
    if unscored and not kept:
        reason = unscored[0]["reason"]
        warnings.warn(f"an answer could not be judged, its reward is 0 ({reason}); see {path}", stacklevel=2)
    if unscored and kept < _KEPT:
        with open(path, "a", encoding="utf-8") as file:
            file.writelines(json.dumps({"step": step, **answer}) + "\n" for answer in unscored[: _KEPT - kept])

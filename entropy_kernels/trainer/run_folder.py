"""The folder of a run: which files in it are the run's, whether it may be written, what a verifier could not judge."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any

from entropy_kernels.trainer.config import TrainerConfig
from entropy_kernels.trainer.files import OwnFiles, read_json
from entropy_kernels.trainer.metrics_log import BROKEN

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
#: In the folder of a warm start, written last: the settings that it was made under.
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
    """The files of a warm start's folder; its stamp proves that it is ours where there is no record."""
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

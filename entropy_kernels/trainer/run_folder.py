"""The folder of a run: which files in it are the run's, whether it may be written, what a verifier could not judge."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

from entropy_kernels.trainer.config import TrainerConfig
from entropy_kernels.trainer.files import OwnFiles
from entropy_kernels.trainer.metrics_log import BROKEN

#: What a run writes besides its folders, and whatever a driver that starts it adds.
RUN_FILES = ("config.json", "metrics.jsonl", "checkpoint.pt", "checkpoint.previous.pt", BROKEN, "unscored.jsonl")
DRIVER_FILES = ("request.json", "run.log")
#: Its folders, and how the names of files there began before there were records of them.
_FOLDERS = {
    "model": ("config.json", "generation_config.json", "model", "tokenizer", "special_tokens", "chat_template"),
    "tensorboard": ("events.out.tfevents.",),
}


def prepare_directory(config: TrainerConfig) -> OwnFiles:
    """Whether the run may be written into its directory; nothing is removed yet.

    FileExistsError for a run that is there and is neither resumed nor replaced, and for files that we did not write
    under the names of ours.
    """
    there = any((config.out / name).exists() for name in ("metrics.jsonl", "checkpoint.pt"))
    if there and not (config.overwrite or config.resume):
        resume = "--resume to continue it, " if (config.out / "checkpoint.pt").exists() else ""
        raise FileExistsError(
            f"out: expected a directory without a run, got {config.out}, which holds one; pass {resume}"
            "--overwrite to replace it, or another --out"
        )
    return own_files(config.out, *RUN_FILES, ours=config.resume)


def own_files(out: Path, *names: str, ours: bool = False) -> OwnFiles:
    """The files of a run's directory with `names` among them, once leftovers of killed processes are removed.

    What a run left before there were records of files is ours too: `ours` says so, or its config.json.
    """
    files = OwnFiles(out, "run")
    ours = not files.names and (ours or _left_by_us(out / "config.json"))
    if ours:
        files.adopt(*RUN_FILES, *DRIVER_FILES)
    files.claim(*names)
    files.tidy()
    for name, prefixes in _FOLDERS.items():
        if (out / name).exists():
            inner = OwnFiles(out / name, name, alone=not ours)
            if ours:
                inner.adopt(*(path.name for path in (out / name).iterdir() if path.name.startswith(prefixes)))
            inner.tidy()
    files.claim(*names)  # once more: names of files that are not there yet are forgotten by tidy
    return files


def _left_by_us(path: Path) -> bool:
    try:
        return "entropy_kernels" in json.loads(path.read_text(encoding="utf-8"))["versions"]
    except (OSError, ValueError, KeyError, TypeError):
        return False


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

"""Logs that trainers write, found in folders and read into tables: columns of numbers in the order of writing.

log_text.py reads text; event files of TensorBoard and runs of MLflow are read here. What is a run, and what two tables
have to do with each other, is decided in logs.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from entropy_kernels._console import one_line
from entropy_kernels._memory import without_collection
from entropy_kernels._require import require
from entropy_kernels.analysis.log_text import NAN, Advance, Lines, Table, as_float, broken_lines, read_text
from entropy_kernels.analysis.metric_names import LogError


@dataclass
class Source:
    """A log to be read: a file, a folder of event files or of an MLflow run."""

    path: Path
    kind: str
    """``"file"``, ``"tensorboard"`` or ``"mlflow"``."""
    name: str | None = None
    """The run's name, where the folder tells it."""
    asked: bool = True
    """Named by the user, not found in a folder: an error in it is the user's to know."""

    @property
    def size(self) -> int:
        """Bytes to read."""
        if self.kind == "mlflow":
            return sum(p.stat().st_size for p in (self.path / "metrics").rglob("*") if p.is_file())
        files = self.path.glob("*tfevents*") if self.path.is_dir() else [self.path]
        return sum(p.stat().st_size for p in files)


_TABLES = ("*.jsonl", "*.csv", "*.jsonl.gz", "*.csv.gz", "trainer_state.json")
#: What consoles showed: read where a folder has nothing better.
CONSOLE = ("*.log", "*.out")


def sources(path: Path, name: str | None = None, depth: int = 6, patterns: Sequence[str] = _TABLES) -> list[Source]:
    """The logs at ``path``: a file, or what a folder holds; empty if it holds none.

    In a folder, in this order: an MLflow run; event files; files of ``patterns``; the newest
    ``checkpoint-N/trainer_state.json``, which has all rows of those before it; else what its subfolders hold, each
    a run of the subfolder's name.
    """
    if not path.is_dir():
        return [Source(path, "tensorboard" if "tfevents" in path.name else "file", name)]
    if (path / "metrics").is_dir() and (path / "meta.yaml").exists():
        return [Source(path, "mlflow", _mlflow_name(path), asked=False)]
    if any(path.glob("*tfevents*")):
        return [Source(path, "tensorboard", name, asked=False)]
    files = sorted(p for pattern in patterns for p in path.glob(pattern) if p.is_file())
    if not files:
        states = [(int(p.parent.name.rpartition("-")[2]), p) for p in path.glob("checkpoint-*/trainer_state.json")
                  if p.parent.name.rpartition("-")[2].isdecimal()]  # fmt: skip
        files = [max(states)[1]] if states else []
    if files:
        return [Source(p, "file", name, asked=False) for p in files]
    found: list[Source] = []
    for folder in sorted(p for p in path.iterdir() if p.is_dir() and not p.is_symlink() and p.name[0] != "."):
        if depth > 0:
            found += sources(folder, folder.name if name is None else f"{name}/{folder.name}", depth - 1, patterns)
    return found


def passed_over(path: Path, used: Collection[Path]) -> list[str]:
    """Names of what may be logs in the folder ``path`` as well, and is not among the paths ``used``, resolved."""
    path = path.resolve()
    if not path.is_dir() or path in used:  # a run of MLflow, a folder of TensorBoard
        return []
    files = sorted(p for pattern in CONSOLE for p in path.glob(pattern) if p.is_file() and p.resolve() not in used)
    folders = [
        folder
        for folder in sorted(p for p in path.iterdir() if p.is_dir() and not p.is_symlink() and p.name[0] != ".")
        if not folder.name.startswith("checkpoint-") and not any(p.is_relative_to(folder) for p in used)
    ]
    return [*(p.name for p in files), *(f"{p.name}/" for p in folders if sources(p, depth=2))]


def read(source: Source, advance: Advance) -> list[Table]:
    """The tables of a source, one per run that it tells apart by itself.

    :class:`LogError` if nothing in it can be read.
    """
    # rows have no cycles, and for millions of them the search takes as long as all the rest
    with without_collection():
        if source.kind == "tensorboard":
            tables = [_read_tensorboard(source.path, advance)]
        elif source.kind == "mlflow":
            tables = [_read_mlflow(source.path, advance)]
        else:
            tables = read_text(source.path, advance)
    beside = source.path if source.path.is_dir() else source.path.parent
    settings = _settings(beside / "config.json")
    for table in tables:
        if table.name is None:
            table.names = "folder"
        table.name, table.asked = table.name or source.name, source.asked
        table.settings = {**settings, **table.settings}
    return tables


def _settings(path: Path) -> dict[str, Any]:
    """What a ``config.json`` beside a log says, nested keys joined with "/". Empty if there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return dict(_flat(content, "")) if isinstance(content, dict) else {}


def _flat(content: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in content.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", value


# --- folders that trackers write -------------------------------------------------------------------------------------


def _read_tensorboard(path: Path, advance: Advance) -> Table:
    """The scalars of an event file, or of all event files of a folder, in the order of their names: of their dates."""
    loader = require("tensorboard.backend.event_processing.event_file_loader", "reading TensorBoard events")
    tensor_util = require("tensorboard.util.tensor_util", "reading TensorBoard events")
    pd = require("pandas", "reading TensorBoard events")
    files = sorted(path.glob("*tfevents*")) if path.is_dir() else [path]
    steps: list[int] = []
    columns: dict[str, tuple[list[int], list[float]]] = {}
    kinds: dict[str, str] = {}
    notes = []
    for file in files:
        fresh, read = True, 0
        try:
            for event in loader.LegacyEventFileLoader(str(file)).Load():
                for value in event.summary.value:
                    if value.HasField("metadata"):
                        kinds.setdefault(value.tag, value.metadata.plugin_data.plugin_name)
                    if value.HasField("simple_value"):
                        number = value.simple_value
                    elif value.HasField("tensor") and kinds.get(value.tag) == "scalars":
                        number = float(tensor_util.make_ndarray(value.tensor))
                    else:
                        continue
                    rows, values = columns.setdefault(value.tag, ([], []))
                    # a new row with a new step, or where the tag has a value in this one
                    if fresh or steps[-1] != event.step or (rows and rows[-1] == len(steps) - 1):
                        steps.append(event.step)
                        fresh = False
                    rows.append(len(steps) - 1)
                    values.append(number)
                read += 1
                if read == 1000:
                    advance(read * 50)
                    read = 0
        except Exception as error:  # whatever the loader raises on bytes that are no record
            notes.append(f"{file.name} is broken and was read up to there: {one_line(error)}")
    if not columns:
        raise LogError(f"{path} holds no TensorBoard scalars")
    frame: dict[str, Any] = {"step": np.array(steps, float)}
    nan: dict[str, list[int]] = {}
    for tag, (rows, values) in columns.items():
        if tag == "step":
            continue
        frame[tag] = np.full(len(steps), np.nan)
        frame[tag][rows] = values
        if np.isnan(values).any():
            nan[tag] = [row for row, value in zip(rows, values, strict=True) if np.isnan(value)]
    return Table(path, None, pd.DataFrame(frame), notes, nan)


def _read_mlflow(path: Path, advance: Advance) -> Table:
    """A run of MLflow's file store: ``metrics/<name>`` holds lines "timestamp value step"."""
    pd = require("pandas", "reading an MLflow run")
    notes: list[str] = []
    parts = []
    for file in sorted(p for p in (path / "metrics").rglob("*") if p.is_file() and p.name[0] != "."):
        name, good, broken = file.relative_to(path / "metrics").as_posix(), [], []
        for number, line in Lines(file, advance):
            cells = line.split()
            numbers = [as_float(cell) for cell in cells]
            if len(cells) >= 2 and not np.isnan(numbers[0]) and (not np.isnan(numbers[1]) or NAN.match(cells[1])):
                good.append((numbers[0], numbers[2] if len(cells) > 2 else number - 1.0, numbers[1]))
            elif line.strip():
                broken.append(number)
        notes += broken_lines(file, broken, "not 'timestamp value step'")
        if good:
            parts.append((name, np.array(good)))
    if not parts:
        raise LogError(f"{path} holds no MLflow metrics")
    # a call of log_metrics gives all its metrics one timestamp
    keys = np.unique(np.concatenate([values[:, :2] for _, values in parts]), axis=0)
    index = pd.MultiIndex.from_arrays(keys.T)
    frame: dict[str, Any] = {"step": keys[:, 1]}
    nan: dict[str, list[int]] = {}
    for name, values in parts:
        at = index.get_indexer(pd.MultiIndex.from_arrays(values[:, :2].T))
        frame[name] = np.full(len(keys), np.nan)
        frame[name][at] = values[:, 2]
        if np.isnan(values[:, 2]).any():
            nan[name] = at[np.isnan(values[:, 2])].tolist()
    settings = {p.relative_to(path / "params").as_posix(): p.read_text(errors="replace")[:200].strip()
                for p in (path / "params").rglob("*") if p.is_file()}  # fmt: skip
    return Table(path, _mlflow_name(path), pd.DataFrame(frame), notes, nan, settings, "one of several")


def _mlflow_name(path: Path) -> str:
    tag = path / "tags" / "mlflow.runName"
    if tag.is_file() and (name := tag.read_text(errors="replace").strip()):
        return name
    match = re.search(r"^run_name: *(.+?) *$", (path / "meta.yaml").read_text(errors="replace"), re.MULTILINE)
    return match[1].strip("'\"") if match and match[1] not in ("''", "null") else path.name

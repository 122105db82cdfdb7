"""Readers for the logs that trainers write, and the pairing of sparse evaluations with dense entropies.

CSV (also W&B exports), JSON lines (also verl's file logger, which nests its metrics under ``data``), the
``trainer_state.json`` of transformers, verl's console output, and TensorBoard event files or directories. All become
a DataFrame of floats with a ``step`` column, one row per step, sorted.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from entropy_kernels._require import require
from entropy_kernels.analysis.metric_names import LogError

if TYPE_CHECKING:
    from pandas import DataFrame, Series

# Steps that count optimisation come before W&B's own _step, which counts calls of log().
STEP_COLUMNS = (
    "step", "global_step", "train/global_step", "training/global_step", "trainer/global_step", "Step", "_step",
)  # fmt: skip
# Wrappers whose content is the row itself; other nested keys are joined with "/".
_WRAPPERS = ("data", "metrics", "logs")
_ANSI = re.compile(r"\x1b\[[0-9;]*m")
_VERL_LINE = re.compile(r"(?<![\w/])step:(\d+) - (.+)$")
_NUMPY_REPR = re.compile(r"^np\.\w+\((.*)\)$")


def read_log(path: str | Path) -> DataFrame:
    """Read a log into float columns with ``step``, one row per step in ascending order.

    The kind is chosen by name (``.csv``, ``.tsv``, ``.jsonl``, ``.json``, ``*tfevents*``, a directory), else by
    content. Rows of one step are merged, the later value winning, so a run that was resumed and one that logs its
    evaluations apart both read as one series. Columns without a number are left out. What was skipped is told in
    ``frame.attrs["notes"]``, a list of sentences.

    Raises :class:`FileNotFoundError`, or :class:`~entropy_kernels.analysis.metric_names.LogError` if nothing in it
    can be read.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no such file or directory: {path}")
    if path.is_dir():
        path = _in_directory(path)
    notes: list[str] = []
    if path.is_dir() or "tfevents" in path.name:
        frame = _read_tensorboard(path)
    elif path.stat().st_size == 0:
        raise LogError(f"{path} is empty")
    elif path.suffix.lower() in (".csv", ".tsv"):
        frame = _read_csv(path)
    else:
        rows = _read_rows(path, notes)
        if not rows:
            raise LogError(f"{path} has no rows")
        frame = require("pandas", "reading a log").DataFrame(rows)
    frame = _tidy(frame, path, notes)
    frame.attrs["notes"] = notes
    return frame


def pairs(
    log: DataFrame,
    entropy: Series | str = "entropy",
    performance: Series | str = "val_pass1",
    *,
    align: Literal["last", "mean"] = "last",
) -> DataFrame:
    """One row (``step``, ``entropy``, ``performance``) per evaluation of a log in which evaluations are sparser.

    ``align="last"`` pairs an evaluation with the entropy of its own step or else the latest since the evaluation
    before it; ``"mean"`` with the mean of all entropies since the evaluation before it, which is smoother but lags by
    half an interval. An evaluation before the first entropy (step 0, before training) takes the first entropy after
    it, up to the next evaluation: trainers measure that one on the same, not yet updated policy. Evaluations without
    any entropy are left out; ``frame.attrs["unpaired"]`` counts them.

    Args:
        log: as :func:`read_log` returns it: a ``step`` column, rows of ascending step.
        entropy, performance: column names, or Series on the log's index.
    """
    if align not in ("last", "mean"):
        raise ValueError(f"align: expected 'last' or 'mean', got {align!r}")
    pd = require("pandas", "pairing a log")
    steps = log["step"].to_numpy(float)
    h = (log[entropy] if isinstance(entropy, str) else entropy).to_numpy(float)
    r = (log[performance] if isinstance(performance, str) else performance).to_numpy(float)
    has_h = ~np.isnan(h)
    h_steps, h_values = steps[has_h], h[has_h]
    evaluated = np.flatnonzero(~np.isnan(r))
    rows, before = [], -np.inf
    for position, row in enumerate(evaluated):
        window = h_values[(h_steps > before) & (h_steps <= steps[row])]
        if len(window) == 0 and position == 0:
            until = steps[evaluated[1]] if len(evaluated) > 1 else np.inf
            window = h_values[(h_steps > steps[row]) & (h_steps <= until)][:1]
        before = steps[row]
        if len(window):
            rows.append((steps[row], window[-1] if align == "last" else window.mean(), r[row]))
    frame = pd.DataFrame(rows, columns=["step", "entropy", "performance"], dtype=float)
    frame.attrs["unpaired"] = len(evaluated) - len(rows)
    return frame


def _in_directory(path: Path) -> Path:
    """The log in a run's directory: its event files, those of its only sub-run, or its only JSONL or CSV file."""
    if any(path.glob("*tfevents*")):
        return path
    nested = sorted({event.parent for event in path.rglob("*tfevents*")})
    files = sorted(p for pattern in ("*.jsonl", "*.csv", "trainer_state.json") for p in path.glob(pattern))
    # A file at the top holds the run's rows; event files below it are a copy for TensorBoard.
    for candidates in (files, nested):
        if len(candidates) == 1:
            return candidates[0]
        if candidates:
            names = ", ".join(str(p.relative_to(path)) for p in candidates[:20])
            raise LogError(f"{path} holds several logs; name one of them: {names}")
    raise LogError(f"{path} holds no log: expected event files (*tfevents*), *.jsonl, *.csv or trainer_state.json")


def _read_csv(path: Path) -> DataFrame:
    pd = require("pandas", "reading a CSV log")
    try:
        frame = pd.read_csv(path, sep="\t" if path.suffix.lower() == ".tsv" else ",", skipinitialspace=True)
    except pd.errors.EmptyDataError:
        raise LogError(f"{path} is empty") from None
    except (pd.errors.ParserError, UnicodeDecodeError) as error:
        raise LogError(f"{path} is not CSV: {_one_line(error)}") from None
    if len(frame) == 0:
        raise LogError(f"{path} has no rows")
    # W&B's chart export: "run name - metric", and __MIN, __MAX of each
    frame = frame[[c for c in frame.columns if not str(c).endswith(("__MIN", "__MAX"))]]
    owners = {str(c).partition(" - ")[0] for c in frame.columns if " - " in str(c)}
    if len(owners) == 1:
        frame = frame.rename(columns=lambda c: str(c).partition(" - ")[2] or c)
        frame = frame.loc[:, ~frame.columns.duplicated()]
    return frame


def _read_rows(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    """Rows of a JSON, JSONL or console log."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise LogError(f"{path} is not text: {_one_line(error)}") from None
    if path.suffix.lower() in (".jsonl", ".ndjson"):
        return _jsonl(text, path, notes)
    if path.suffix.lower() == ".json" or text.lstrip()[:1] in ("{", "["):
        try:
            return _json_rows(json.loads(text), path)
        except json.JSONDecodeError as error:
            if text.lstrip()[:1] == "{" and "\n" in text.strip():
                return _jsonl(text, path, notes)
            raise LogError(f"{path} is not JSON: {error}") from None
    rows = list(_verl_console(text))
    if not rows:
        raise LogError(f"{path}: expected CSV, JSON lines, TensorBoard events or verl's 'step:N - name:value' lines")
    return rows


def _jsonl(text: str, path: Path, notes: list[str]) -> list[dict[str, Any]]:
    lines = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    rows = []
    for number, line in lines:
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            if number == lines[-1][0] and not text.endswith("\n"):
                notes.append(f"line {number} is cut off (a run that was stopped while writing?) and was left out")
                break
            raise LogError(f"{path}, line {number}: not JSON: {error}") from None
        if not isinstance(row, dict):
            raise LogError(f"{path}, line {number}: expected an object, got {type(row).__name__}")
        rows.append(dict(_flatten(row)))
    return rows


def _json_rows(content: Any, path: Path) -> list[dict[str, Any]]:
    """trainer_state.json, a list of objects, or a single object (a JSONL of one line)."""
    if isinstance(content, dict):
        content = content.get("log_history", [content])
    if not isinstance(content, list) or not all(isinstance(row, dict) for row in content):
        raise LogError(f"{path}: expected a list of objects or a trainer_state.json with log_history")
    return [dict(_flatten(row)) for row in content]


def _flatten(row: dict[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in row.items():
        if isinstance(value, dict):
            yield from _flatten(value, prefix if key in _WRAPPERS else f"{prefix}{key}/")
        elif not isinstance(value, (list, tuple)):
            yield f"{prefix}{key}", value


def _verl_console(text: str) -> Iterable[dict[str, Any]]:
    """Rows of verl's console logger: ``step:12 - actor/entropy:0.41 - …``, behind any prefix of Ray's."""
    for line in text.splitlines():
        match = _VERL_LINE.search(_ANSI.sub("", line))
        if match is None:
            continue
        row: dict[str, Any] = {"step": int(match[1])}
        for item in match[2].split(" - "):
            name, _, value = item.rpartition(":")
            # numpy >= 2 prints its scalars as np.float64(0.5)
            value = _NUMPY_REPR.sub(r"\1", value.strip())
            try:
                row[name.strip()] = float(value)
            except ValueError:
                continue
        yield row


def _read_tensorboard(path: Path) -> DataFrame:
    accumulator = require("tensorboard.backend.event_processing.event_accumulator", "reading TensorBoard events")
    tensor_util = require("tensorboard.util.tensor_util", "reading TensorBoard events")
    pd = require("pandas", "reading TensorBoard events")
    # 0 = keep every event; the default is a random sample
    events = accumulator.EventAccumulator(
        str(path), size_guidance={accumulator.SCALARS: 0, accumulator.TENSORS: 0}
    ).Reload()
    tags = events.Tags()
    columns: dict[str, Any] = {}
    for tag in tags["scalars"]:
        series = events.Scalars(tag)
        columns[tag] = pd.Series([e.value for e in series], index=[e.step for e in series])
    for tag in tags["tensors"]:
        if events.SummaryMetadata(tag).plugin_data.plugin_name == "scalars":
            tensors = events.Tensors(tag)
            values = [float(tensor_util.make_ndarray(e.tensor_proto)) for e in tensors]
            columns[tag] = pd.Series(values, index=[e.step for e in tensors])
    if not columns:
        raise LogError(f"{path} holds no TensorBoard scalars")
    # a resumed run writes some steps twice: the later one counts
    frame = pd.DataFrame({tag: s[~s.index.duplicated(keep="last")] for tag, s in columns.items()})
    frame.insert(0, "step", frame.index.to_numpy(float))
    return frame.loc[:, ~frame.columns.duplicated()]


def _tidy(frame: DataFrame, path: Path, notes: list[str]) -> DataFrame:
    """Float columns, one row per step, ascending."""
    pd = require("pandas", "reading a log")
    frame = frame.rename(columns=str).reset_index(drop=True)
    numbers = {
        name: pd.to_numeric(column, errors="coerce").astype(float)
        for name, column in frame.items()
        if not pd.api.types.is_datetime64_any_dtype(column)
    }
    numbers = {name: column for name, column in numbers.items() if column.notna().any()}
    known = [name for name in STEP_COLUMNS if name in numbers]
    # one that every row has, else the best known
    step = next((name for name in known if numbers[name].notna().all()), known[0] if known else None)
    if not numbers:
        raise LogError(f"{path} has no numeric columns")
    if step is None:
        notes.append(f"no step column ({', '.join(STEP_COLUMNS[:3])}, …): rows are numbered in their order")
        steps = pd.Series(np.arange(len(frame), dtype=float))
    else:
        steps = numbers.pop(step)
        numbers.pop("step", None)
    tidy = pd.DataFrame({"step": steps, **numbers})
    without = int(tidy["step"].isna().sum())
    if without:
        notes.append(f"{without} of {len(tidy)} rows have no step and were left out")
    # last() skips NaN, so a row of evaluations completes the row of training metrics of the same step
    return tidy.dropna(subset=["step"]).groupby("step", sort=True).last().reset_index()


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())

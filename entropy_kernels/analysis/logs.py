"""The runs in the logs that trainers write, and the pairing of sparse evaluations with dense entropies.

log_files.py and log_text.py read files into tables: CSV (also W&B exports), JSON lines (also verl's file logger), the
``trainer_state.json`` of transformers, what verl, TRL, slime and prime-rl print, TensorBoard events, MLflow runs. Here
it is decided which rows make one run: files that complete each other are joined, files and parts of files that do not
are kept apart, a run that was resumed is told from one that was started anew. What was decided is said in notes.
"""

from __future__ import annotations

import fnmatch
import itertools
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from entropy_kernels._arguments import word
from entropy_kernels._require import require
from entropy_kernels.analysis.log_files import CONSOLE, Source, passed_over, read, sources
from entropy_kernels.analysis.log_text import IDENTITY, Table, as_float, listed
from entropy_kernels.analysis.metric_names import ENTROPY, TRAINING, VALIDATION, LogError, known

if TYPE_CHECKING:
    from pandas import DataFrame, Series

# Steps that count optimisation come before W&B's own _step, which counts calls of log().
STEP_COLUMNS = (
    "step", "global_step", "train/global_step", "training/global_step", "trainer/global_step", "train/step",
    "rollout/step", "global_step/max_steps", "Step", "_step",
)  # fmt: skip
# Columns that say when, how long and how far: two tables may share them and still complete each other.
_BOOKKEEPING = re.compile(
    r"(^|/)_?(step|epoch|runtime|timestamp|wall.?time|time|date|num_tokens|total_flos|lr|learning_rate|seed|"
    r"global_step|max_steps|policy_version)$|^(time|timing|timing_s|perf|memory|system)/|^relative time|_per_second$|"
    r"^unnamed: \d+$",
    re.IGNORECASE,
)
# Names of files that say nothing about the run in them.
_GENERIC = re.compile(r"(metrics?|logs?|logging|train(er)?(_state|_log)?|progress|history|console|output|stdout|data)")
# Said where it is so for many values, and they differ.
_MIXED = "; they differ: if two runs or ranks wrote into this log at once, the law of the mixture means nothing"
# A second run begins where the first did, or within its first interval; and no run is resumed within its first
# hundredth.
_NEAR = 0.01


@dataclass
class Run:
    """A run of a trainer, out of one log or several.

    Attributes:
        name: as the log, its file or its folder names it; ``name#2`` for the second of a file.
        frame: float columns with ``step``, one row per step in ascending order; no infinite values.
        paths: the files and folders that it was read from.
        notes: what was left out, joined or kept apart, in sentences.
        not_finite: column → steps whose value is infinite or NaN.
        settings: those that stand beside the log: of MLflow, of this package's ``config.json``.

    Source:
        docs/entropy-law.md.
    """

    name: str
    frame: DataFrame
    paths: tuple[Path, ...]
    notes: list[str] = field(default_factory=list)
    not_finite: dict[str, list[float]] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def full_name(self) -> str:
        """The name, with its folder's where it says nothing (``metrics``)."""
        if not self.paths or not _GENERIC.fullmatch(self.name.partition("#")[0]):
            return self.name
        return f"{self.paths[0].resolve().parent.name}/{self.name}"


def read_logs(
    paths: Sequence[str | Path], *, run: str | None = None, progress: Callable[[int, int], None] | None = None
) -> list[Run]:
    """Read logs and tell the runs in them apart.

    A log is a file, packed (``.gz``, ``.bz2``, ``.xz``) or not, a pipe of text (``-``: stdin), or a folder of runs. The
    kind is chosen by name (``.csv``, ``.tsv``, ``.jsonl``, ``.json``, ``*tfevents*``, a folder), else by content. Rows
    of one step are merged, the later value winning, so that evaluations which are logged in rows of their own complete
    their step. Columns without a number are left out.

    One run: tables that name the same run (W&B's exports, one metric per file), and tables without a name that share no
    metric (training beside validation). Several: what names itself so, and a log whose steps start again where they
    began. Steps that go back to a later one are a run that was resumed: rows beyond that step are replaced.

    Args:
        paths: files and folders.
        run: only the runs of this name, or of a pattern with ``*``.
        progress: called with how much is read and how much there is, in bytes, about.

    Returns:
        The runs, in the order of the logs.

    Raises:
        FileNotFoundError: there is no such file or folder.
        LogError: a ValueError; nothing in them can be read, or ``run`` names none.
        ImportError: pandas is missing, or what a format needs (extra ``analysis``).

    Source:
        docs/entropy-law.md.
    """
    by_path: dict[Path, Source] = {}  # a log that is named twice counts once
    for source in (source for path in map(Path, paths) for source in _sources(path)):
        by_path.setdefault(source.path.resolve(), source)
    found = list(by_path.values())
    total, done = sum(source.size for source in found), 0

    def advance(count: int) -> None:
        nonlocal done
        done = min(done + count, total)
        if progress is not None:
            progress(done, total)

    parts, errors = [], list[str]()
    for folder in dict.fromkeys(map(Path, paths)):
        if names := passed_over(folder, by_path.keys()):
            errors.append(f"{folder} holds {listed(names)} as well, which is not read: name what is to be read")
    for source in found:
        try:
            parts += [part for table in read(source, advance) for part in _parts(table)]
        except LogError as error:
            if source.asked or len(found) == 1:
                raise
            errors.append(f"{error}; left out")
    if not parts:
        raise LogError(next(e for e in errors if e.endswith("; left out")).removesuffix("; left out"))
    runs = [run for group, notes in _groups(parts) for run in _runs(group, notes)]
    _name_apart(runs)
    for each in runs:
        each.notes += errors
    return runs if run is None else _named(runs, run)


def read_log(path: str | Path, *, run: str | None = None) -> DataFrame:
    """The only run of a log, or the one that ``run`` names, as a frame.

    Args:
        path: a file or a folder.
        run: as in :func:`read_logs`.

    Returns:
        :class:`Run`'s frame; ``frame.attrs["notes"]`` has its notes.

    Raises:
        LogError: also where it holds several runs, with their names; and what :func:`read_logs` raises.

    Source:
        docs/entropy-law.md.
    """
    runs = read_logs([path], run=run)
    if len(runs) > 1:
        raise LogError(f"{path} holds {len(runs)} runs; name one: {', '.join(each.name for each in runs)}")
    runs[0].frame.attrs["notes"] = runs[0].notes
    return runs[0].frame


def pairs(
    log: DataFrame,
    entropy: Series | str = "entropy",
    performance: Series | str = "val_pass1",
    *,
    align: Literal["last", "mean"] = "last",
) -> DataFrame:
    """Each evaluation of a log in which evaluations are sparser, with an entropy.

    ``align="last"`` pairs an evaluation with the entropy of its own step or else the latest since the evaluation
    before it; ``"mean"`` with the mean of all entropies since the evaluation before it, which is smoother but lags by
    half an interval. An evaluation before the first entropy (step 0, before training) takes the first entropy after
    it, up to the next evaluation: trainers measure that one on the same, not yet updated policy. Evaluations without
    any entropy are left out.

    Args:
        log: a ``step`` column, rows of ascending step, as :func:`read_log` returns.
        entropy, performance: column names, or Series on the log's index.
        align: which entropy: the last one, or the mean.

    Returns:
        A row (``step``, ``entropy``, ``performance``) per evaluation; ``frame.attrs["unpaired"]`` counts those
        that are left out.

    Raises:
        KeyError: the log lacks a column.
        ValueError: another ``align``.
        ImportError: pandas is missing (extra ``analysis``).

    Source:
        docs/entropy-law.md.
    """
    word("align", align, ("last", "mean"))
    pd = require("pandas", "pairing a log")
    steps = log["step"].to_numpy(float)
    h = (log[entropy] if isinstance(entropy, str) else entropy).to_numpy(float)
    r = (log[performance] if isinstance(performance, str) else performance).to_numpy(float)
    h_steps, h = steps[~np.isnan(h)], h[~np.isnan(h)]
    r_steps, r = steps[~np.isnan(r)], r[~np.isnan(r)]
    # The windows of the evaluations lie side by side: h[begin[i]:end[i]] are the entropies since the one before.
    end = np.searchsorted(h_steps, r_steps, side="right")
    begin = np.concatenate([[0], end[:-1]]).astype(int)
    has = end > begin
    values = np.full(len(r), np.nan)
    if align == "last":
        values[has] = h[end[has] - 1]
    elif has.any():
        values[has] = np.add.reduceat(h[: end[-1]], begin[has]) / (end - begin)[has]
    if len(r) and not has[0] and len(h) and h_steps[0] <= (r_steps[1] if len(r) > 1 else np.inf):
        values[0], has[0] = h[0], True
    frame = pd.DataFrame({"step": r_steps[has], "entropy": values[has], "performance": r[has]})
    frame.attrs["unpaired"] = int((~has).sum())
    return frame


# --- which rows are a run --------------------------------------------------------------------------------------------


@dataclass
class _Part:
    """A table with its steps."""

    table: Table
    steps: np.ndarray
    frame: DataFrame  # float columns, without steps
    rows: np.ndarray  # of the table
    notes: list[str]

    @property
    def metrics(self) -> set[str]:
        return {name for name in self.frame.columns if not _BOOKKEEPING.search(name)}

    def take(self, rows: np.ndarray, notes: Iterable[str] = ()) -> _Part:
        return _Part(self.table, self.steps[rows], self.frame.iloc[rows], self.rows[rows], [*self.notes, *notes])


def _sources(path: Path) -> list[Source]:
    if path == Path("-"):
        path = Path("/dev/stdin")
    if not path.exists():
        raise FileNotFoundError(f"no such file or directory: {path}")
    found = sources(path) or sources(path, patterns=CONSOLE)
    if not found:
        raise LogError(
            f"{path} holds no log: expected event files (*tfevents*), *.jsonl, *.csv, trainer_state.json, "
            "checkpoint-N/trainer_state.json, MLflow runs or a console's *.log, in it or in folders below it"
        )
    return found


def _parts(table: Table) -> list[_Part]:
    """The table's steps and numbers, apart for each run that a column of text names."""
    pd = require("pandas", "reading a log")
    frame, notes = table.frame.rename(columns=str), list(table.notes)
    frame = frame.loc[:, ~frame.columns.duplicated()]
    numbers: dict[str, Any] = {}
    texts = {}
    for name, column in frame.items():
        if pd.api.types.is_float_dtype(column):
            numbers[name] = column.to_numpy()
        elif not pd.api.types.is_datetime64_any_dtype(column):
            if name == "global_step/max_steps":
                column = column.astype(str).str.partition("/")[0]
            values = _numbers(column)
            if np.isnan(values).all() and pd.api.types.is_string_dtype(column):  # "0,5", in quotes
                values = _numbers(column.astype(str).str.replace(",", ".", n=1, regex=False))
            if name in IDENTITY and np.isnan(values).all():
                texts[name] = column
            numbers[name] = values
    numbers = {name: column for name, column in numbers.items() if not np.isnan(column).all()}
    if not numbers:
        raise LogError(f"{table.path} has no numeric columns")
    candidates = [name for name in STEP_COLUMNS if name in numbers]
    # one that every row has, else the best known
    step = next((c for c in candidates if not np.isnan(numbers[c]).any()), candidates[0] if candidates else None)
    rows = np.arange(len(frame))
    if step is None:
        notes.append(f"no step column ({', '.join(STEP_COLUMNS[:3])}, …): rows are numbered in their order")
        steps = rows.astype(float)
    else:
        steps = numbers.pop(step)
        if step.endswith("global_step"):  # of training; rows of evaluation may have theirs
            for name in [name for name in numbers if name.endswith("global_step")]:
                other = numbers.pop(name)
                steps = np.where(np.isnan(steps), other, steps)
        numbers.pop("step", None)
        rows = rows[np.isfinite(steps)]
        if len(rows) < len(steps):
            notes.append(f"{len(steps) - len(rows)} of {len(steps)} rows have no step and were left out")
    whole = _Part(table, steps, pd.DataFrame(numbers, index=frame.index), np.arange(len(frame)), notes).take(rows)
    if len(whole.steps) == 0:
        raise LogError(f"{table.path} has no row with a step")
    for name in IDENTITY:  # numbers, where a step has more than one: else what counts up with the steps
        if name in whole.frame and (owners := whole.frame[name]).groupby(whole.steps).nunique().max() > 1:
            texts[name] = owners.map(lambda value: f"{value:.15g}", na_action="ignore").reindex(frame.index)
    for name, column in texts.items():
        owners = column.iloc[rows].astype(object).where(column.iloc[rows].notna(), "").astype(str)
        if owners.nunique() > 1:
            return [_named_part(whole, np.flatnonzero(owners == owner), owner, name) for owner in owners.unique()]
    return [whole]


def _numbers(column: Series) -> np.ndarray:
    """float64; NaN for what is no number."""
    try:
        values = require("pandas", "reading a log").to_numeric(column, errors="coerce")
        return values.to_numpy(float, na_value=np.nan)
    except OverflowError:  # an integer beyond float64
        return np.array([as_float(value) for value in column])


def _named_part(whole: _Part, rows: np.ndarray, owner: str, column: str) -> _Part:
    part = whole.take(rows, [f"{whole.table.path.name} holds several runs, told apart by its column {column}"])
    table = whole.table
    named = Table(table.path, owner or "without a name", table.frame, table.notes, table.nan, table.settings)
    return _Part(named, part.steps, part.frame.dropna(axis=1, how="all"), part.rows, part.notes)


def _groups(parts: list[_Part]) -> list[tuple[list[_Part], list[str]]]:
    """Parts that make one run, with notes about why."""
    told: dict[tuple[str, str], list[_Part]] = {}
    untold: dict[Path, list[_Part]] = {}
    for part in parts:
        if part.table.name is not None and part.table.names != "folder":
            own = str(part.table.path) if part.table.names == "one of several" else ""
            told.setdefault((part.table.name, own), []).append(part)
        else:
            untold.setdefault(part.table.path.parent, []).append(part)
    same = "they name the same runs" if len(told) > 1 else "they name the same run"
    groups = [(group, _joined(group, same)) for group in told.values()]
    loose = [part for group in untold.values() for part in group]
    if len(told) == 1 and loose and _complete([*groups[0][0], *loose]):
        return [([*groups[0][0], *loose], _joined([*groups[0][0], *loose], "they complete each other"))]
    if len(loose) > 1 and _complete(loose) and all(part.table.asked for part in loose):
        return [*groups, (loose, _joined(loose, "they complete each other"))]
    for group in untold.values():
        if len(group) > 1 and not all(part.table.asked for part in group):
            # beside the log of a run lie completions, samples, tables of other kinds
            group = [part for part in group if known(list(part.frame.columns))] or group
        if len(group) > 1 and _complete(group):
            groups.append((group, _joined(group, "they complete each other")))
        else:
            groups += [([part], []) for part in group]
    if len(loose) > 1 and len(groups) > 1:
        apart = "several logs with metrics in common are taken for several runs"
        groups = [(group, notes or [apart]) for group, notes in groups]
    return groups


def _complete(parts: Sequence[_Part]) -> bool:
    """Whether the parts are one run's: they have no metric in common, or one has its entropy and the other its
    performance alone."""
    return all(
        a.metrics.isdisjoint(b.metrics) or {_lacks(a), _lacks(b)} == {(True, False), (False, True)}
        for a, b in itertools.combinations(parts, 2)
    )


def _lacks(part: _Part) -> tuple[bool, bool]:
    """Whether the part is without a known entropy, without a known performance."""
    return not known(list(part.metrics), ENTROPY), not known(list(part.metrics), (*VALIDATION, *TRAINING))


def _joined(group: Sequence[_Part], why: str) -> list[str]:
    paths = list(dict.fromkeys(part.table.path for part in group))
    names = [path.name for path in paths]
    said = ", ".join(names if len(set(names)) == len(names) else map(str, paths))
    if len(set(names)) == len(names) and len(said) > 60:  # W&B's exports: a date and a time each
        said = f"{len(names)} logs"
    return [f"{said} are read together: {why}"] if len(names) > 1 else []


def _runs(group: list[_Part], notes: list[str]) -> list[Run]:
    """The runs of a group: as many as its parts have; parts that have one each are joined."""
    apart = [_sessions(part) for part in group]
    if len({len(sessions) for sessions in apart}) > 1:
        notes = [*notes, "these logs hold different numbers of runs, so they could not be joined"]
        joined = [[session] for sessions in apart for session in sessions]
    else:
        joined = [list(sessions) for sessions in zip(*apart, strict=True)]
    base = _base_name(group)
    names = [base if len(joined) == 1 else f"{base}#{i}" for i in range(1, len(joined) + 1)]
    return [_tidy(name, sessions, notes) for name, sessions in zip(names, joined, strict=True)]


def _base_name(group: Sequence[_Part]) -> str:
    table = group[0].table
    if table.name is not None:
        return table.name
    path = table.path
    if path.is_dir():
        return path.resolve().name
    if any(part.table.path != path for part in group):
        return path.resolve().parent.name
    stem = path.name.split(".tfevents")[0] if "tfevents" in path.name else re.sub(r"(\.[A-Za-z]\w*)+$", "", path.name)
    return stem or path.name


def _name_apart(runs: list[Run]) -> None:
    """Names that differ: of files of one name their folders', or with their folders."""
    if len({run.name for run in runs}) < len(runs):
        for run in runs:
            if _GENERIC.fullmatch(run.name):
                run.name = run.paths[0].resolve().parent.name
    names = [run.name for run in runs]
    for run in runs:
        if names.count(run.name) > 1 and run.paths[0].is_dir():
            run.name = f"{run.name} ({run.paths[0].name[:8]})"  # runs of MLflow
    for up in range(1, 6):
        names = [run.name for run in runs]
        for run in runs:
            parents = run.paths[0].resolve().parents
            if names.count(run.name) > 1 and len(parents) >= up:
                run.name = f"{parents[up - 1].name}/{run.name}"
    for name in {run.name for run in runs}:
        same = [run for run in runs if run.name == name]
        for number, run in enumerate(same if len(same) > 1 else [], 1):
            run.name = f"{name}#{number}"


def _named(runs: list[Run], asked: str) -> list[Run]:
    found = [run for run in runs if run.name == asked] or [r for r in runs if fnmatch.fnmatchcase(r.name, asked)]
    if not found:
        names = [run.name for run in runs]
        more = f" and {len(names) - 40} more" if len(names) > 40 else ""
        raise LogError(f"--run: no run {asked!r} in the log; it has {', '.join(names[:40])}{more}")
    return found


def _sessions(part: _Part) -> list[_Part]:
    """The runs of a part: it is cut where its steps start again, and what was resumed is put together."""
    starts = _restarts(part)
    if starts is None or len(starts) == 0:
        return [part]
    edges = [0, *starts, len(part.steps)]
    found: list[tuple[np.ndarray, list[str]]] = []
    label = part.table.path.name
    for begin, end in itertools.pairwise(edges):
        session = np.arange(begin, end)
        if not found:
            found.append((session, []))
            continue
        rows, notes = found[-1]
        courses = _common_courses(part, rows, session)
        if not courses:  # late rows
            found[-1] = np.concatenate([rows, session]), notes
            continue
        if any(_begins_again(before, after) for before, after in courses):
            found.append((session, []))
            continue
        resumed, reached = courses[0][1].min(), part.steps[rows].max()
        kept = rows[part.steps[rows] <= resumed]
        told = f"{label}: steps go back from {reached:g} to {resumed:g}: taken for a run that was resumed, "
        told += f"{len(rows) - len(kept)} rows beyond that step are replaced"
        found[-1] = np.concatenate([kept, session]), [*notes, told]
    if len(found) > 1:
        first = [f"{part.steps[rows].min():g}" for rows, _ in found]
        told = f"{label} holds {len(found)} runs: its steps start again, at {', '.join(first[1:6])}; --run NAME chooses"
        found = [(rows, [told, *notes]) for rows, notes in found]
    return [part.take(rows, notes) for rows, notes in found]


def _restarts(part: _Part) -> list[int] | None:
    """Rows at which steps start again; None where rows are in no order.

    A row may come late (an evaluation that ends after the next step), so a step that is lower than the one before is
    no restart by itself: some metric must go back in its own course.
    """
    steps = part.steps
    drops = np.flatnonzero(np.diff(steps) < 0) + 1
    if len(drops) == 0 or (np.diff(steps) <= 0).all():
        return None
    many = max(3, len(steps) // 10)
    restless = 0
    back: list[tuple[int, int]] = []  # the row where a metric goes back, and its row before that
    for name in part.metrics:
        rows = np.flatnonzero(part.frame[name].notna().to_numpy())
        at = np.flatnonzero(np.diff(steps[rows]) < 0) + 1
        if len(at) > many:
            restless += 1
            continue
        back += zip(rows[at].tolist(), rows[at - 1].tolist(), strict=True)
    if restless and restless == len(part.metrics):
        part.notes.append("steps go back and forth: rows were sorted, and the later value of a step counts")
        return None
    starts: list[int] = []
    for row, before in sorted(back):
        if not starts or before >= starts[-1]:
            starts.append(int(drops[np.searchsorted(drops, row, side="right") - 1]))
    return starts


def _common_courses(part: _Part, rows: np.ndarray, session: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Steps in ``rows`` and in ``session`` of the metrics that both have, the densest first; without those that have
    less than half of its values: an evaluation may come for the first time after the step that is resumed from."""
    courses = []
    for name in sorted(part.metrics):
        has = part.frame[name].notna().to_numpy()
        before, after = part.steps[rows[has[rows]]], part.steps[session[has[session]]]
        if len(before) and len(after):
            courses.append((before, after))
    courses.sort(key=lambda course: -len(course[0]))
    return [course for course in courses if 2 * len(course[0]) >= len(courses[0][0])]


def _begins_again(before: np.ndarray, after: np.ndarray) -> bool:
    """Whether a metric's steps begin where they had begun, and are not resumed."""
    interval = np.diff(np.unique(before)).min(initial=np.inf)
    offset = after.min() - before.min()
    return bool(offset <= _NEAR * np.ptp(before) or offset < min(interval, np.ptp(before)))


def _tidy(name: str, sessions: list[_Part], notes: list[str]) -> Run:
    """One row per step, ascending; what is not finite taken out and remembered."""
    pd = require("pandas", "reading a log")
    not_finite: dict[str, set[float]] = {}
    frames = []
    for part in sessions:
        frame = part.frame.copy()
        for column in frame.columns:
            values = frame[column].to_numpy()
            bad = np.isinf(values)
            if bad.any():
                not_finite.setdefault(column, set()).update(part.steps[bad].tolist())
                frame[column] = np.where(bad, np.nan, values)
        for column, written in part.table.nan.items():
            if at := part.steps[np.isin(part.rows, written)].tolist():
                not_finite.setdefault(column, set()).update(at)
        frame.insert(0, "step", part.steps)
        frames.append(frame)
    frame = frames[0] if len(frames) == 1 else pd.concat(frames, ignore_index=True)
    steps = frame["step"].to_numpy()
    notes = [*notes, *(note for part in sessions for note in part.notes)]
    if (np.diff(steps) > 0).all():
        frame = frame.reset_index(drop=True)
    else:
        metrics = [c for c in frame.columns if c != "step" and not _BOOKKEEPING.search(c)]
        before = int(frame[metrics].notna().to_numpy().sum())
        # last() skips NaN, so a row of evaluations completes the row of training metrics of the same step
        both, frame = frame, frame.groupby("step", sort=True).last().reset_index()
        again = before - int(frame[metrics].notna().to_numpy().sum())
        if again and not any("resumed" in note for note in notes):
            told = f"{again} values stand a second time at their step: the later ones count"
            first, last = both.groupby("step", sort=True)[metrics].first().to_numpy(), frame[metrics].to_numpy()
            differ = int(np.sum(~np.isclose(first, last, rtol=1e-6, equal_nan=True)))
            notes.append(told + _MIXED * (20 * differ > before))
    lasting = {}
    for column, at in not_finite.items():
        has = set(frame.loc[frame[column].notna(), "step"]) if column in frame else set()
        if missing := sorted(at - has):
            lasting[column] = missing
    frame = frame.dropna(axis=1, how="all")
    settings = {key: value for part in sessions for key, value in part.table.settings.items()}
    paths = tuple(dict.fromkeys(part.table.path for part in sessions))
    return Run(name, frame, paths, list(dict.fromkeys(notes)), lasting, settings)

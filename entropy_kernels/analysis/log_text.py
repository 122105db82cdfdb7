"""Text that trainers write, read into tables: JSON, CSV, what a console showed; packed or not, broken in parts."""

from __future__ import annotations

import ast
import bz2
import copy
import csv
import gzip
import io
import itertools
import json
import lzma
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal

import numpy as np

from entropy_kernels._console import one_line
from entropy_kernels._require import require
from entropy_kernels.analysis.metric_names import ENTROPY, TRAINING, VALIDATION, LogError

if TYPE_CHECKING:
    from pandas import DataFrame

#: Called with the number of characters or bytes that were read since the last call.
Advance = Callable[[int], None]

#: Columns of text that say which run a row belongs to; "Name" is that of W&B's table of runs.
IDENTITY = ("run", "run_name", "run_id", "experiment", "experiment_name", "exp_name", "trial", "Name")

_KNOWN = [name.pattern for name in (*ENTROPY, *VALIDATION, *TRAINING)]
_PACKED: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
# Wrappers whose content is the row itself; other nested keys are joined with "/".
_WRAPPERS = ("data", "metrics", "logs")
_BLOCK = 2_000  # rows of JSON that are held as Python objects at once
_ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_VERL_LINE = re.compile(r"(?<![\w/])step:(\d+) - (.+)$")
_NUMPY_REPR = re.compile(r"\bnp\.\w+\(([^()]*)\)")
_BARE = re.compile(r"(?<=[:\s])(?:nan|-?inf)\b")  # as Python prints them, and does not read them
_DICT = re.compile(r"\{['\"].*\}")
# the number before a dict: slime's "step 12: {...}"
_NUMBERED = re.compile(r"\b(?:step|rollout|eval|perf|iteration|iter)\W{0,2}(\d+)\W{0,3}$", re.IGNORECASE)
# prime-rl's "Step 12 | 3.4s | Loss 0.1 | Entropy 0.5"
_STEP_BARS = re.compile(r"(?<!Micro )\bStep:?\s+(\d+) \| (.+)$")
_TQDM = re.compile(r"(\d+)/(\d+) \[")
NAN = re.compile(r"^[+-]?nan$", re.IGNORECASE)
# TensorBoard's download of one scalar: columns "Wall time", "Step", "Value"
_DOWNLOAD = re.compile(r"run[-_](?P<run>.*?)-tag-(?P<tag>.+)")
_DECIMAL_COMMA = re.compile(r"(?:^|[;\t])\s*[+-]?\d+,\d+(?:[eE][+-]?\d+)?\s*(?=[;\t]|$)")


@dataclass
class Table:
    """What one source says of one run: rows in the order of writing, float columns, steps not yet made out."""

    path: Path
    name: str | None
    """The run's name, where the source tells it."""
    frame: DataFrame
    notes: list[str] = field(default_factory=list)
    nan: dict[str, list[int]] = field(default_factory=dict)
    """Column → rows in which NaN stands written out; elsewhere NaN is a cell without a value."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Settings of the run that stand beside the log."""
    names: Literal["run", "one of several", "folder"] = "run"
    """What the name stands for: a run, so that tables of one name are one; a run beside others that may have the same
    name; or the table's folder."""
    asked: bool = True
    """Named by the user, not found in a folder."""


def listed(numbers: Sequence[float | str], limit: int = 5) -> str:
    """``3, 17, 40 and 12 more``."""
    more = f" and {len(numbers) - limit} more" if len(numbers) > limit else ""
    return ", ".join(n if isinstance(n, str) else f"{n:.15g}" for n in numbers[:limit]) + more


# --- text ------------------------------------------------------------------------------------------------------------


class Lines:
    """The numbered lines of a text file, packed or not; ``strange``: those with bytes that are not UTF-8."""

    def __init__(self, path: Path, advance: Advance) -> None:
        self.path, self.advance, self.strange = path, advance, list[int]()
        # a pipe is read once
        self.piped = None if path.is_file() else path.read_bytes()

    def again(self) -> Lines:
        """The same lines from the start, not counted as progress."""
        lines = copy.copy(self)
        lines.advance, lines.strange = lambda _: None, []
        return lines

    @property
    def empty(self) -> bool:
        return not self.piped if self.piped is not None else self.path.stat().st_size == 0

    def __iter__(self) -> Iterator[tuple[int, str]]:
        opened = _PACKED.get(self.path.suffix.lower(), open)
        raw: IO[bytes]
        with opened(self.path, "rb") if self.piped is None else io.BytesIO(self.piped) as raw:
            head = raw.read(4)
            raw.seek(0)
            encoding = "utf-16" if head[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
            try:
                with io.TextIOWrapper(raw, encoding, errors="replace") as text:
                    yield from self._decoded(text)
            except (EOFError, OSError, lzma.LZMAError) as error:
                if opened is open:
                    raise
                raise LogError(f"{self.path} cannot be unpacked: {one_line(error)}") from None

    def _decoded(self, text: Iterable[str]) -> Iterator[tuple[int, str]]:
        read = 0
        for number, line in enumerate(text, 1):
            read += len(line)
            if read > 1 << 20:
                self.advance(read)
                read = 0
            if "\ufffd" in line or "\0" in line:
                if number == 1 and ("\0" in line or 10 * line.count("\ufffd") > len(line)):
                    raise LogError(f"{self.path} is not text")
                self.strange.append(number)
                line = line.replace("\0", "")  # blocks of zeros are what a power failure leaves
            yield number, line
        self.advance(read)

    def note(self) -> list[str]:
        if not self.strange:
            return []
        lines = "lines" if len(self.strange) > 1 else "line"
        return [f"{lines} {listed(self.strange)} of {self.path.name}: bytes that are not UTF-8 text were replaced"]


def read_text(path: Path, advance: Advance) -> list[Table]:
    try:
        return _read_file(path, advance)
    except RecursionError:
        raise LogError(f"{path}: objects are nested too deeply") from None


def _read_file(path: Path, advance: Advance) -> list[Table]:
    name = path.with_suffix("") if path.suffix.lower() in _PACKED else path
    suffix = name.suffix.lower()
    lines = Lines(path, advance)
    if lines.empty:
        raise LogError(f"{path} is empty")
    if suffix == ".wandb":
        raise LogError(f"{path} is W&B's own record: export the run's charts as CSV, or its history as JSON lines")
    if suffix == ".parquet":
        raise LogError(f"{path}: Parquet is not read; convert it (pandas.read_parquet(...).to_csv(...))")
    if suffix in (".csv", ".tsv"):
        return _read_csv(lines, suffix)
    if suffix in (".jsonl", ".ndjson"):
        return [_read_jsonl(lines)]
    start = next((line.strip() for _, line in lines.again() if line.strip()), "")
    if suffix == ".json" or (start[:1] in ("{", "[") and not start.startswith("{'") and not _ANSI.match(start)):
        text = "".join(line for _, line in lines)
        try:
            return [_read_json(json.loads(text), lines)]
        except (json.JSONDecodeError, RecursionError) as error:
            if text.lstrip()[:1] == "{" and "\n" in text.strip():
                return [_read_jsonl(lines.again())]
            raise LogError(f"{path} is not JSON: {error}") from None
    table = _read_console(lines)
    if table is not None:
        return [table]
    if any(separator in start for separator in ",;\t"):
        return _read_csv(lines.again(), suffix)
    raise LogError(
        f"{path}: expected CSV, JSON lines, TensorBoard events or verl's 'step:N - name:value', TRL's "
        "{'name': value} or prime-rl's 'Step N | name value' lines"
    )


# --- JSON ------------------------------------------------------------------------------------------------------------


class _Columns:
    """Columns of floats that are filled by rows of any keys."""

    def __init__(self) -> None:
        self.count = 0
        self.parts: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
        self.texts: dict[str, list[tuple[np.ndarray, Sequence[Any]]]] = {}
        self.nan: dict[str, list[int]] = {}

    def extend(self, rows: Sequence[dict[str, Any]]) -> None:
        """Append rows; nested objects become columns of their own, lists are left out."""
        self._add(np.arange(self.count, self.count + len(rows)), rows, "")
        self.count += len(rows)

    def _add(self, positions: np.ndarray, rows: Sequence[dict[str, Any]], prefix: str) -> None:
        groups: dict[tuple[str, ...], list[int]] = {}
        for index, row in enumerate(rows):
            keys = tuple(row)
            if keys in groups:
                groups[keys].append(index)
            else:
                groups[keys] = [index]
        for keys, indices in groups.items():
            at = positions[indices]
            values = [rows[i].values() for i in indices]
            for key, column in zip(keys, zip(*values, strict=True), strict=True):
                self._column(at, column, key, prefix)

    def _column(self, at: np.ndarray, column: Sequence[Any], key: str, prefix: str) -> None:
        types = set(map(type, column))
        if dict in types:
            inside = [i for i, value in enumerate(column) if isinstance(value, dict)]
            self._add(at[inside], [column[i] for i in inside], prefix if key in _WRAPPERS else f"{prefix}{key}/")
            if len(inside) == len(column):
                return
        name = prefix + key
        if str in types and name in IDENTITY:
            self.texts.setdefault(name, []).append((at, column))
            return
        if name == "global_step/max_steps":  # ms-swift's, "10/100"
            column = [str(value).partition("/")[0] for value in column]
        values = _floats(column, types)
        has = ~np.isnan(values)
        if float in types and not has.all():
            written = [int(at[i]) for i in np.flatnonzero(~has).tolist() if isinstance(column[i], float)]
            if written:
                self.nan.setdefault(name, []).extend(written)
        if has.any():
            self.parts.setdefault(name, []).append((at, values))

    def frame(self) -> DataFrame:
        """All rows."""
        pd = require("pandas", "reading a log")
        columns: dict[str, Any] = {}
        for name, parts in self.parts.items():
            columns[name] = np.full(self.count, np.nan)
            for at, values in parts:
                columns[name][at] = np.where(np.isnan(values), columns[name][at], values)
        for name, texts in self.texts.items():
            columns[name] = np.full(self.count, None, dtype=object)
            for at, column in texts:
                columns[name][at] = np.array([*column, None], dtype=object)[:-1]
        return pd.DataFrame(columns, index=np.arange(self.count))


def _floats(column: Sequence[Any], types: set[type]) -> np.ndarray:
    """Numbers, and text that is one; NaN for the rest."""
    if types <= {int, float, bool, type(None)}:
        try:
            return np.array(column, dtype=float)
        except OverflowError:  # an integer beyond float64
            pass
    return np.array([as_float(value) for value in column])


def as_float(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return np.nan


def _read_jsonl(lines: Lines) -> Table:
    decode = json.JSONDecoder().raw_decode
    columns, block = _Columns(), list[dict[str, Any]]()
    broken: list[int] = []
    reason, last = "", ""
    for number, line in lines:
        last, line = line, line.strip()
        if not line:
            continue
        try:
            row, end = decode(line)
        except (ValueError, RecursionError):
            row, end = None, 0
        if end == len(line) and isinstance(row, dict):
            block.append(row)
            if len(block) == _BLOCK:
                columns.extend(block)
                block = []
            continue
        if not broken:
            whole = end == len(line)
            reason = f"expected an object, got {type(row).__name__}" if whole else "not JSON"
            reason = f"line {number}: {reason}"
        broken.append(number)
    columns.extend(block)
    if len(broken) > max(columns.count, 3) or (broken and columns.count == 0):
        raise LogError(f"{lines.path}, {reason}, as {len(broken)} lines of {len(broken) + columns.count}")
    if columns.count == 0:
        raise LogError(f"{lines.path} has no rows")
    notes = []
    if broken and not last.endswith("\n") and broken[-1] == number:
        broken.pop()
        notes.append(
            f"line {number} of {lines.path.name} is cut off (a run that was stopped while writing?) and was left out"
        )
    notes += broken_lines(lines.path, broken, "no JSON object")
    return Table(lines.path, None, columns.frame(), notes + lines.note(), columns.nan)


def broken_lines(path: Path, numbers: Sequence[int], why: str) -> list[str]:
    if not numbers:
        return []
    if len(numbers) == 1:
        return [f"line {numbers[0]} of {path.name} is broken ({why}) and was left out"]
    return [f"{len(numbers)} lines of {path.name} are broken ({why}) and were left out: {listed(numbers)}"]


def _read_json(content: Any, lines: Lines) -> Table:
    """trainer_state.json, a list of objects, or a single object (a JSONL of one line)."""
    if isinstance(content, dict):
        content = content.get("log_history", [content])
    if not isinstance(content, list) or not all(isinstance(row, dict) for row in content):
        raise LogError(f"{lines.path}: expected a list of objects or a trainer_state.json with log_history")
    if not content:
        raise LogError(f"{lines.path} has no rows")
    columns = _Columns()
    columns.extend(content)
    return Table(lines.path, None, columns.frame(), lines.note(), columns.nan)


# --- what was printed ------------------------------------------------------------------------------------------------


def _read_console(lines: Lines) -> Table | None:
    """Rows that a trainer printed; None if there are none.

    verl's ``step:12 - actor/entropy:0.41 - …``, dicts as TRL and slime print them, ``Step 12 | Entropy 0.4 | …`` of
    prime-rl; behind any prefix, between progress bars, in colours. A dict that names no step takes the number before
    it, else that of the progress bar that has moved with the rows.
    """
    rows: list[dict[str, Any]] = []
    bars: list[dict[int, int]] = []  # per row without a step: total of a progress bar → where it last stood
    stood: dict[int, int] = {}
    for _, line in lines:
        piece = _ANSI.sub("", line) if "\x1b" in line else line
        for done, total in _TQDM.findall(piece):
            stood[int(total)] = int(done)
        row = _printed(piece)
        if row:
            rows.append(row)
            bars.append({} if "step" in row else dict(stood))
    if not rows:
        return None
    if not any("step" in row for row in rows):
        totals = {total for bar in bars for total in bar}
        course = {total: [bar.get(total, 0) for bar in bars] for total in totals}
        rising = {total: len(set(c)) for total, c in course.items() if c == sorted(c) and len(set(c)) > 1}
        if rising:
            best = max(rising, key=lambda total: (rising[total], total))
            rows = [{"step": at, **row} for at, row in zip(course[best], rows, strict=True)]
    columns = _Columns()
    columns.extend(rows)
    return Table(lines.path, None, columns.frame(), lines.note(), columns.nan)


def _printed(piece: str) -> dict[str, Any]:
    """The metrics of a piece of a line; empty if it has none."""
    if "np." in piece:  # numpy >= 2 prints its scalars as np.float64(0.5)
        piece = _NUMPY_REPR.sub(r"\1", piece)
    if "step:" in piece and (match := _VERL_LINE.search(piece)) is not None:
        row: dict[str, Any] = {"step": int(match[1])}
        for item in match[2].split(" - "):
            name, _, value = item.rpartition(":")
            row[name.strip()] = value
        return {name: number for name, value in row.items() if name and not np.isnan(number := as_float(value))}
    if "{" in piece and (match := _DICT.search(piece)) is not None:
        found = _literal(match[0])
        if not any(not np.isnan(as_float(value)) for value in found.values()):
            return {}
        numbered = _NUMBERED.search(piece[: match.start()])
        return {"step": int(numbered[1]), **found} if numbered and not _has_step(found) else found
    if " | " in piece and (match := _STEP_BARS.search(piece)) is not None:
        row = {"step": int(match[1])}
        for item in match[2].split(" | "):
            name, _, value = item.strip().rpartition(" ")
            if name and not np.isnan(number := as_float(value)):
                row[name.rstrip(":")] = number
        return row if len(row) > 1 else {}
    return {}


def _literal(text: str) -> dict[str, Any]:
    """A dict as Python or JSON prints it; empty if it is none."""
    try:
        found = json.loads(text.replace("'", '"'))  # fast, and right where no text has quotes in it
    except (ValueError, RecursionError):
        try:
            found = ast.literal_eval(_BARE.sub(r"'\g<0>'", text))
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return {}
    return {str(name): value for name, value in found.items()} if isinstance(found, dict) else {}


def _has_step(row: dict[str, Any]) -> bool:
    return "step" in row or "global_step" in row


# --- CSV -------------------------------------------------------------------------------------------------------------


class _Rows(io.TextIOBase):
    """The sound lines of a CSV file, for pandas: lines of another width than the header are left out and counted.

    Cells in quotes that go over several lines are passed on as they are. A repeated header (a run that was
    started again) is passed over.
    """

    def __init__(self, lines: Lines, suffix: str) -> None:
        self._lines = iter(lines)
        self.broken: list[int] = []
        self.nan: list[tuple[int, list[str]]] = []  # row, its fields
        self.count = 0
        head = list(itertools.islice(self._lines, 200))
        while head and (not head[0][1].strip() or head[0][1].startswith(("#", "sep="))):
            head.pop(0)
        self.header = head[0][1].rstrip("\n") if head else ""
        self.separator = "\t" if suffix == ".tsv" else max(",;\t", key=self.header.count)
        self.width = self._cells(self.header)
        body = [line.rstrip("\n") for _, line in head[1:] if line.strip() and line.count('"') % 2 == 0]
        comma = any(_DECIMAL_COMMA.search(line) for line in body) and not any(re.search(r"\d\.\d", x) for x in body)
        self.decimal = "," if self.separator in ";\t" and comma else "."
        # a writer that leaves out empty cells at the end, or ends every line with a separator
        short = sum(self._cells(line) < self.width for line in body)
        self._ragged = short > 1 and short * 5 > len(body)
        self._trailing = bool(body) and all(
            line.endswith(self.separator) and line.count(self.separator) == self.width + 1 for line in body
        )
        self._rest = self._sound(itertools.chain(head[1:], self._lines))
        self._buffer = self.header + "\n" if head else ""

    def _sound(self, lines: Iterable[tuple[int, str]]) -> Iterator[str]:
        separator, width, inside = self.separator, self.width, False
        for number, line in lines:
            if inside or line.count('"') % 2:
                inside ^= line.count('"') % 2 == 1
                self.count += not inside
                yield line
                continue
            line = line.rstrip("\n")
            if self._trailing:
                line = line.removesuffix(separator)
            found = self._cells(line)
            if not line.strip() or line == self.header:
                continue
            if found != width and not (self._ragged and found < width):
                self.broken.append(number)
                continue
            if ("nan" in line or "NaN" in line or "NAN" in line) and '"' not in line:
                self.nan.append((self.count, line.split(separator)))
            self.count += 1
            yield line + "\n"

    def _cells(self, line: str) -> int:
        """Separators between the cells of a line."""
        if '"' not in line:
            return line.count(self.separator)
        try:
            return len(next(csv.reader([line], delimiter=self.separator), [""])) - 1
        except csv.Error:  # a cell of a size that is none of a log
            return -1

    def readable(self) -> bool:
        return True

    def read(self, size: int | None = -1) -> str:
        size = -1 if size is None else size
        parts, length = [self._buffer], len(self._buffer)
        while size < 0 or length < size:
            line = next(self._rest, None)
            if line is None:
                break
            parts.append(line)
            length += len(line)
        text = "".join(parts)
        self._buffer = text[size:] if size >= 0 else ""
        return text[:size] if size >= 0 else text

    def __next__(self) -> str:  # type: ignore[override]
        text, self._buffer = self._buffer, ""
        return text or next(self._rest)


def _read_csv(lines: Lines, suffix: str) -> list[Table]:
    pd = require("pandas", "reading a CSV log")
    rows = _Rows(lines, suffix)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", pd.errors.ParserWarning)  # of cells in quotes over lines of other widths
            frame = pd.read_csv(
                rows, sep=rows.separator, decimal=rows.decimal, skipinitialspace=True, low_memory=False, index_col=False
            )
    except pd.errors.EmptyDataError:
        raise LogError(f"{lines.path} is empty") from None
    except (pd.errors.ParserError, csv.Error) as error:
        raise LogError(f"{lines.path} is not CSV: {one_line(error)}") from None
    if len(frame) == 0:
        broken = f" that are whole: {len(rows.broken)} lines are broken" if rows.broken else ""
        raise LogError(f"{lines.path} has no rows{broken}")
    notes = broken_lines(lines.path, rows.broken, f"not {rows.width + 1} cells") + lines.note()
    if rows.decimal == ",":
        notes.append(f"{lines.path.name}: commas were read as decimal points")
    download = _DOWNLOAD.search(lines.path.stem)
    if list(frame.columns) == ["Wall time", "Step", "Value"] and download is not None:
        # the browser has put _ for / in the tag
        metric = next((n for n in _KNOWN if n.replace("/", "_") == download["tag"]), download["tag"])
        frame = frame.rename(columns={"Value": metric})
        return [Table(lines.path, download["run"], frame, notes)]
    nan: dict[str, list[int]] = {}
    for row, cells in rows.nan if rows.count == len(frame) else []:
        for name, cell in zip(frame.columns, cells, strict=False):
            if NAN.match(cell.strip()):
                nan.setdefault(str(name), []).append(row)
    return [
        Table(lines.path, name, part, notes, {own: nan[whole] for own, whole in names.items() if whole in nan})
        for name, part, names in _wandb_runs(frame)
    ]


def _wandb_runs(frame: DataFrame) -> list[tuple[str | None, DataFrame, dict[str, str]]]:
    """The runs of W&B's chart export, whose columns are "run - metric", with ``__MIN`` and ``__MAX`` of each.

    The metric is what stands behind the last " - ": names of runs have one, too. Two runs of one name have columns
    of one name, which pandas numbers. A table whose owners share no metric is no chart of several runs.
    """
    columns = [str(c) for c in frame.columns if not str(c).endswith(("__MIN", "__MAX"))]
    frame = frame.rename(columns=str)[columns]
    runs: dict[str, dict[str, str]] = {}  # run → its metric → the table's column
    for column in columns:
        run, dash, metric = column.rpartition(" - ")
        if not dash:
            continue
        twin = re.fullmatch(r"(.+)\.(\d+)", metric)
        if twin and f"{run} - {twin[1]}" in columns:
            run, metric = f"{run} ({int(twin[2]) + 1})", twin[1]
        runs.setdefault(run, {})[metric] = column
    metrics = [set(names) for names in runs.values()]
    if not runs or (len(runs) > 1 and sum(map(len, metrics)) == len(set.union(*metrics))):
        return [(None, frame, {c: c for c in columns})]
    shared = [column for column in columns if " - " not in column]
    found: list[tuple[str | None, DataFrame, dict[str, str]]] = []
    for run, names in runs.items():
        part = frame[[*shared, *names.values()]].rename(columns={whole: own for own, whole in names.items()})
        own = [metric for metric in names if not metric.startswith("_")]
        # rows in which only the other runs have values
        part = part[part[own].notna().any(axis=1)] if own and len(runs) > 1 else part
        found.append((run, part.loc[:, ~part.columns.duplicated()], {**names, **{c: c for c in shared}}))
    return found

"""``python -m benchmarks.report FOLDER``: the Markdown table and the plots of a ``bench.json``, made from it alone.

A run calls this in the end; where matplotlib is missing it leaves the plots out, and they can be made elsewhere.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import struct
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import curves, plots, records, tables
from benchmarks.records import Measured
from benchmarks.verdicts import Verdict

#: All that may stand beside bench.json and bench.md.
PICTURES = ("time_statistics", "time_selection", "error", "from_hidden", "error_hidden", *curves.NAMES)
_PNG = b"\x89PNG\r\n\x1a\n"
ALL_PANELS = 12  # groups up to which every one has a panel of times; of more, those that are not in the curves


def write(folder: Path) -> str:
    """Write ``bench.md`` and the plots beside ``bench.json``; returns the Markdown."""
    head, measured = records.read(folder / "bench.json")
    text = tables.markdown(head, verdicts(head), measured)
    (folder / "bench.md").write_text(text)
    for name in PICTURES:  # of an earlier run, which may have had other rows
        (folder / f"{name}.png").unlink(missing_ok=True)
    if importlib.util.find_spec("matplotlib") is None:
        print("matplotlib is not installed: no plots (python -m benchmarks.report makes them)", file=sys.stderr)
    else:
        try:
            _draw(folder, head, measured)
        except Exception as error:  # the figures are measured and written: a plot must not take them away
            print(f"plots failed: {type(error).__name__}: {error}", file=sys.stderr)
    return text


def in_the_way(folder: Path) -> str | None:
    """A file of the user's that a run into `folder` would replace: one under the name of a result, and no result."""
    results = {"bench.json": _is_document, "bench.md": _is_table, **{f"{name}.png": _is_picture for name in PICTURES}}
    there = [name for name in results if os.path.lexists(folder / name)]
    known = _is_document(folder / "bench.json")
    return next((name for name in there if not (known and results[name](folder / name))), None)


def _is_document(path: Path) -> bool:
    try:
        found = json.loads(path.read_text())
        command, formatted = found["command"], found["format"]
        lists = isinstance(found["groups"], list) and isinstance(found["bars"], list)
        return lists and type(formatted) is int and command.split()[:3] == records.COMMAND.split()
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return False


def _is_table(path: Path) -> bool:
    try:
        return re.match(rf"# Benchmark[^\n]*\n\n`{re.escape(records.COMMAND)}\b", path.read_text()) is not None
    except (OSError, ValueError):
        return False


def _is_picture(path: Path) -> bool:
    """Whether a PNG names the benchmark as its program, or matplotlib with our resolution, as earlier ones do."""
    try:
        data = path.read_bytes()
    except OSError:
        return False
    chunks: dict[bytes, bytes] = {}
    start = len(_PNG)
    while data.startswith(_PNG) and start + 8 <= len(data):
        (length,), kind = struct.unpack(">I", data[start : start + 4]), data[start + 4 : start + 8]
        chunks[kind] = data[start + 8 : start + 8 + length]
        start += 12 + length
    software, per_metre = chunks.get(b"tEXt", b""), round(plots.DPI / 0.0254)
    before = software.startswith(b"Software\0Matplotlib version")
    return software == b"Software\0" + plots.MADE_BY.encode() or (
        before and chunks.get(b"pHYs") == struct.pack(">IIB", per_metre, per_metre, 1)
    )


def verdicts(head: dict[str, Any]) -> list[Verdict]:
    """The bars of a document."""
    return [Verdict(**{k: v for k, v in bar.items() if k != "passed"}) for bar in head["bars"]]


def _draw(folder: Path, head: dict[str, Any], measured: Sequence[Measured]) -> None:
    machine = head["machine"]
    commit = (machine["commit"] or "unknown")[:10]
    threads = "" if machine["gpu"] else f", {machine['threads']} threads"
    note = f"{machine['machine']}{threads}, {head['time'][:10]}, {commit}"
    of_logits = [part for part in measured if part.records and "vocab" in part.records[0].size and not part.host]
    of_hidden = [part for part in of_logits if "features" in part.records[0].size]
    of_logits = [part for part in of_logits if part not in of_hidden]
    rest = [part for part in measured if part not in of_logits and part not in of_hidden]
    if len(of_logits) <= ALL_PANELS // 2:
        plots.save(plots.time_figure(of_logits, note), folder / "time_statistics.png")
    plots.save(plots.time_figure(rest[:ALL_PANELS], note), folder / "time_selection.png")
    plots.save(plots.error_figure(of_logits, note), folder / "error.png")
    plots.save(plots.hidden_figure(of_hidden[: ALL_PANELS // 3], note), folder / "from_hidden.png")
    plots.save(plots.error_figure(of_hidden, note, "linear_logprob_entropy"), folder / "error_hidden.png")
    for name, figure in curves.figures(of_logits, head["bandwidth"], note):
        plots.save(figure, folder / f"{name}.png")


def main(argv: Sequence[str] | None = None) -> int:
    """Make the reports of the folders given."""
    parser = argparse.ArgumentParser(prog="benchmarks.report", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folders", type=Path, nargs="+", metavar="FOLDER", help="with a bench.json in it")
    folders = parser.parse_args(argv).folders
    for folder in folders:
        if not (folder / "bench.json").is_file():
            parser.error(f"argument FOLDER: expected a folder with a bench.json, got {folder}")
        other = in_the_way(folder)
        if other is not None:
            parser.error(f"argument FOLDER: expected a folder of results, got {folder}, whose {other} is no result")
    for folder in folders:
        write(folder)
        print(folder / "bench.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""``python -m benchmarks.report FOLDER``: the Markdown table and the plots of a ``bench.json``, made from it alone.

A run calls this in the end; where matplotlib is missing it leaves the plots out, and they can be made elsewhere.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import curves, records, tables
from benchmarks.records import Measured
from benchmarks.verdicts import Verdict

#: All that may stand beside bench.json and bench.md.
PICTURES = ("time_statistics", "time_selection", "error", "from_hidden", "error_hidden", *curves.NAMES)
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
    """A file of the user's that a run into `folder` would replace: one under the name of a result, and no results."""
    names = [
        name for name in ("bench.json", "bench.md", *(f"{name}.png" for name in PICTURES)) if (folder / name).exists()
    ]
    try:
        if "groups" in json.loads((folder / "bench.json").read_text()):
            return None
    except (OSError, ValueError, TypeError):
        pass
    return names[0] if names else None


def verdicts(head: dict[str, Any]) -> list[Verdict]:
    """The bars of a document."""
    return [Verdict(**{k: v for k, v in bar.items() if k != "passed"}) for bar in head["bars"]]


def _draw(folder: Path, head: dict[str, Any], measured: Sequence[Measured]) -> None:
    from benchmarks import plots

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
    for folder in folders:
        write(folder)
        print(folder / "bench.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())

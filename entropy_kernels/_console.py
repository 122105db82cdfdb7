"""Tables on the terminal: through rich where it is installed, else as aligned text."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from typing import TextIO

# Width of tables that go to a file or a pipe, where there is no terminal to ask.
_PIPE_WIDTH = 140


def print_table(
    title: str, rows: Sequence[Sequence[str]], header: Sequence[str] | None = None, file: TextIO | None = None
) -> None:
    """Print ``rows`` (all of one length, without markup) under ``title``, with a header row or none."""
    file = sys.stdout if file is None else file
    if importlib.util.find_spec("rich") is None:
        _plain(title, rows, header, file)
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(file=file, width=None if file.isatty() else _PIPE_WIDTH, highlight=False)
    table = Table(
        title=Text(title, style="bold"),
        title_justify="left",
        box=box.SIMPLE_HEAD if header else box.SIMPLE,
        show_header=header is not None,
        pad_edge=False,
    )
    for i, name in enumerate(header or [""] * len(rows[0])):
        # The first column holds names that people copy: it is not folded before the others are.
        table.add_column(name, style="cyan" if i == 0 else "", no_wrap=i == 0, overflow="fold")
    for row in rows:
        table.add_row(*[Text(cell, style=_STYLES.get(cell, "")) for cell in row])
    console.print(table)


_STYLES = {"OK": "green", "available": "green", "FAIL": "bold red"}
_STYLES |= dict.fromkeys(("failed", "out of time", "not run"), "bold red")


def _plain(title: str, rows: Sequence[Sequence[str]], header: Sequence[str] | None, file: TextIO) -> None:
    lines = [header, *rows] if header else list(rows)
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    print(title, file=file)
    for line in lines:
        print("  " + "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip(), file=file)
    print(file=file)

"""What all command lines share: errors that name what was probably meant, and tables.

Tables are drawn by rich where it is installed, else as aligned text.
"""

from __future__ import annotations

import argparse
import difflib
import importlib.util
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, TextIO

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


# --- command lines ----------------------------------------------------------------------------------------------------


def did_you_mean(word: object, known: Iterable[object]) -> str:
    """The end of an error: "; did you mean train?", or nothing where no name is near."""
    names = {_bare(name): str(name) for name in known}
    near = difflib.get_close_matches(_bare(word), names, 1)
    return f"; did you mean {names[near[0]]}?" if near else ""


def _bare(name: object) -> str:
    return str(name).replace("_", "-").lower().lstrip("-")


@dataclass(frozen=True)
class Call:
    """What the user typed: the program, as in "python -m entropy_kernels.trainer", and the words behind it."""

    prog: str
    words: Sequence[str]

    def again(self, *flags: str, instead_of: Iterable[str] = ()) -> str:
        """The same call with further flags, and without some switches."""
        left_out = {*flags, *instead_of}
        kept = [word for word in self.words if word.replace("_", "-") not in left_out]
        return f"{self.prog} {shlex.join([*kept, *flags])}".rstrip()

    @property
    def help(self) -> list[str] | None:
        """The words behind --help, what it is asked about; None where it was not asked."""
        for i, word in enumerate(self.words):
            if word in ("-h", "--help"):
                return [word.lstrip("-") for word in self.words[i + 1 :]]
        return None


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, with what was probably meant.

    ``elsewhere`` has words that are known in another place, and what to type for them.
    """

    elsewhere: Mapping[str, str] = {}

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        found, extra = super().parse_known_args(args, namespace)
        if extra:  # here, where the flags of a command are known
            word = next((word for word in extra if word.startswith("-")), extra[0])
            flag = word.partition("=")[0]
            near = did_you_mean(flag, self._option_string_actions) if flag.startswith("--") else ""
            self.error(f"{'there is no flag' if flag.startswith('-') else 'expected flags, got'} {flag}{near}")
        return found, extra

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            known = [*action.choices, *(self.elsewhere if action.dest == "command" else ())]
            near = did_you_mean(value, known)
            for word, typed in self.elsewhere.items():
                near = near.replace(f"mean {word}?", f"mean {typed}?")
            raise argparse.ArgumentError(action, f"expected one of {', '.join(action.choices)}, got {value!r}{near}")

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message.removeprefix('argument ')} ({self.prog} --help explains)\n")

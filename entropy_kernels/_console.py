"""What all command lines share: errors that name what was probably meant, and tables.

Tables are drawn by rich on a terminal where it is installed, else as aligned text.
"""

from __future__ import annotations

import argparse
import difflib
import importlib.util
import itertools
import os
import shlex
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, TextIO


def one_line(error: BaseException, most: int | None = None) -> str:
    """What an error says, in one line of at most so many characters; its type if it says nothing."""
    return " ".join(str(error).split())[:most] or type(error).__name__


def print_table(
    title: str,
    rows: Sequence[Sequence[str]],
    header: Sequence[str] | None = None,
    file: TextIO | None = None,
    *,
    whole: bool = False,
) -> None:
    """Print ``rows`` (all of one length, without markup) under ``title``, with a header row or none.

    On a terminal cells wrap between words, those of the widest columns first. The first column does not: its names are
    copied. With ``whole`` no cell does; a terminal that is too narrow for a table then shows a list per row, under its
    first cell. A file or a pipe has each row in one line.
    """
    file = sys.stdout if file is None else file
    room = shutil.get_terminal_size().columns - 2 if file.isatty() else sys.maxsize
    widths = _widths(rows, header, room, whole)
    if header and whole and _wide(widths) > room:
        print_text(title, file)
        print(file=file)
        for row in rows:
            print_table(row[0], list(zip(header[1:], row[1:], strict=True)), file=file)
    elif file.isatty() and importlib.util.find_spec("rich") is not None:
        _rich(title, rows, header, file, widths)
    else:
        _plain(title, rows, header, file, widths)


def print_text(text: str, file: TextIO | None = None, *, indent: str = "") -> None:
    """Print ``text``, on a terminal in lines of its width, cut between words, those after the first with ``indent``.

    Where there is no terminal lines stay whole, and everywhere those that begin with two spaces: commands, to be
    copied.
    """
    file = sys.stdout if file is None else file
    if file.isatty():
        width = max(shutil.get_terminal_size().columns - 1, 20)
        fold = textwrap.TextWrapper(
            width, subsequent_indent=indent, break_on_hyphens=False, break_long_words=False
        ).fill
        text = "\n".join(line if line.startswith("  ") else fold(line) for line in text.splitlines())
    print(text, file=file)


def _rich(
    title: str, rows: Sequence[Sequence[str]], header: Sequence[str] | None, file: TextIO, widths: Sequence[int]
) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(
        box=box.SIMPLE_HEAD if header else box.SIMPLE,
        show_header=header is not None,
        pad_edge=False,
        padding=(0, 1, 0, 0),  # and a character of the box: _BETWEEN
    )
    for i, (name, width) in enumerate(zip(header or [""] * len(widths), widths, strict=True)):
        table.add_column(name, style="cyan" if i == 0 else "", no_wrap=i == 0, overflow="fold", width=width)
    for row in rows:
        table.add_row(*[Text(cell, style=_STYLES.get(cell, "")) for cell in row])
    Console(file=file, highlight=False).print(Text(title, style="bold"), table)


# Characters between two columns.
_BETWEEN = 2
_STYLES = {"OK": "green", "available": "green", "FAIL": "bold red"}
_STYLES |= dict.fromkeys(("failed", "out of time", "not run"), "bold red")


def _widths(rows: Sequence[Sequence[str]], header: Sequence[str] | None, room: int, whole: bool) -> list[int]:
    """Of the columns: what they hold, or where that is too much for ``room`` less, but never less than a word, or with
    ``whole`` than a cell."""
    columns = list(zip(*([header, *rows] if header else rows), strict=True))
    widths = [max(map(len, column)) for column in columns]
    least = [max(max(map(len, cell.split()), default=0) for cell in column) for column in columns]
    for i in range(len(columns)) if whole else [0]:
        least[i] = max(least[i], *(len(row[i]) for row in rows), 0)
    for _ in range(min(_wide(widths) - room, sum(widths))):
        wide = [i for i in range(len(widths)) if widths[i] > least[i]]
        if not wide:
            break
        widths[max(wide, key=widths.__getitem__)] -= 1
    return widths


def _wide(widths: Sequence[int]) -> int:
    return sum(widths) + _BETWEEN * (len(widths) - 1)


def _plain(
    title: str, rows: Sequence[Sequence[str]], header: Sequence[str] | None, file: TextIO, widths: Sequence[int]
) -> None:
    print_text(title, file)
    for line in [header, *rows] if header else rows:
        cells = [textwrap.wrap(cell, max(width, 1)) for cell, width in zip(line, widths, strict=True)]
        for parts in itertools.zip_longest(*cells, fillvalue=""):
            print("  " + (" " * _BETWEEN).join(map(str.ljust, parts, widths)).rstrip(), file=file)
    print(file=file)


# --- command lines ----------------------------------------------------------------------------------------------------


def unless_closed(program: Callable[[], int]) -> int:
    """The exit code of a program; 1, without a word, where `| head` closed the pipe that it prints to."""
    try:
        code = program()
        sys.stdout.flush()
    except BrokenPipeError:
        # what is still buffered goes nowhere, without a complaint when the interpreter flushes it at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return code


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

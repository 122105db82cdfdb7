"""A dataclass as a command line: a flag per field, help in groups, errors of one line.

A field's help is the docstring behind it, its group the last comment line ``# --- group ---`` before it, and what a
flag takes follows from the annotation: int, float, str, Path, bool (``--flag``, ``--no-flag``), Literal, tuple (several
words), dict (OPTION=VALUE words), and ``X | None``, where ``none`` is None.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import functools
import inspect
import itertools
import json
import re
import shutil
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, get_args, get_origin, get_type_hints

from entropy_kernels._console import Parser

_T = TypeVar("_T")
_COLUMN = 26  # where the text begins


def dashed(name: str) -> str:
    """The flag of a field."""
    return "--" + name.replace("_", "-")


def parse(default: _T, words: Sequence[str], prog: str) -> tuple[_T, set[str]]:
    """`default`, a dataclass, with what the words change; and the names of the fields that they name.

    A mistake ends the program with one line and exit code 2.
    """
    parser = Parser(prog=prog, add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    for name, hint in get_type_hints(type(default)).items():
        _add(parser, name, hint)
    given = vars(parser.parse_args(_prepared(words, get_type_hints(type(default)), parser.error)))
    for name, value in given.items():
        if isinstance(value, list):
            pairs = get_origin(get_type_hints(type(default))[name]) is dict
            given[name] = dict(value) if pairs else tuple(value)
    return dataclasses.replace(default, **given), set(given)  # type: ignore[type-var]


def _prepared(words: Sequence[str], hints: Mapping[str, Any], refuse: Callable[[str], NoReturn]) -> list[str]:
    """The words as argparse takes them: flags with dashes, --lr=-1e-3. A value behind a switch is refused."""
    switches = {word for name, hint in hints.items() if hint is bool for word in (dashed(name), dashed(f"no_{name}"))}
    found: list[str] = []
    for word in words:
        name, equals, value = word.partition("=")
        if word.startswith("--"):
            name = name.replace("_", "-")
            word = name + equals + value
        before = found[-1] if found else ""
        switch, given = (name, value) if equals else (before, word)
        if switch in switches and given.lower() in ("true", "false", "on", "off", "yes", "no", "0", "1"):
            on = "--" + switch.removeprefix("--no-").removeprefix("--")
            refuse(f"{on}: expected no value, got {given}; {on} turns it on, --no-{on[2:]} off")
        if before.startswith("--") and "=" not in before and re.fullmatch(r"-[\d.]+[eE][-+]?\d+|-inf", word):
            found[-1] = f"{before}={word}"  # argparse takes it for a flag
        else:
            found.append(word)
    return found


def _add(parser: argparse.ArgumentParser, name: str, hint: Any) -> None:
    kind, _ = _without_none(hint)
    if kind is bool:
        parser.add_argument(dashed(name), action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS)
    elif get_origin(kind) is Literal:
        parser.add_argument(dashed(name), choices=get_args(kind))
    elif get_origin(kind) is tuple:
        parser.add_argument(dashed(name), nargs="*", type=_reader(get_args(kind)[0]))
    elif get_origin(kind) is dict:
        parser.add_argument(dashed(name), nargs="*", type=_option)
    else:
        parser.add_argument(dashed(name), type=_reader(hint))


def _without_none(hint: Any) -> tuple[Any, bool]:
    """What a field holds, and whether it may be None."""
    kinds = get_args(hint)
    if type(None) in kinds:
        return next(kind for kind in kinds if kind is not type(None)), True
    return hint, False


def _reader(hint: Any) -> Callable[[str], Any]:
    kind, may_be_none = _without_none(hint)
    expected = {int: "an integer", float: "a number"}.get(kind, "a word") + (", or none" if may_be_none else "")

    def read(word: str) -> Any:
        if may_be_none and word in ("none", "None"):
            return None
        if kind is Path:
            return Path(word).expanduser()  # a shell leaves the ~ of --out=~/runs as it is
        try:
            return kind(word)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected {expected}, got {word!r}") from None

    return read


def _option(word: str) -> tuple[str, Any]:
    """OPTION=VALUE, the value as in JSON, or a word."""
    name, equals, value = word.partition("=")
    if not (name and equals):
        raise argparse.ArgumentTypeError(f"expected OPTION=VALUE, got {word!r}")
    if value in ("inf", "-inf"):
        return name, float(value)
    try:
        return name, json.loads({"None": "null", "none": "null", "True": "true", "False": "false"}.get(value, value))
    except ValueError:
        return name, value


def as_typed(message: str, typed: Iterable[str]) -> str:
    """An error that begins with the names of fields at fault, with those that were typed as the flags that they are."""
    head, colon, rest = message.partition(": ")
    at_fault = [name for name in head.split(", ") if colon and name in typed]
    long = "|".join(sorted(name for name in typed if "_" in name))  # others are words of English, too
    if long:
        rest = re.sub(rf"(?<![\w.-])({long})(?![\w.])", lambda found: dashed(found[0]), rest)
    return (", ".join(map(dashed, at_fault)) or head) + colon + rest


# --- help -------------------------------------------------------------------------------------------------------------


@functools.cache
def field_help(kind: Any) -> dict[str, list[tuple[str, str]]]:
    """Fields with their docstrings, by group, in the order of the source."""
    source = textwrap.dedent(inspect.getsource(kind))
    groups = {i: m[1] for i, line in enumerate(source.split("\n"), 1) if (m := re.match(r"\s*# --- (.*?) -*$", line))}
    found: dict[str, list[tuple[str, str]]] = {}
    body = next(node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)).body
    for node, after in itertools.pairwise(body):
        if not (isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)):
            continue
        text = after.value.value if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) else ""
        group = next((name for line, name in reversed(groups.items()) if line < node.lineno), "flags")
        found.setdefault(group, []).append((node.target.id, " ".join(str(text).split())))
    return found


def flags_help(default: Any, topics: Sequence[str]) -> str:
    """Every flag of a dataclass with the first sentence of its help.

    Or, with topics, the whole help of the flags and groups in whose name one of these words is; "all" is in every one.
    """
    width = max(60, min(shutil.get_terminal_size().columns, 100))
    kind: Any = type(default)
    hints, lines = get_type_hints(kind), []
    for group, fields in field_help(kind).items():
        found = []
        for name, text in fields:
            known = f"all {name} {name.replace('_', '-')} {group.lower()}"
            if topics and not any(topic in known for topic in topics):
                continue
            said = text if topics else re.split(r"(?<=\.)\s+(?=[A-Z])", text)[0].rstrip(".")
            found += _entry(name, hints[name], getattr(default, name), said, width)
        if found:
            lines += ["", group[0].upper() + group[1:], *found]
    if not lines:
        raise ValueError(f"--help: expected a word of a flag or a group of flags, or all, got {' '.join(topics)}")
    return "\n".join(lines)


def _entry(name: str, hint: Any, default: Any, text: str, width: int) -> list[str]:
    kind, flag = _without_none(hint)[0], dashed(name)
    if kind is bool:
        head, usual = f"--[no-]{flag[2:]}", "on" if default else "off"
    else:
        head, usual = f"{flag} {_metavar(kind)}", _shown(default)
        choices = get_args(kind) if get_origin(kind) is Literal else ()
        if choices and not all(choice in text for choice in choices):
            text += f" One of {', '.join(choices)}." if text.endswith(".") else f": {', '.join(choices)}"
    wrapped = textwrap.wrap(f"{text} [{usual}]", width - _COLUMN, break_on_hyphens=False)
    if len(head) + 4 > _COLUMN:
        return [f"  {head}", *(" " * _COLUMN + line for line in wrapped)]
    return [f"  {head:<{_COLUMN - 2}}{wrapped[0]}", *(" " * _COLUMN + line for line in wrapped[1:])]


def _metavar(kind: Any) -> str:
    if get_origin(kind) is tuple:
        return f"{_metavar(get_args(kind)[0])} ..."
    if get_origin(kind) is dict:
        return "OPTION=VALUE ..."
    return {int: "N", float: "X", Path: "PATH", str: "TEXT"}.get(kind, "NAME")


def _shown(default: Any) -> str:
    if isinstance(default, tuple):
        return " ".join(map(str, default)) or "none"
    if isinstance(default, dict):
        return " ".join(f"{name}={value}" for name, value in default.items()) or "none"
    return "none" if default is None else str(default)

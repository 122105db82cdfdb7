"""A dataclass as a command line: tyro reads the flags, and prints the docstrings of the fields as their help."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from entropy_kernels._console import did_you_mean
from entropy_kernels._require import require

_T = TypeVar("_T")


def parse(default: _T, words: Sequence[str], prog: str, about: str) -> tuple[_T, set[str]]:
    """`default`, a dataclass, with what the words change; and the names of the fields that they name.

    --help prints `about` and the flags. It and a mistake, which is told on stderr, end the program.
    """
    tyro: Any = require("tyro", "the trainer's command line", "train")
    registry = tyro.constructors.ConstructorRegistry()
    registry.struct_rule(functools.partial(_fields, tyro))
    registry.primitive_rule(functools.partial(_values, tyro))
    read = tyro.cli(type(default), default=default, args=words, prog=prog, description=about, registry=registry)
    typed = {word.partition("=")[0].replace("_", "-") for word in words}
    return read, {name for name in vars(default) if {_dashed(name), _dashed(f"no_{name}")} & typed}


def _fields(tyro: Any, info: Any) -> Any:
    """How tyro reads a dataclass: as it does by itself, but docstrings are paragraphs, and an empty default is none."""
    if not dataclasses.is_dataclass(info.type):
        return None
    import docstring_parser

    said = {field.arg_name: field.description or "" for field in docstring_parser.parse_from_object(info.type).params}
    hint = tyro.conf.arg(help_behavior_hint=lambda usual: f"(default: {usual or 'none'})")
    fields = (
        tyro.constructors.StructFieldSpec(
            name, Annotated[kind, hint], getattr(info.default, name), " ".join(said[name].split())
        )
        for name, kind in get_type_hints(info.type).items()
    )
    return tyro.constructors.StructConstructorSpec(instantiate=info.type, fields=tuple(fields))


def _values(tyro: Any, info: Any) -> Any:
    """How tyro reads a value: as it does by itself, but for OPTION=VALUE, none, a ~ that a shell leaves, and errors
    that say what was expected or probably meant."""
    if info.type == dict[str, Any]:
        return tyro.constructors.PrimitiveConstructorSpec(
            nargs="*",
            metavar="OPTION=VALUE ...",
            instance_from_str=lambda words: dict(map(_option, words)),
            is_instance=lambda value: isinstance(value, dict),
            str_from_instance=lambda value: [f"{name}={x}" for name, x in value.items()],
        )
    choices = get_args(info.type) if get_origin(info.type) is Literal else ()
    optional = type(None) in get_args(info.type)
    if not (optional or choices or info.type in (int, float, Path)):
        return None
    kind = str if choices else next(kind for kind in get_args(info.type) or (info.type,) if kind is not type(None))

    def read(words: list[str]) -> Any:
        word = words[0]
        if optional and word.lower() == "none":
            return None
        if choices and word not in choices:
            raise ValueError(f"expected one of {', '.join(choices)}, got {word!r}{did_you_mean(word, choices)}")
        try:
            return _READERS.get(kind, kind)(word)
        except ValueError:
            expected = {int: "an integer", float: "a number", bool: "true, false"}[kind] + " or none" * optional
            raise ValueError(f"expected {expected}, got {word!r}") from None

    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar=f"{{{','.join(choices)}}}"
        if choices
        else _METAVARS.get(kind, kind.__name__.upper()) + "|none" * optional,
        instance_from_str=read,
        is_instance=lambda value: isinstance(value, kind) or (optional and value is None),
        str_from_instance=lambda value: ["none" if value is None else str(value)],
    )


_METAVARS: dict[Any, str] = {bool: "true|false"}


def _path(word: str) -> Path:
    return Path(word).expanduser()


def _boolean(word: str) -> bool:
    if word.lower() not in ("true", "false"):
        raise ValueError
    return word.lower() == "true"


_READERS: dict[Any, Callable[[str], Any]] = {Path: _path, bool: _boolean}


def _option(word: str) -> tuple[str, Any]:
    """OPTION=VALUE, the value as in JSON, or a word."""
    name, equals, value = word.partition("=")
    if not (name and equals):
        raise ValueError(f"expected OPTION=VALUE, got {word!r}")
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
        rest = re.sub(rf"(?<![\w.-])({long})(?![\w.])", lambda found: _dashed(found[0]), rest)
    return (", ".join(map(_dashed, at_fault)) or head) + colon + rest


def _dashed(name: str) -> str:
    return "--" + name.replace("_", "-")

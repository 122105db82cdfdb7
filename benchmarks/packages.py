"""Functions of packages that may not be there: whole, without what is imported around them, or the reason why not.

Nothing of a peer is copied. A peer's function may need nothing but torch while its package cannot be imported without
a cluster scheduler or a configuration system. Its own files, as installed, are then run under their own names:
packages without their ``__init__``, and names that the functions in question do not use as empty classes.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from benchmarks.cases import HEADLINE, Case, LogitsShape


class Unavailable(Exception):
    """A peer cannot be used here; the message says why."""


@dataclass(frozen=True)
class Loader:
    """``build`` returns the peer's function in our form or raises :class:`Unavailable`.

    ``device``: "cuda" for kernels that run nowhere else. ``rows``: most rows that are timed on a GPU.
    """

    build: Callable[[], Callable[..., Any]]
    device: str | None = None
    rows: int | None = None

    def __call__(self, case: Case) -> Callable[..., Any]:
        return self.build()

    def reason(self, case: Case) -> str | None:
        """None, or why the peer cannot be used for a case."""
        try:
            self.build()
        except Unavailable as error:
            return str(error)
        if self.device is not None and case.device.type != self.device:
            return f"runs on {self.device} tensors only"
        rows = case.shape.rows if isinstance(case.shape, LogitsShape) else 0
        if self.rows is not None and case.device.type == "cuda" and rows > self.rows and case.shape != HEADLINE:
            return f"loops over rows in Python: timed up to {self.rows} rows, and at {HEADLINE}"
        return None


def cached(load: Callable[..., ModuleType]) -> Callable[..., ModuleType]:
    """Remember also that a module cannot be had: a failing import of a large package takes seconds every time."""

    @functools.cache
    def attempt(*arguments: Any) -> ModuleType | Unavailable:
        try:
            return load(*arguments)
        except Exception as error:  # a foreign package may fail to import in any way; the reason is reported
            return _unavailable(arguments[0], error)

    @functools.wraps(load)
    def loaded(*arguments: Any) -> ModuleType:
        found = attempt(*arguments)
        if isinstance(found, Unavailable):
            raise Unavailable(str(found))
        return found

    return loaded


def _unavailable(name: str, error: Exception) -> Unavailable:
    package = name.partition(".")[0]
    missing = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    if missing == package:
        return Unavailable(f"{package} is not installed")
    return Unavailable(f"{name} does not import: {type(error).__name__}: {error}")


@cached
def module_of(name: str) -> ModuleType:
    return importlib.import_module(name)


@cached
def alone(name: str, bare: tuple[str, ...], stubbed: tuple[str, ...]) -> ModuleType:
    """The module whole, or else by itself, with stubs around it."""
    try:
        return module_of(name)
    except Unavailable:
        return load(name, bare=bare, stubbed=stubbed)


def attribute(module: ModuleType, name: str) -> Any:
    try:
        return getattr(module, name)
    except AttributeError:
        raise Unavailable(f"{module.__name__} has no {name} in the installed version") from None


def function_of(module: str, name: str) -> Any:
    return attribute(module_of(module), name)


# --- a module without its package -------------------------------------------------------------------------------------


class _Stub(ModuleType):
    """Any attribute but a submodule is a new empty class."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        made = type(name, (), {})
        setattr(self, name, made)
        return made


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Bare packages, and stubs for some modules and everything below them."""

    def __init__(self, bare: dict[str, Path], names: Sequence[str]) -> None:
        self._bare, self._names = bare, tuple(names)

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if fullname in self._bare:
            spec = importlib.machinery.ModuleSpec(fullname, self, is_package=True)
            spec.submodule_search_locations = [str(self._bare[fullname])]
            return spec
        if any(fullname == name or fullname.startswith(name + ".") for name in self._names):
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return _Stub(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        return None


def load(
    module: str, *, bare: Sequence[str], stubbed: Sequence[str], keep: Mapping[str, Mapping[str, Any]] | None = None
) -> ModuleType:
    """Import ``module`` from the files of its installed package, with stubs around it.

    Afterwards ``sys.modules`` is as it was before, but for what is kept.

    Args:
        bare: its packages whose ``__init__`` is not run; attributes that the module takes from them are empty classes.
        stubbed: modules replaced by empty ones, also where the real one is installed.
        keep: modules that a function imports each time it is called, each with the attributes that are set on it.

    Raises:
        ModuleNotFoundError: the package is not installed.
    """
    package = module.partition(".")[0]
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise ModuleNotFoundError(f"No module named {package!r}", name=package)
    root = Path(found.submodule_search_locations[0])
    finder = _Finder({name: root.joinpath(*name.split(".")[1:]) for name in bare}, stubbed)
    kept = {}
    with _replaced((package, *stubbed)):
        sys.meta_path.insert(0, finder)
        try:
            loaded = importlib.import_module(module)
            for name, attributes in (keep or {}).items():
                kept[name] = importlib.import_module(name)
                for attribute, value in attributes.items():
                    setattr(kept[name], attribute, value)
        finally:
            sys.meta_path.remove(finder)
    sys.modules.update(kept)
    return loaded


@contextlib.contextmanager
def _replaced(names: Sequence[str]) -> Iterator[None]:
    """Take ``names`` and what is below them out of ``sys.modules``; put back what was there in the end."""

    def own() -> dict[str, ModuleType]:
        return {
            key: sys.modules[key] for key in list(sys.modules) if any((key + ".").startswith(n + ".") for n in names)
        }

    before = own()
    for key in before:
        del sys.modules[key]
    try:
        yield
    finally:
        for key in own():
            del sys.modules[key]
        sys.modules.update(before)

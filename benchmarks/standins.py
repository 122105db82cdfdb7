"""Modules of an installed package without what the package imports around them.

A peer's function may need nothing but torch while its package cannot be imported without a cluster scheduler or a
configuration system. Its own files, as installed, are run here under their own names: packages without their
``__init__``, and names that the functions in question do not use as empty classes. Afterwards ``sys.modules`` is as it
was before, but for modules that a function imports from each time it is called.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any


class _StandIn(ModuleType):
    """Any attribute but a submodule is a new empty class."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        made = type(name, (), {})
        setattr(self, name, made)
        return made


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Bare packages, and stand-ins for some modules and everything below them."""

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
        return _StandIn(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        return None


def load(
    module: str,
    *,
    bare: Sequence[str],
    stand_ins: Sequence[str],
    keep: Mapping[str, Mapping[str, Any]] | None = None,
) -> ModuleType:
    """Import ``module`` from the files of its installed package, with stand-ins around it.

    Args:
        bare: its packages whose ``__init__`` is not run; attributes that the module takes from them are empty classes.
        stand_ins: modules replaced by empty ones, also where the real one is installed.
        keep: modules that stay in ``sys.modules``, each with the attributes that are set on it.

    Raises:
        ModuleNotFoundError: the package is not installed.
    """
    package = module.partition(".")[0]
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise ModuleNotFoundError(f"No module named {package!r}", name=package)
    root = Path(found.submodule_search_locations[0])
    folders = {name: root.joinpath(*name.split(".")[1:]) for name in bare}
    kept = {}
    with _replaced((package, *stand_ins)), _first(_Finder(folders, stand_ins)):
        loaded = importlib.import_module(module)
        for name, attributes in (keep or {}).items():
            kept[name] = importlib.import_module(name)
            for attribute, value in attributes.items():
                setattr(kept[name], attribute, value)
    sys.modules.update(kept)
    return loaded


@contextlib.contextmanager
def _first(finder: importlib.abc.MetaPathFinder) -> Iterator[None]:
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)


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

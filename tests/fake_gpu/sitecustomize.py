"""A fake GPU for any Python command and its children: PYTHONPATH=tests/fake_gpu python -m pytest -m gpu ...

Python imports this module when it starts. It changes nothing but the import of a few modules: before torch comes a
library that torch's autograd asks for streams, after torch fake_gpu.py, which says what is faked and what is not.
"""

from __future__ import annotations

import atexit
import ctypes
import importlib.util
import os
import subprocess
import sys
import tempfile
import time
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

HERE = Path(__file__).resolve().parent
os.environ["TRITON_INTERPRET"] = "1"
os.environ["ENTROPY_KERNELS_TRITON_TUNE"] = "0"
# for children with another working directory
_PATHS = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
os.environ["PYTHONPATH"] = os.pathsep.join(map(os.path.abspath, _PATHS))
# what pytest skips on the fake GPU, in the workers of xdist too
_PLUGINS = os.environ.get("PYTEST_PLUGINS", "").split(",")
os.environ["PYTEST_PLUGINS"] = ",".join(filter(None, dict.fromkeys((*_PLUGINS, "fake_gpu_limits"))))


def load_library(torch_folder: Path) -> None:
    """Autograd's engine asks for streams below Python. It remembers what it found: so this comes before torch."""
    source = HERE / "fake_gpu.cpp"
    stamp = f"{source.stat().st_mtime_ns}-{torch_folder.stat().st_mtime_ns}"
    library = Path(tempfile.gettempdir()) / f"fake_gpu-{os.getuid()}-{stamp}.so"
    if not library.exists():
        made = library.with_suffix(f".{os.getpid()}")
        libraries = (f"-Wl,-rpath,{torch_folder / 'lib'}", f"-L{torch_folder / 'lib'}", "-lc10", "-ltorch_cpu")
        flags = ("-std=c++20", "-shared", "-fPIC", "-w", f"-I{torch_folder / 'include'}")
        command = [os.environ.get("CXX", "g++"), *flags, str(source), *libraries, "-o", str(made)]
        subprocess.run(command, check=True)
        made.rename(library)
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)  # fake_gpu.py finds fake_gpu_hang in it


class Finder:
    """Of sys.meta_path: finds what the others find, and acts around the import of these modules."""

    PATCHED = (
        "torch",
        "triton.runtime.interpreter",
        "entropy_kernels._arguments",
        "entropy_kernels.backends.native",
        "entropy_kernels.backends.triton.tiling",
    )

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name not in self.PATCHED:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, (finder.find_spec(name, path, target) for finder in others)), None)
        if spec is not None and spec.loader is not None:
            spec.loader.exec_module = _around(name, spec.loader.exec_module)  # type: ignore[method-assign]
        return spec


def _around(name: str, execute: Any) -> Any:
    def exec_module(module: ModuleType) -> None:
        if name == "torch":
            load_library(Path(module.__file__).parent)
        execute(module)
        import fake_gpu  # patches torch, once

        if name != "torch":
            fake_gpu.PATCHES[name](module)

    return exec_module


sys.meta_path.insert(0, Finder())
# The engine's thread of the fake device may still be giving up its last references. One that asks for the GIL when
# Python has begun to end is unwound through C++, which aborts the process: so the end waits for it, last of all
atexit.register(time.sleep, 0.3)


def _run_the_shadowed() -> None:
    """Python would have imported another sitecustomize, if this one were not there."""
    path = [folder for folder in sys.path if Path(folder).resolve() != HERE]
    spec = PathFinder.find_spec("sitecustomize", path)
    if spec is not None and spec.loader is not None:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


_run_the_shadowed()

"""``make gpu-prebuilt TORCH=FOLDER``: build ``_ops.so`` and ``_ops_cuda.so`` for one GPU architecture, without a GPU.

FOLDER is an unpacked wheel of a CUDA build of torch (or a site-packages with one). None of its Python is imported, so
the wheel may be of another version of Python. What was linked is audited: a library may need torch's stable C ABI and
the C, C++ and CUDA runtimes, and nothing else, so that one file serves every torch >= 2.10 and every Python. Then it is
loaded against FOLDER, up to the first CUDA library that this machine lacks; the linker has found every symbol before.

Beside the libraries lies ``prebuilt.json``: what they were built from and for, and what they need. :func:`install` puts
them into the package if they fit, so that a GPU machine need not build.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent))
import cuda_build
from cuda_build import ROOT

LIBRARIES = ("_ops.so", "_ops_cuda.so")
RECORD = "prebuilt.json"
#: What Ubuntu 22.04 has: the oldest system that GPU machines commonly run.
COMMON = {"GLIBC": "2.35", "GLIBCXX": "3.4.30", "CXXABI": "1.3.13"}

# What every library may have undefined, and nothing needs to define.
_OF_THE_LINKER = {"_ITM_deregisterTMCloneTable", "_ITM_registerTMCloneTable", "__gmon_start__"}
_RUNTIMES = re.compile(r"(GLIBC|GLIBCXX|CXXABI|GCC)_[\d.]+|libcudart\.so\.\d+")
_SHIMS = ("torch/csrc/stable/c/shim.h", "torch/csrc/inductor/aoti_torch/c/shim.h")
_CUDA_LIBRARY_MISSING = re.compile(r"(lib(?:cu|nv|nccl)\S+): cannot open shared object file")


def fingerprint(root: Path = ROOT) -> str:
    """A hash of all that the libraries are made from: the sources, and the file with the flags."""
    files = [path for path in (root / "csrc").rglob("*") if path.suffix in (".h", ".cpp", ".cu", ".cuh")]
    digest = hashlib.sha256()
    for path in sorted([*files, root / "tools" / "cuda_build.py"]):
        digest.update(f"{path.relative_to(root).as_posix()}\0{path.stat().st_size}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


# ---- audit -----------------------------------------------------------------------------------------------------------


class Symbol(NamedTuple):
    """A symbol that a library needs of others; the version is empty where the linker found none."""

    name: str
    version: str


def undefined(library: Path) -> list[Symbol]:
    command = ["nm", "-D", "--undefined-only", "--with-symbol-versions", str(library)]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    names = [line.split()[-1].replace("@@", "@").partition("@") for line in text.splitlines()]
    return [Symbol(name, version) for name, _, version in names]


def foreign(symbols: Sequence[Symbol], include: Path) -> list[str]:
    """The symbols that neither torch's stable C ABI nor a runtime offers; ``include`` is of torch.

    C++ symbols of torch are foreign, and so are Python's.
    """
    headers = "".join((include / shim).read_text() for shim in _SHIMS)
    shims = set(re.findall(r"\b(?:aoti_)?torch_\w+", headers))
    # torch's own libraries have libstdc++'s symbols without their version, and the linker may take them from there
    runtime = ctypes.CDLL("libstdc++.so.6")
    return [
        name
        for name, version in symbols
        if not (_RUNTIMES.fullmatch(version) or name in shims or name in _OF_THE_LINKER or hasattr(runtime, name))
    ]


def needed_versions(symbols: Sequence[Symbol]) -> dict[str, str]:
    """The highest version of each runtime: ``{"GLIBC": "2.34", "GLIBCXX": "3.4.29", …}``."""
    versions: dict[str, str] = {}
    for symbol in symbols:
        runtime, _, version = symbol.version.partition("_")
        if version and _number(version) > _number(versions.get(runtime, "0")):
            versions[runtime] = version
    return dict(sorted(versions.items()))


def _number(version: str) -> list[int]:
    return [int(part) for part in version.split(".")]


def audit(library: Path, include: Path) -> dict[str, str]:
    """The versions of the runtimes that the library needs.

    Raises:
        RuntimeError: it needs symbols that are not of the stable ABI.
    """
    symbols = undefined(library)
    found = foreign(symbols, include)
    if found:
        raise RuntimeError(
            f"{library.name}: expected only symbols of torch's stable C ABI and of the C, C++ and CUDA runtimes, got "
            f"{', '.join(found)} (c++filt shows what they are)"
        )
    return needed_versions(symbols)


# ---- loading ---------------------------------------------------------------------------------------------------------

# All symbols are bound at once, so that one that is missing shows.
_LOAD = """
import ctypes, os, sys
for library in sys.argv[1:]:
    ctypes.CDLL(library, mode=os.RTLD_NOW | os.RTLD_GLOBAL)
"""


def missing_cuda_library(libraries: Sequence[Path], folders: Sequence[Path]) -> str | None:
    """Load the libraries, one after another, in a process without torch; the CUDA library that this stops at, or None.

    Args:
        libraries: to load.
        folders: where their dependencies are looked for before the system's folders.

    Raises:
        RuntimeError: they do not load for another reason.
    """
    environment = {**os.environ, "LD_LIBRARY_PATH": ":".join(str(folder.resolve()) for folder in folders)}
    command = [sys.executable, "-c", _LOAD, *(str(library.resolve()) for library in libraries)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode == 0:
        return None
    missing = _CUDA_LIBRARY_MISSING.search(done.stderr)
    if missing is None:
        raise RuntimeError(f"{libraries[-1].name} does not load: {_last_line(done)}")
    return missing[1]


def _last_line(done: subprocess.CompletedProcess[str]) -> str:
    lines = done.stderr.strip().splitlines()
    return lines[-1] if lines else f"exit status {done.returncode}"


# ---- build -----------------------------------------------------------------------------------------------------------


def build(site: Path, out: Path, architecture: str) -> None:
    """Build, audit and load both libraries; they and the record lie in ``out``, or it raises and there is no record.

    Args:
        site: the folder in which torch/ lies.
        out: the folder to write.
        architecture: one, as in TORCH_CUDA_ARCH_LIST.
    """
    torch_folder = site / "torch"
    if not (torch_folder / "lib" / "libtorch_cuda.so").exists():
        raise FileNotFoundError(
            f"TORCH: expected the folder of an unpacked wheel of a CUDA build of torch, got {site} without "
            f"torch/lib/libtorch_cuda.so (unzip torch-*.whl -d FOLDER)"
        )
    version = runpy.run_path(str(torch_folder / "version.py"))
    reason = cuda_build.skip_reason(version["cuda"])
    compiler = cuda_build.nvcc()
    if reason is not None or compiler is None:
        raise RuntimeError(reason)
    cuda_build.gencode_flags([architecture])  # raises before the long build
    (out / RECORD).unlink(missing_ok=True)
    built_from = fingerprint()  # before: an edit during the build makes the libraries stale
    operators, kernels = (out / name for name in LIBRARIES)
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as objects:
        cuda_build.build_operators(operators, Path(objects) / "cpu", torch_folder)
        print(f"{operators.name}: built in {time.perf_counter() - begin:.0f} s", flush=True)
        begin = time.perf_counter()
        cuda_build.build(kernels, Path(objects) / "cuda", torch_folder, torch_has_cuda=True, names=[architecture])
        print(f"{kernels.name}: built in {time.perf_counter() - begin:.0f} s", flush=True)
    needs = {library.name: _check(library, [operators, kernels], site, compiler) for library in (operators, kernels)}
    record = {
        "torch": version["__version__"],
        "architecture": architecture,
        "nvcc": ".".join(map(str, cuda_build.toolkit_version(compiler))),
        "fingerprint": built_from,
        "needs": needs,
    }
    (out / RECORD).write_text(json.dumps(record, indent=2) + "\n")
    print(f"{out / RECORD}: torch {record['torch']}, architecture {architecture}, nvcc {record['nvcc']}")


def _check(library: Path, libraries: Sequence[Path], site: Path, compiler: str) -> dict[str, str]:
    """Audit and load one of the libraries, after those that come before it; says what came out."""
    needs = audit(library, site / "torch" / "include")
    print(f"{library.name}: {library.stat().st_size / (1 << 20):.1f} MiB; the stable ABI alone; needs", end=" ")
    print(", ".join(f"{runtime} {version}" for runtime, version in needs.items()))
    for runtime, version in COMMON.items():
        if _number(needs.get(runtime, "0")) > _number(version):
            print(
                f"warning: {library.name} needs {runtime}_{needs[runtime]}, Ubuntu 22.04 has {version}: build on an "
                "older system if the GPU machine is one",
                file=sys.stderr,
            )
    folders = [site / "torch" / "lib", *site.glob("nvidia/*/lib"), cuda_build.toolkit_root(compiler) / "lib64"]
    missing = missing_cuda_library(libraries[: libraries.index(library) + 1], folders)
    print(f"{library.name}: loads" + (f" up to {missing}, which is not here" if missing else ""), flush=True)
    return needs


# ---- install ---------------------------------------------------------------------------------------------------------

_FITS = """
import sys, torch
from entropy_kernels.backends import native
reason = native.load_error or native.cuda_load_error
if reason is None and torch.cuda.is_available():
    capability = "{}.{}".format(*torch.cuda.get_device_capability())
    if capability != sys.argv[1]:
        reason = f"built for architecture {sys.argv[1]}, this GPU has {capability}"
sys.exit(reason)
"""


def install(folder: Path, package_folder: Path, python: str = sys.executable) -> str | None:
    """Put the libraries of ``folder`` into the package, if they were built from these sources and load there.

    Args:
        folder: what ``make gpu-prebuilt`` has written.
        package_folder: entropy_kernels/, as ``python`` is to import it.
        python: the interpreter, with torch, that they have to load in.

    Returns:
        None if they are in place. Otherwise the reason in one line, and the package is as it was.
    """
    try:
        record = json.loads((folder / RECORD).read_text())
        built_from, architecture = str(record["fingerprint"]), str(record["architecture"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        return f"{folder / RECORD}: expected the record of make gpu-prebuilt, got {error!r}"
    if built_from != fingerprint():
        return f"{folder}: built from other sources than these; make gpu-prebuilt builds them anew"
    missing = [name for name in LIBRARIES if not (folder / name).is_file()]
    if missing:
        return f"{folder}: expected {' and '.join(LIBRARIES)}, got none of {', '.join(missing)}"
    with tempfile.TemporaryDirectory(dir=package_folder) as kept:
        reason: str | None = "interrupted"
        try:
            for name in LIBRARIES:
                # by renaming: a process that has the old file loaded keeps it
                if (package_folder / name).exists():
                    os.replace(package_folder / name, Path(kept) / name)
                shutil.copy(folder / name, package_folder / name)
            number = re.sub(r"[af]?(\+PTX)?$", "", architecture)
            command = [python, "-c", _FITS, number]
            done = subprocess.run(command, cwd=package_folder.parent, capture_output=True, text=True)
            reason = None if done.returncode == 0 else f"{folder}: {_last_line(done)}"
        finally:
            if reason is not None:
                for name in LIBRARIES:
                    (package_folder / name).unlink(missing_ok=True)
                    if (Path(kept) / name).exists():
                        os.replace(Path(kept) / name, package_folder / name)
    return reason


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="gpu_prebuilt", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("torch", type=Path, metavar="FOLDER", help="an unpacked wheel of torch, of a CUDA build")
    parser.add_argument("--arch", default="9.0a", help="of the GPU (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu-prebuilt", help="default: %(default)s")
    arguments = parser.parse_args(argv)
    try:
        build(arguments.torch, arguments.out, arguments.arch)
    except (OSError, RuntimeError, ValueError) as error:
        print(f"gpu-prebuilt: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

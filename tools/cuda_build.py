"""How the native half is compiled: the one place for its flags, used by setup.py, ``make cuda-check`` and
``make gpu-prebuilt``.

Switches: ENTROPY_KERNELS_SKIP_CUDA=1 builds none, FORCE_CUDA=1 makes it an error where it cannot be built,
TORCH_CUDA_ARCH_LIST chooses architectures as torch's own builds do ("8.0;9.0a+PTX"), MAX_JOBS and NVCC_THREADS limit
parallelism, CUDA_HOME names the toolkit.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# The lowest torch that the binaries support; a build on a newer torch must not use newer symbols.
TORCH_TARGET_VERSION = "0x020a000000000000"
# Ampere, Hopper and Blackwell (data centre) as machine code; the driver compiles the PTX of the first for all others.
ARCHITECTURES = ("8.0+PTX", "9.0a", "10.0a")
_NEWEST_TOOLKIT_NEEDED = {"10.0a": (12, 8)}

# What _ops.so is made of; for _ops_cuda.so see sources().
OPERATOR_SOURCES = ("csrc/registration.cpp", "csrc/cpu/*.cpp")
CXX_FLAGS = (
    "-O3", "-std=c++20", "-fvisibility=hidden", "-Wall", "-Wno-psabi", "-Wno-unknown-pragmas", "-g0",
    # Fused multiply-adds are written where they are meant: the same logit must round alike in every loop that sees it.
    "-ffp-contract=off",
)  # fmt: skip
STABLE_ABI_FLAG = f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}"

NVCC_FLAGS = (
    "-std=c++20", "-O3", "-DUSE_CUDA", STABLE_ABI_FLAG,
    "-fmad=false",  # as -ffp-contract=off above
    # Kernels that call host code, constexpr or not, are only warned of by default, and what comes behind the call is
    # missing from their machine code.
    "-diag-error=20011,20013,20014,20015",
    "-Xcompiler=-fPIC,-fvisibility=hidden,-ffp-contract=off,-Wall,-Wno-unknown-pragmas",
)  # fmt: skip


def enabled(switch: str) -> bool:
    """Whether an environment variable is set to something other than 0."""
    return os.environ.get(switch, "0") not in ("", "0")


def nvcc() -> str | None:
    """Path of the compiler: of CUDA_HOME, else of PATH, else of the usual place."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home:
        return shutil.which("nvcc", path=str(Path(home) / "bin"))
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def toolkit_version(compiler: str) -> tuple[int, int]:
    text = subprocess.run([compiler, "--version"], check=True, capture_output=True, text=True).stdout
    found = re.search(r"release (\d+)\.(\d+)", text)
    if found is None:
        raise RuntimeError(f"{compiler} --version: expected 'release MAJOR.MINOR', got {text!r}")
    return int(found[1]), int(found[2])


def toolkit_root(compiler: str) -> Path:
    """The folder of include/ and lib64/: beside the real bin/nvcc, which PATH may name through a link."""
    for path in (Path(compiler), Path(compiler).resolve(), Path("/usr/local/cuda/bin/nvcc")):
        if (path.parent.parent / "include" / "cuda_runtime.h").exists():
            return path.parent.parent
    raise RuntimeError(f"{compiler}: expected include/cuda_runtime.h beside its bin folder; set CUDA_HOME")


def skip_reason(torch_cuda: str | None) -> str | None:
    """Why the CUDA half is not built for a torch whose ``torch.version.cuda`` this is; None if it is."""
    if enabled("ENTROPY_KERNELS_SKIP_CUDA"):
        return "ENTROPY_KERNELS_SKIP_CUDA is set"
    if torch_cuda is None:
        return "this torch is built without CUDA"
    compiler = nvcc()
    if compiler is None:
        return "no CUDA toolkit found (nvcc; CUDA_HOME)"
    major = toolkit_version(compiler)[0]
    if major != int(torch_cuda.split(".")[0]):
        return f"nvcc is of CUDA {major}, torch of CUDA {torch_cuda}"
    return None


def architectures(version: tuple[int, int]) -> list[str]:
    """TORCH_CUDA_ARCH_LIST, or those of ARCHITECTURES that a toolkit of this version knows."""
    chosen = re.split(r"[\s;]+", os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip())
    if chosen != [""]:
        return chosen
    return [name for name in ARCHITECTURES if version >= _NEWEST_TOOLKIT_NEEDED.get(name, (0, 0))]


def gencode_flags(names: list[str]) -> list[str]:
    """``8.0+PTX`` -> machine code for sm_80 and its PTX."""
    flags = []
    for name in names:
        found = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", name)
        if found is None:
            raise ValueError(
                "TORCH_CUDA_ARCH_LIST (or ARCH of make gpu-prebuilt): expected entries like 8.0, 9.0a or 9.0+PTX, got "
                f"{name!r}"
            )
        number = found[1] + found[2] + found[3]
        code = f"[sm_{number},compute_{number}]" if found[4] else f"sm_{number}"
        flags += ["-gencode", f"arch=compute_{number},code={code}"]
    return flags


def sources() -> list[Path]:
    """From the back: first those over rows, which take the longest, so that no core is left alone with one of them."""
    return sorted((path for kind in ("*.cu", "*.cpp") for path in (ROOT / "csrc" / "cuda").glob(kind)), reverse=True)


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stderr


def _compile(compiler: Sequence[str], files: Sequence[Path], folder: Path) -> tuple[list[str], list[str]]:
    """Compile the files into ``folder``, several at once; the objects, and what the compiler said of each file."""
    folder.mkdir(parents=True, exist_ok=True)
    objects = [str(folder / f"{file.name}.o") for file in files]
    commands = [[*compiler, "-c", str(file), "-o", target] for file, target in zip(files, objects, strict=True)]
    jobs = int(os.environ.get("MAX_JOBS", 0)) or os.cpu_count() or 1
    with ThreadPoolExecutor(jobs) as pool:
        return objects, list(pool.map(_run, commands))


def build_operators(
    library: Path, folder: Path, torch_folder: Path, flags: Sequence[str] = (), more: Sequence[Path] = ()
) -> None:
    """Compile and link ``_ops.so`` against a torch that need not be installed; setup.py leaves that to torch.

    Args:
        library: the shared library to write.
        folder: for object files.
        torch_folder: with its include/ and lib/.
        flags: of the compiler, beside the usual ones.
        more: sources beside the usual ones.
    """
    compiler = [*os.environ.get("CXX", "c++").split(), "-fPIC", *CXX_FLAGS, STABLE_ABI_FLAG]
    compiler += [f"-I{ROOT / 'csrc'}", "-isystem", str(torch_folder / "include"), *flags]
    files = [*sorted(path for pattern in OPERATOR_SOURCES for path in ROOT.glob(pattern)), *more]
    objects, _ = _compile(compiler, files, folder)
    library.parent.mkdir(parents=True, exist_ok=True)
    link = [*compiler, "-shared", "-Wl,-z,defs", *objects, f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-lc10"]
    _run([*link, "-o", str(library)])


def build(
    library: Path,
    folder: Path,
    torch_folder: Path,
    *,
    torch_has_cuda: bool,
    names: Sequence[str] = (),
    report: bool = False,
) -> str:
    """Compile every source into ``folder``, link ``library``; with ``report``, returns what ptxas says of the kernels.

    Args:
        library: the shared library to write.
        folder: for object files.
        torch_folder: of the installed torch, with its include/ and lib/.
        torch_has_cuda: whether that is a CUDA build. Without it the library only loads where symbols are bound lazily.
        names: the architectures; without any, :func:`architectures`.
        report: ask ptxas for each kernel's resources.
    """
    compiler = nvcc()
    if compiler is None:
        raise RuntimeError("no CUDA toolkit found (nvcc; CUDA_HOME)")
    targets = gencode_flags(list(names) or architectures(toolkit_version(compiler)))
    flags = [*NVCC_FLAGS, *targets]
    flags += [f"-I{ROOT / 'csrc'}", f"-isystem={torch_folder / 'include'}"]
    if report:
        flags += ["-Xptxas=-v"]  # with several threads the architectures' reports would mix
    else:
        flags += ["--threads", os.environ.get("NVCC_THREADS", "1")]
    objects, reports = _compile([compiler, *flags], sources(), folder)
    library.parent.mkdir(parents=True, exist_ok=True)
    # a symbol that torch lacks is an error of the build, not of the first import
    libraries = ["-ltorch_cpu", *(["-ltorch_cuda", "-Xlinker=-z,defs"] if torch_has_cuda else []), "-lc10"]
    folders = [f"-L{torch_folder / 'lib'}", f"-L{toolkit_root(compiler) / 'lib64'}"]
    link = [compiler, "-shared", "-cudart=shared", *targets, *objects, *folders, *libraries]
    _run([*link, "-o", str(library)])
    return "".join(reports)

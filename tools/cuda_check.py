"""``make cuda-check``: compile every CUDA kernel for every architecture, without a GPU, and look at what came out.

Compiles against the headers of the torch that is installed (a CPU build will do), links, prints registers, shared
memory, spills and stack frame of each kernel, and loads the library to see that it registers its operators. Fails on a
spill or a stack frame: local memory is device memory. Without a toolkit it says so and succeeds.

``cuda_check.py FOLDER/torch`` does the same against the headers and libraries of another torch, as an unpacked wheel
has them, but does not load what was built.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import cuda_build


@dataclass(frozen=True)
class Usage:
    """What ptxas says that one kernel takes on one architecture; bytes but for the registers."""

    kernel: str
    architecture: str
    registers: int
    shared: int
    stack: int
    spilled: int

    @property
    def ok(self) -> bool:
        return self.stack == 0 and self.spilled == 0


_ENTRY = re.compile(r"Compiling entry function '([^']+)' for '([^']+)'")
_STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers")
_SHARED = re.compile(r"(\d+) bytes smem")


def parse(report: str) -> list[Usage]:
    """The kernels in a report of ``ptxas -v``. A line that is missing is an error: nothing passes unseen."""
    usages = []
    entries = list(_ENTRY.finditer(report))
    ends = [entry.start() for entry in entries[1:]] + [len(report)]
    for entry, end in zip(entries, ends, strict=False):
        text = report[entry.end() : end]
        stack, used, shared = _STACK.search(text), _USED.search(text), _SHARED.search(text)
        if stack is None or used is None:
            raise ValueError(f"ptxas says nothing of the stack or the registers of {entry[1]} for {entry[2]}: {text!r}")
        spilled = int(stack[2]) + int(stack[3])
        usages.append(Usage(entry[1], entry[2], int(used[1]), int(shared[1]) if shared else 0, int(stack[1]), spilled))
    return usages


def problems(usages: list[Usage]) -> list[str]:
    """What is wrong: kernels in local memory, kernels that an architecture lacks, no kernels."""
    found = [
        f"{u.kernel} for {u.architecture}: {u.stack} bytes of stack, {u.spilled} spilled" for u in usages if not u.ok
    ]
    by_architecture = {u.architecture: {v.kernel for v in usages if v.architecture == u.architecture} for u in usages}
    every = set().union(*by_architecture.values())
    for architecture, kernels in by_architecture.items():
        found += [f"{kernel} is missing for {architecture}" for kernel in sorted(every - kernels)]
    return found if usages else ["no kernels in the compiler's report"]


def readable(symbol: str) -> str:
    """``token_stats_forward<BFloat16Pair, true, false>`` from a mangled name; the name itself without c++filt."""
    if shutil.which("c++filt") is None:
        return symbol
    name = subprocess.run(["c++filt", symbol], check=True, capture_output=True, text=True).stdout.strip()
    name = re.sub(r"\w+::|\(anonymous namespace\)::|^void ", "", name)
    return re.sub(r"Pairs<(\w+)>", r"\1", name.split("(")[0])


def table(usages: list[Usage]) -> str:
    """One line per kernel and architecture."""
    names = {u.kernel: readable(u.kernel) for u in usages}
    width = max(map(len, names.values()), default=6)
    lines = [f"{'kernel':{width}}  {'target':8} {'registers':>9} {'shared':>7} {'spilled':>8} {'stack':>6}"]
    for u in sorted(usages, key=lambda u: (names[u.kernel], u.architecture)):
        row = f"{names[u.kernel]:{width}}  {u.architecture:8} {u.registers:9} {u.shared:7} {u.spilled:8} {u.stack:6}"
        lines.append(row + ("" if u.ok else "  <- local memory"))
    return "\n".join(lines)


# In a process of its own: symbols are bound when they are first used, so that a CPU build of torch, which lacks the one
# that gives the current stream, can load the library too.
_LOAD = """
import ctypes, os, sys, torch
operators, library, runtime = sys.argv[1:]
torch.ops.load_library(operators)
ctypes.CDLL(runtime, mode=ctypes.RTLD_GLOBAL)
ctypes.CDLL(library, mode=os.RTLD_LAZY)
names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("entropy_kernels_native::")]
missing = [name for name in names if not torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA")]
assert names and not missing, f"no CUDA kernel of {missing}"
"""


def load_error(library: Path, compiler: str) -> str | None:
    """Why the library does not load, or does not register its operators."""
    operators = cuda_build.ROOT / "entropy_kernels" / "_ops.so"
    runtime = cuda_build.toolkit_root(compiler) / "lib64" / "libcudart.so"
    command = [sys.executable, "-c", _LOAD, str(operators), str(library), str(runtime)]
    loaded = subprocess.run(command, capture_output=True, text=True)
    return None if loaded.returncode == 0 else f"the library does not load: {loaded.stderr.strip().splitlines()[-1]}"


def main(arguments: Sequence[str] = ()) -> int:
    compiler = cuda_build.nvcc()
    if compiler is None:
        print("cuda-check: skipped: no CUDA toolkit here (nvcc is neither in CUDA_HOME nor in PATH)")
        return 0
    import torch

    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "_ops_cuda.so"
        torch_folder = Path(arguments[0]) if arguments else Path(torch.__file__).parent
        has_cuda = (torch_folder / "lib" / "libtorch_cuda.so").exists()
        usages = parse(cuda_build.build(library, Path(folder), torch_folder, torch_has_cuda=has_cuda, report=True))
        seconds = time.perf_counter() - begin
        found = problems(usages)
        unloadable = None if arguments else load_error(library, compiler)
    if unloadable is not None:
        found.append(unloadable)
    print(table(usages))
    architectures = ", ".join(sorted({u.architecture for u in usages}))
    print(f"{len(usages)} kernels ({architectures}) compiled and linked in {seconds:.0f} s", flush=True)
    for problem in found:
        print(f"cuda-check: {problem}", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

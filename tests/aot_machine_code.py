"""What a kernel that Triton compiled takes, read off its code: for aot_triton.py."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# target -> what a multiprocessor has of registers (per thread of a warp, AMD: per lane of one of 4 SIMDs), shared
# memory in bytes (less 1 KB per program) and threads
_SHARED = {"sm_80": 164 << 10, "sm_90": 228 << 10, "sm_100": 228 << 10, "gfx942": 64 << 10}


@dataclass(frozen=True)
class Loop:
    """The first loop that loads 16 bytes at a time and takes exponentials."""

    copies: int  # asynchronous ones, into shared memory
    loads: int  # into registers
    exponentials: int
    before_last_load: int  # exponentials that the program takes before it has issued all of the loop's loads


@dataclass(frozen=True)
class Usage:
    """What a compiled kernel takes; ``spilled`` are bytes of the stack, ``wide`` counts 16-byte global loads.

    ``products``, ``blocks``: instructions for tensor cores, and for copies of whole blocks. These three are counted in
    PTX, where an instruction is wide or for tensor cores as it is in the machine code; AMD's is the machine code.
    """

    name: str
    registers: int
    spilled: int
    shared: int  # bytes
    resident: int  # programs that a multiprocessor holds at a time
    wide: int
    products: int
    blocks: int
    loop: Loop | None = None  # where the machine code was read


def usage(name: str, target: str, kernel: Any, loop: bool) -> Usage:
    """``loop``: read the machine code's. NVIDIA's disassembler takes as long as many a kernel's compiler."""
    return _amd(name, target, kernel) if target.startswith("gfx") else _nvidia(name, target, kernel, loop)


def _resident(target: str, kernel: Any, registers: int) -> int:
    warps = kernel.metadata.num_warps
    if target.startswith("gfx"):
        return 4 * min(8, 512 // (-(-registers // 8) * 8)) // warps
    by_registers = 65_536 // (-(-registers // 8) * 8 * 32 * warps)
    return min(by_registers, _SHARED[target] // (kernel.metadata.shared + 1024), 64 // warps)


def _nvidia(name: str, target: str, kernel: Any, read_loop: bool) -> Usage:
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "kernel.cubin"
        binary.write_bytes(kernel.asm["cubin"])

        def run(*command: str) -> str:
            path = str(_TOOLS / command[0])
            return subprocess.run([path, *command[1:], str(binary)], capture_output=True, text=True, check=True).stdout

        report, code = run("cuobjdump", "-res-usage"), run("nvdisasm", "-c", "-ndf") if read_loop else None
    used = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", report)}
    resident, spilled = _resident(target, kernel, used["REG"]), used["STACK"] + used["LOCAL"]
    ptx = kernel.asm["ptx"]
    wide = len(re.findall(r"\bld\.global[.:\w]*\.v(?:4\.\w32|2\.\w64)|\bcp\.async\.cg\.shared\.global", ptx))
    products = len(re.findall(r"\b(?:wgmma\.mma_async|mma\.sync|tcgen05\.mma)\b", ptx))
    blocks = len(re.findall(r"\bcp\.async\.bulk\.tensor\.\w+\.shared", ptx))  # into shared memory
    label, branch, load, copy = r"^(\.L_x_\d+):", r"\bBRA\b.*`\((\.L_x_\d+)\)", r"LDG\.E[.\w]*128", r"LDGSTS[.\w]*128"
    loop = None if code is None else _loop(code, label, branch, load, copy, "MUFU.EX2")
    return Usage(name, used["REG"], spilled, kernel.metadata.shared, resident, wide, products, blocks, loop)


def _amd(name: str, target: str, kernel: Any) -> Usage:
    code = kernel.asm["amdgcn"]

    def field(key: str) -> int:
        return int(re.findall(rf"\.{key}:\s*(\d+)", code)[-1])

    # scalar registers spilled into lanes of vector registers cost no memory; a private segment is memory
    spilled = field("private_segment_fixed_size") + 4 * field("vgpr_spill_count")
    load = r"(?:global|buffer)_load_dwordx4"
    loop = _loop(code, r"^(\.LBB\d+_\d+):", r"s_c?branch\S*\s+(\.LBB\d+_\d+)", load, r"_load_lds_dwordx4", "v_exp_f32")
    resident = _resident(target, kernel, field("vgpr_count"))
    shared = field("group_segment_fixed_size")
    wide, products = len(re.findall(load, code)), code.count("v_mfma")
    return Usage(name, field("vgpr_count"), spilled, shared, resident, wide, products, 0, loop)


def _loop(code: str, label: str, branch: str, load: str, copy: str, exponential: str) -> Loop | None:
    lines = code.splitlines()
    labels: dict[str, int] = {}
    for end, line in enumerate(lines):
        if found := re.search(label, line):
            labels[found[1]] = end
        back = re.search(branch, line)
        if back is None or back[1] not in labels:
            continue
        body = lines[labels[back[1]] : end]
        copies = [i for i, text in enumerate(body) if re.search(copy, text)]
        loads = [i for i, text in enumerate(body) if re.search(load, text)]
        exponentials = [i for i, text in enumerate(body) if exponential in text]
        if exponentials and (copies or loads):
            last = max(copies + loads)
            return Loop(len(copies), len(loads), len(exponentials), sum(i < last for i in exponentials))
    return None

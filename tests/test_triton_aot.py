"""Triton kernels compile for GPUs that are not here: sm_80, sm_90, sm_100 and gfx942, without spills."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="triton is not installed")

HERE = Path(__file__).parent
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
# On one target every variant; on the others one kernel of each kind, and the linear tilings, which are cut for what the
# target has of shared and tensor memory. The kernels over tokens have one tile for all targets: those with most in it,
# on AMD, whose compiler is another one, all. The tuner, which is opt-in, drops what fails.
OVER_ROWS = ("forward-bf16", "forward-fp32-softcap", "merge-fp32", "backward-bf16", "backward-fp32-softcap")
OVER_TOKENS = (
    "extremes-mask", "sums-mask", "apply-mask", "value-keys", "random-keys", "key-histogram", "weight-histogram",
    "index-histogram", "find-digit", "mask",
)  # fmt: skip
HEAVIEST_OVER_TOKENS = ("random-keys", "index-histogram")
LINEAR = (
    "linear-bf16", "linear-bf16-entropy", "linear-bf16-softcap", "linear-bf16-addresses-softcap",
    "linear-fp16-few-softcap", "linear-fp32-softcap",
)  # fmt: skip
# Where no hardware copies blocks, all of 128 rows have one tiling, which takes the most registers with a softcap.
SAME = ("linear-bf16", "linear-bf16-entropy", "linear-bf16-addresses-softcap")
CANDIDATES = ("forward-bf16-candidate-2", "backward-bf16-candidate-2", "linear-bf16-candidate-1")
KILOBYTE = 1024
# Where a compiler older than the pinned one takes more registers: bytes spilled; KB in flight where 40 are wanted
RELEASE = ".".join(triton.__version__.split(".")[:2])
SPILLED = {("3.6", "sm_80"): {"linear-fp32-softcap": 8}}
IN_FLIGHT = {("3.6", "gfx942"): 32}


def aot(*arguments: str) -> list[dict]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), environment.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(HERE / "aot_triton.py"), *arguments], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def some(target: str) -> list[str]:
    over_tokens = OVER_TOKENS if target in ("sm_90", "gfx942") else HEAVIEST_OVER_TOKENS
    same = () if target in ("sm_90", "sm_100") else SAME
    return [name for name in OVER_ROWS + over_tokens + LINEAR if name not in same]


@functools.cache
def told(target: str) -> list[dict]:
    return aot(target, *(() if target == "sm_90" else some(target)))


def compiled(target: str) -> dict[str, dict]:
    return {usage["name"]: usage for usage in told(target) if "name" in usage}


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_compiles_without_spills(target: str) -> None:
    kernels = compiled(target)
    assert set(kernels) >= {*some(target), *(CANDIDATES if target == "sm_90" else ())}
    print("\n".join(str(usage) for usage in kernels.values()))
    spilled = {name: usage["spilled"] for name, usage in kernels.items() if usage["spilled"]}
    assert spilled == SPILLED.get((RELEASE, target), {})


@pytest.mark.slow
def test_loads_are_sixteen_bytes_wide_where_rows_are_aligned() -> None:
    kernels = compiled("sm_90")
    for name, usage in kernels.items():
        if not name.startswith(("forward", "backward")):
            continue
        assert (usage["wide"] > 0) == ("unaligned" not in name), name


@pytest.mark.slow
def test_registers_leave_room_for_the_warps_that_are_counted_on() -> None:
    """The number of parts of a row assumes RESIDENT_WARPS warps per multiprocessor."""
    from entropy_kernels.backends.triton.tiling import RESIDENT_WARPS

    for name, usage in compiled("sm_90").items():
        if name.startswith("forward") and "candidate" not in name:
            itemsize = {"b": 2, "fp16": 2, "fp32": 4, "fp64": 8}["b" if "bf16" in name else name.split("-")[1]]
            assert usage["registers"] * 32 * RESIDENT_WARPS[itemsize] <= 65_536, name


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_the_next_loads_are_issued_before_the_current_tile_is_used(target: str) -> None:
    """Of the defaults, in the machine code: the compiler is free to move loads down to where they are needed."""
    kernels = compiled(target)
    for name in ("forward-bf16", "backward-bf16"):
        loop = kernels[name]["loop"]
        copies = loop["copies"] > 0  # for a tile behind the next one
        assert copies or loop["before_last_load"] <= loop["exponentials"] // 4, name
    assert (kernels["forward-bf16"]["loop"]["copies"] > 0) == target.startswith("sm")


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_enough_bytes_are_in_flight(target: str) -> None:
    """40 KB per multiprocessor forward; the backward reads half of what it moves (docs/gpu.md)."""
    from entropy_kernels.backends.triton import tiling

    warp_size = 32 if target.startswith("sm") else 64
    on = tiling.Hardware(132, warp_size, target.startswith("sm"))
    for dtype, itemsize in (("bf16", 2), ("fp32-softcap", 4)):
        cut = tiling.forward_candidates(itemsize, 151_936, 8192, True, on)[0]
        ahead = max(1, cut.stages - 1) * cut.tile * itemsize
        resident = compiled(target)[f"forward-{dtype}"]["resident"]
        print(target, dtype, "forward:", resident * ahead // KILOBYTE, "KB in flight")
        assert resident * ahead >= IN_FLIGHT.get((RELEASE, target), 40) * KILOBYTE
        back = tiling.backward_candidates(itemsize, 151_936, True, on)[0]
        resident = compiled(target)[f"backward-{dtype}"]["resident"]
        print(target, dtype, "backward:", resident * back.tile * itemsize // KILOBYTE, "KB in flight")
        assert resident * back.tile * itemsize >= 20 * KILOBYTE


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_products_are_for_tensor_cores(target: str) -> None:
    """Fed from sm_90 on by copies of whole blocks; fp32 is summed as it is, on none of them."""
    kernels = compiled(target)
    described = target in ("sm_90", "sm_100")
    for name in LINEAR:
        if name not in kernels:
            continue
        assert (kernels[name]["products"] > 0) == ("fp32" not in name) or target == "gfx942", name
        assert (kernels[name]["blocks"] > 0) == (described and "fp32" not in name and "addresses" not in name), name
        print(target, kernels[name])
    assert kernels["linear-bf16-softcap"]["products"] > 0
    if described:  # where all defaults are cut for a number of resident programs
        for name in ("linear-bf16", "linear-bf16-entropy"):
            assert kernels[name]["resident"] >= (2 if target == "sm_90" else 1), name


@pytest.mark.slow
def test_no_runtime_value_is_a_constant() -> None:
    """A kernel is compiled per dtype, flag and tiling, and per alignment of strides: not per shape or setting."""
    kernels = [kernel for kernel in told("sm_90") if "kernel" in kernel]
    assert len(kernels) > 4
    for kernel in kernels:
        constants = set(kernel["constants"])
        assert constants <= {
            "WANT", "SOFTCAP", "PARTS", "STEPS", "STAGES", "WARPS", "LANES", "WIDTH", "BLOCK", "TILE", "BINS",
            "SECOND", "BIAS", "DESCRIPTORS", "LOGITS", "ROWS", "COLUMNS", "FEATURES",
        }, kernel["kernel"]  # fmt: skip
        specialised = {name for name in kernel["specialised"] if not name.endswith("_ptr")}
        assert specialised <= {
            "stride_b", "stride_l", "stride_v", "out_b", "out_l", "out_v", "columns", "width",
            "features", "hidden_stride", "hidden_stride_k", "weight_stride", "weight_stride_k",
        }, kernel["kernel"]  # fmt: skip

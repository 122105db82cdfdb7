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
# On one target every variant; on the others one kernel of each kind (compiling all of them takes a minute).
OVER_ROWS = ("forward-bf16", "forward-fp32-softcap", "merge-fp32", "backward-bf16", "backward-fp32-softcap")
OVER_TOKENS = (
    "extremes-mask", "sums-mask", "apply-mask", "value-keys", "random-keys", "key-histogram", "index-histogram",
    "find-digit", "mask", "clipped", "term-dropped", "term-penalised-k3", "totals",
)  # fmt: skip
SOME = OVER_ROWS + OVER_TOKENS


def aot(*arguments: str) -> list[dict]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), environment.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(HERE / "aot_triton.py"), *arguments], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@functools.cache
def compiled(target: str) -> dict[str, dict]:
    names = () if target == "sm_90" else SOME
    return {usage["name"]: usage for usage in aot(target, *names)}


@pytest.mark.slow
@pytest.mark.parametrize("target", ("sm_80", "sm_90", "sm_100", "gfx942"))
def test_compiles_without_spills(target: str) -> None:
    kernels = compiled(target)
    assert set(kernels) >= set(SOME)
    print("\n".join(str(usage) for usage in kernels.values()))
    assert {name: usage["spilled"] for name, usage in kernels.items() if usage["spilled"]} == {}


@pytest.mark.slow
def test_loads_are_sixteen_bytes_wide_where_rows_are_aligned() -> None:
    kernels = compiled("sm_90")
    for name, usage in kernels.items():
        if not name.startswith(("forward", "backward")):
            continue
        assert (usage["wide"] > 0) == ("unaligned" not in name), name


@pytest.mark.slow
def test_registers_leave_room_for_the_warps_that_are_counted_on() -> None:
    """split_count and the bytes in flight assume RESIDENT_WARPS warps per multiprocessor."""
    from entropy_kernels.backends.triton.tiling import RESIDENT_WARPS

    for name, usage in compiled("sm_90").items():
        if name.startswith("forward"):
            itemsize = {"b": 2, "fp16": 2, "fp32": 4, "fp64": 8}["b" if "bf16" in name else name.split("-")[1]]
            assert usage["registers"] * 32 * RESIDENT_WARPS[itemsize] <= 65_536, name


def test_no_runtime_value_is_a_constant() -> None:
    """A kernel is compiled per dtype, flag and tiling, and per alignment of strides: not per shape or setting."""
    for kernel in aot("parameters"):
        constants = set(kernel["constants"])
        assert constants <= {
            "WANT", "SOFTCAP", "PARTS", "STEPS", "WARPS", "LANES", "WIDTH", "BLOCK", "LOGPROB", "ENTROPY", "COLLISION",
            "TILE", "BINS", "SELECTED_AS", "EXCLUDE_CLIPPED", "PENALTY", "SQUARE_SLOPE",
        }, kernel["kernel"]  # fmt: skip
        specialised = {name for name in kernel["specialised"] if not name.endswith("_ptr")}
        assert specialised <= {
            "stride_b", "stride_l", "stride_v", "out_b", "out_l", "out_v", "columns", "width",
        }, kernel["kernel"]  # fmt: skip

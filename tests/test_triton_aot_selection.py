"""The selection kernels compile for GPUs that are not here, without spilling where that can be read off."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}

# kernel -> signature without and with the optional tensors (None is compiled out)
VALUES, INTS, MASK = "*fp32", "*i64", "*i8"
BLOCK, BINS = {"BLOCK": 1024}, {"BLOCK": 4096, "BINS": 2048}
KERNELS: dict[str, tuple[dict[str, str | None], dict[str, int]]] = {
    "covariance_extremes_kernel": (
        {"logprob_ptr": VALUES, "advantages_ptr": VALUES, "mask_ptr": MASK, "partial_ptr": "*fp64", "tokens": "i32"},
        BLOCK,
    ),
    "covariance_sums_kernel": (
        {
            "logprob_ptr": VALUES,
            "advantages_ptr": VALUES,
            "mask_ptr": MASK,
            "scales_ptr": "*fp64",
            "partial_ptr": INTS,
            "tokens": "i32",
        },
        BLOCK,
    ),
    "covariance_apply_kernel": (
        {
            "logprob_ptr": VALUES,
            "advantages_ptr": VALUES,
            "mask_ptr": MASK,
            "means_ptr": "*fp64",
            "covariance_ptr": VALUES,
            "tokens": "i32",
        },
        BLOCK,
    ),
    "value_keys_kernel": (
        {"covariance_ptr": VALUES, "mask_ptr": MASK, "exclude_ptr": MASK, "keys_ptr": INTS, "tokens": "i32"},
        BLOCK,
    ),
    "random_keys_kernel": (
        {
            "value_keys_ptr": INTS,
            "band_ptr": INTS,
            "index_ptr": INTS,
            "offset_ptr": INTS,
            "seed_ptr": INTS,
            "keys_ptr": INTS,
            "tokens": "i32",
        },
        BLOCK,
    ),
    "key_histogram_kernel": (
        {
            "keys_ptr": INTS,
            "state_ptr": INTS,
            "histogram_ptr": INTS,
            "tokens": "i32",
            "shift": "i32",
            "bits": "i32",
            "bin_mask": "i32",
        },
        BINS,
    ),
    "index_histogram_kernel": (
        {
            "keys_ptr": INTS,
            "index_ptr": INTS,
            "offset_ptr": INTS,
            "key_state_ptr": INTS,
            "state_ptr": INTS,
            "histogram_ptr": INTS,
            "tokens": "i32",
            "shift": "i32",
            "bits": "i32",
            "bin_mask": "i32",
            "known_mask": "i64",
        },
        BINS,
    ),
    "find_digit_kernel": (
        {"histogram_ptr": INTS, "state_ptr": INTS, "next_ptr": INTS, "bits": "i32"},
        {"BINS": 2048},
    ),
    "mask_kernel": (
        {
            "keys_ptr": INTS,
            "index_ptr": INTS,
            "offset_ptr": INTS,
            "threshold_ptr": INTS,
            "last_index_ptr": INTS,
            "selected_ptr": MASK,
            "tokens": "i32",
        },
        BLOCK,
    ),
}
OPTIONAL = ("mask_ptr", "exclude_ptr", "index_ptr")


def compile_all(target: str) -> dict[str, int]:
    """Bytes of code of each kernel, on one target also without its optional tensors; needs TRITON_INTERPRET unset."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from entropy_kernels.backends.triton import selection

    sizes = {}
    for name, (signature, constants) in KERNELS.items():
        kernel = getattr(selection, name)
        assert set(kernel.arg_names) == {*signature, *constants}, name
        for optional in (True, False):
            dropped = [] if optional else [argument for argument in OPTIONAL if argument in signature]
            if not optional and not (dropped and target == "sm_90"):
                continue
            constexprs: dict[str, int | None] = {**constants, **dict.fromkeys(dropped)}
            types = {a: "constexpr" if a in constexprs else signature[a] for a in kernel.arg_names}
            source = ASTSource(fn=kernel, signature=types, constexprs=constexprs)
            compiled = triton.compile(source, target=GPUTarget(*TARGETS[target]))
            binary = compiled.asm["cubin" if target.startswith("sm_") else "hsaco"]
            sizes[name + ("" if optional else " without masks")] = len(binary)
    return sizes


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_compiles(target: str, tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)  # an old binary would hide an error
    root = Path(__file__).parent.parent
    environment["PYTHONPATH"] = os.pathsep.join([str(root), str(root / "tests")])
    code = f"import json, test_triton_aot_selection as t; print(json.dumps(t.compile_all({target!r})))"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    sizes = json.loads(done.stdout.splitlines()[-1])
    assert len(sizes) == (16 if target == "sm_90" else 9) and all(size > 500 for size in sizes.values())

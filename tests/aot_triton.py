"""Compile Triton kernels ahead of time, without a GPU, and print what they use: run by test_triton_aot*.py.

    python tests/aot_triton.py sm_90 [NAME ...]     # one JSON object per kernel; NAME or "candidates": all of the tuner

Without a NAME first which arguments of each are constants.

A process of its own, because TRITON_INTERPRET, which the other tests need, is read when a kernel is decorated.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from typing import Any

if os.environ.get("TRITON_INTERPRET", "0") == "1":
    raise RuntimeError("TRITON_INTERPRET: expected unset or 0 for compiling, got 1")

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from aot_machine_code import usage
from entropy_kernels.backends.triton import linear_token_stats, selection, tiling, token_stats_kernels, tuning

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4, "fp64": 8}
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_INT64 = ("ignore_index", "vocab_start", "vocab_size")


def hardware(target: GPUTarget) -> tiling.Hardware:
    if target.backend != "cuda":
        return tiling.Hardware(132, target.warp_size, False, descriptors=False, shared=64 << 10)
    hopper = target.arch >= 90
    shared = (227 if hopper else 163) << 10
    return tiling.Hardware(132, target.warp_size, True, hopper, shared, tensor_memory=target.arch == 100)


def _source(
    kernel: Any, dtype: str, constants: dict[str, Any], aligned: set[str], types: dict[str, str] | None = None
) -> ASTSource:
    """The kernel as the launcher would specialise it: ``aligned`` arguments are divisible by 16.

    ``types``: of arguments whose names do not tell.
    """
    accumulate = "fp64" if dtype == "fp64" else "fp32"
    signature = {}
    for name in kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif types and name in types:
            signature[name] = types[name]
        elif name == "target_ptr":
            signature[name] = "*i64"
        elif name in ("logits_ptr", "dlogits_ptr"):
            signature[name] = f"*{dtype}"
        elif name.endswith("_ptr"):
            signature[name] = f"*{accumulate}"
        elif name == "softcap":
            signature[name] = "fp64"
        else:
            signature[name] = "i64" if name in _INT64 else "i32"
    index = kernel.arg_names.index
    attributes = {(index(name),): [["tt.divisibility", 16]] for name in aligned & set(signature) - set(constants)}
    return ASTSource(kernel, signature, {(index(name),): value for name, value in constants.items()}, attributes)


def forward(
    target: GPUTarget, dtype: str, *, want: int = 15, softcap: bool = False, parts: bool = False, aligned: bool = True,
    columns: int = 151_936, candidate: int = 0,
) -> Any:  # fmt: skip
    """None if the target has not that many candidates."""
    cuts = tiling.forward_candidates(_BYTES[dtype], columns, tuning.MAX_ROWS, aligned, hardware(target))
    if candidate >= len(cuts):
        return None
    cut = cuts[candidate]
    constants = {"WANT": want, "SOFTCAP": softcap, "PARTS": parts, "STEPS": cut.steps, "WARPS": cut.warps}
    constants |= {"LANES": cut.lanes, "WIDTH": cut.width, "STAGES": cut.stages, "stride_v": 1}
    divisible = {"logits_ptr", "stats_ptr", "state_ptr"}
    if aligned:
        divisible |= {"stride_b", "stride_l", "columns"}
    source = _source(token_stats_kernels.forward_kernel, dtype, constants, divisible)
    return triton.compile(source, target=target, options={"num_warps": cut.warps, **token_stats_kernels.COMPILE})


def merge(target: GPUTarget, dtype: str, *, want: int = 15) -> Any:
    constants = {"WANT": want, "BLOCK": tiling.MAX_SPLITS}
    source = _source(token_stats_kernels.merge_kernel, dtype, constants, {"parts_ptr", "state_ptr"})
    return triton.compile(source, target=target, options={"num_warps": 1, **token_stats_kernels.COMPILE})


def backward(
    target: GPUTarget, dtype: str, *, want: int = 7, softcap: bool = False, aligned: bool = True,
    columns: int = 151_936, candidate: int = 0,
) -> Any:  # fmt: skip
    """None if the target has not that many candidates."""
    cuts = tiling.backward_candidates(_BYTES[dtype], columns, aligned, hardware(target))
    cuts = tuple({(cut.tile, cut.warps, cut.stages): cut for cut in cuts}.values())  # that are kernels of their own
    if candidate >= len(cuts):
        return None
    cut = cuts[candidate]
    constants = {"WANT": want, "SOFTCAP": softcap, "TILE": cut.tile, "STAGES": cut.stages, "stride_v": 1, "out_v": 1}
    divisible = {"logits_ptr", "dlogits_ptr"}
    if aligned:
        divisible |= {"stride_b", "stride_l", "out_b", "out_l", "width", "columns"}
    source = _source(token_stats_kernels.backward_kernel, dtype, constants, divisible)
    return triton.compile(source, target=target, options={"num_warps": cut.warps, **token_stats_kernels.COMPILE})


def linear(
    target: GPUTarget, dtype: str, *, second: bool = True, softcap: bool = False, bias: bool = True,
    described: bool = True, rows: int = tuning.MAX_ROWS, candidate: int = 0,
) -> Any:  # fmt: skip
    """None if the target has not that many candidates; by addresses where it has no descriptors."""
    on = hardware(target)
    described = described and on.descriptors and _BYTES[dtype] == 2
    cuts = tiling.linear_candidates(_BYTES[dtype], rows, described, softcap, on)
    if candidate >= len(cuts):
        return None
    cut = cuts[candidate]
    constants = {"SECOND": second, "SOFTCAP": softcap, "BIAS": bias, "DESCRIPTORS": described, "ROWS": cut.rows}
    constants |= {"COLUMNS": cut.columns, "FEATURES": cut.features, "STAGES": cut.stages}
    constants |= {"LOGITS": linear_token_stats.DTYPES[_DTYPES[dtype]], "hidden_stride_k": 1, "weight_stride_k": 1}
    types = {"bias_ptr": f"*{dtype}", "hidden_ptr": f"*{dtype}", "weight_ptr": f"*{dtype}"}
    divisible = {"features", "hidden_stride", "weight_stride"}
    if described:
        types["hidden_ptr"] = f"tensordesc<{dtype}[{cut.rows}, {cut.features}]>"
        types["weight_ptr"] = f"tensordesc<{dtype}[{cut.columns}, {cut.features}]>"
    else:
        divisible |= {"hidden_ptr", "weight_ptr"}
    source = _source(linear_token_stats.linear_forward_kernel, dtype, constants, divisible, types)
    return triton.compile(source, target=target, options={"num_warps": cut.warps, **token_stats_kernels.COMPILE})


# Types of the arguments of the kernels over tokens, by name; of an optional tensor that is not there, None.
_TOKEN_TYPES = {
    **dict.fromkeys(("logprob", "advantages", "covariance"), "*fp32"),
    **dict.fromkeys(("mask", "exclude", "selected"), "*i8"),
    **dict.fromkeys(("scales", "means", "partial", "scale"), "*fp64"),
    **dict.fromkeys(("keys", "value_keys", "band", "index", "offset", "seed", "histogram", "key_state"), "*i64"),
    **dict.fromkeys(("state", "next", "threshold", "last_index"), "*i64"),
    **dict.fromkeys(("tokens", "shift", "bits", "bin_mask"), "i32"),
    "known_mask": "i64",
}  # fmt: skip

TOKEN_KERNELS = [value for name, value in vars(selection).items() if name.endswith("_kernel")]


def over_tokens(target: GPUTarget, kernel: Any, warps: int = 4, without: tuple[str, ...] = (), **constants: Any) -> Any:
    """A kernel of selection.py, ``without`` some of its optional tensors."""
    constants |= dict.fromkeys(without)
    signature, attributes = {}, {}
    for i, name in enumerate(kernel.arg_names):
        signature[name] = "constexpr" if name in constants else _TOKEN_TYPES[name.removesuffix("_ptr")]
        if signature[name].startswith("*"):
            attributes[(i,)] = [["tt.divisibility", 16]]
    if kernel is selection.covariance_sums_kernel:
        signature["partial_ptr"] = "*i64"
    by_index = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    return triton.compile(
        ASTSource(kernel, signature, by_index, attributes),
        target=target,
        options={"num_warps": warps, **selection.COMPILE},
    )


# Each flag and each dtype with the rest as in the main use: the product of all would be hundreds of kernels. Of two
# that differ in a softcap alone, which takes registers, the one with it.
VARIANTS: dict[str, tuple[Any, dict[str, Any]]] = {
    "forward-bf16": (forward, {"dtype": "bf16"}),
    "forward-fp64": (forward, {"dtype": "fp64"}),
    "forward-fp32-softcap": (forward, {"dtype": "fp32", "softcap": True}),
    "forward-fp16-parts": (forward, {"dtype": "fp16", "parts": True}),
    "forward-bf16-unaligned": (forward, {"dtype": "bf16", "aligned": False}),
    "forward-fp32-short-entropy": (forward, {"dtype": "fp32", "columns": 110, "want": 3}),
    "merge-fp32": (merge, {"dtype": "fp32"}),
    "backward-bf16": (backward, {"dtype": "bf16"}),
    "backward-fp16-logprob-entropy": (backward, {"dtype": "fp16", "want": 3}),
    "backward-fp32-softcap": (backward, {"dtype": "fp32", "softcap": True}),
    "backward-fp64": (backward, {"dtype": "fp64"}),
    "backward-bf16-unaligned": (backward, {"dtype": "bf16", "aligned": False}),
    "backward-fp32-short-logprob": (backward, {"dtype": "fp32", "columns": 110, "want": 1}),
    "linear-bf16": (linear, {"dtype": "bf16"}),
    "linear-bf16-entropy": (linear, {"dtype": "bf16", "second": False, "bias": False}),
    "linear-bf16-softcap": (linear, {"dtype": "bf16", "softcap": True}),
    "linear-bf16-addresses-softcap": (linear, {"dtype": "bf16", "described": False, "softcap": True}),
    "linear-fp16-few-softcap": (linear, {"dtype": "fp16", "rows": 64, "softcap": True}),
    "linear-fp32-softcap": (linear, {"dtype": "fp32", "softcap": True}),
}
# The other candidates of the tuner: all of aligned bf16, of the other sources the first, since the tuner, which is
# opt-in, drops what fails; those of few rows differ in the number of parts only.
CANDIDATES = {
    f"{build.__name__}-{name}-candidate-{i}": (build, {**arguments, "candidate": i})
    for build in (forward, backward)
    for name, arguments in {
        "bf16": {"dtype": "bf16"},
        "fp32-softcap": {"dtype": "fp32", "softcap": True},
        "bf16-unaligned": {"dtype": "bf16", "aligned": False},
    }.items()
    for i in range(1, 6 if name == "bf16" else 2)
}
CANDIDATES |= {f"linear-bf16-candidate-{i}": (linear, {"dtype": "bf16", "candidate": i}) for i in range(1, 6)}
# What the tuner tries and a default is not: those with the most in registers, of each kernel one.
_HEAVIEST = ("forward-bf16-candidate-2", "backward-bf16-candidate-2", "linear-bf16-candidate-1")
VARIANTS |= {name: CANDIDATES[name] for name in _HEAVIEST}

_BLOCK = {"BLOCK": selection.BLOCK}
_BINS = {"BLOCK": selection.HISTOGRAM_BLOCK, "BINS": selection.RADIX_BINS, "warps": selection.HISTOGRAM_WARPS}
VARIANTS |= {
    name: (over_tokens, arguments)
    for name, arguments in {
        **{
            f"{name}-{with_mask}": {"kernel": kernel, **_BLOCK, "without": without}
            for name, kernel in {
                "extremes": selection.covariance_extremes_kernel,
                "sums": selection.covariance_sums_kernel,
                "apply": selection.covariance_apply_kernel,
            }.items()
            for with_mask, without in (("mask", ()), ("all", ("mask_ptr",)))
        },
        "value-keys": {"kernel": selection.value_keys_kernel, **_BLOCK},
        "value-keys-all": {"kernel": selection.value_keys_kernel, **_BLOCK, "without": ("mask_ptr", "exclude_ptr")},
        "random-keys": {"kernel": selection.random_keys_kernel, **_BLOCK},
        "random-keys-positions": {"kernel": selection.random_keys_kernel, **_BLOCK, "without": ("index_ptr",)},
        "key-histogram": {"kernel": selection.key_histogram_kernel, **_BINS},
        "weight-histogram": {"kernel": selection.weight_histogram_kernel, **_BLOCK},
        "index-histogram": {"kernel": selection.index_histogram_kernel, **_BINS},
        "index-histogram-positions": {"kernel": selection.index_histogram_kernel, **_BINS, "without": ("index_ptr",)},
        "find-digit": {"kernel": selection.find_digit_kernel, "BINS": selection.RADIX_BINS},
        "mask": {"kernel": selection.mask_kernel, **_BLOCK},
        "mask-positions": {"kernel": selection.mask_kernel, **_BLOCK, "without": ("index_ptr",)},
    }.items()
}  # fmt: skip


def _parameters() -> None:
    """Which arguments are constants, and which ones Triton may specialise on (alignment, equality to 1)."""
    over_rows = [
        token_stats_kernels.forward_kernel,
        token_stats_kernels.merge_kernel,
        token_stats_kernels.backward_kernel,
        linear_token_stats.linear_forward_kernel,
    ]
    for kernel in [*over_rows, *TOKEN_KERNELS]:
        constants = [p.name for p in kernel.params if p.is_constexpr]
        specialised = [p.name for p in kernel.params if not (p.is_constexpr or p.do_not_specialize)]
        print(json.dumps({"kernel": kernel.fn.__name__, "constants": constants, "specialised": specialised}))


def _all_kernels_are_compiled() -> None:
    compiled = {arguments["kernel"].fn.__name__ for build, arguments in VARIANTS.values() if build is over_tokens}
    missing = {kernel.fn.__name__ for kernel in TOKEN_KERNELS} - compiled
    if missing:
        raise RuntimeError(f"VARIANTS: expected all kernels, without {missing}")


def main(target_name: str, *names: str) -> None:
    _all_kernels_are_compiled()
    if not names:
        _parameters()
    target = TARGETS[target_name]
    for name in CANDIDATES if names == ("candidates",) else names or VARIANTS:
        build, arguments = (VARIANTS | CANDIDATES)[name]
        kernel = build(target, **arguments)
        if kernel is not None:
            loop = name in ("forward-bf16", "backward-bf16")  # of the others only the resources are asked for
            print(json.dumps(asdict(usage(name, target_name, kernel, loop))), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Triton's interpreter, made fit for a test suite: it rounds to bf16 as hardware does, and is ten times faster."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter


def _to_bfloat16(values: np.ndarray) -> np.ndarray:
    """fp32 → bf16 in uint16, to nearest even."""
    rounded = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32)).to(torch.bfloat16)
    return rounded.view(torch.int16).numpy().view(np.uint16).reshape(values.shape)


def repair() -> None:
    """Patch two private functions of triton.runtime.interpreter (3.4 to 3.9)."""
    convert = interpreter._convert_float

    def convert_float(values: np.ndarray, source: Any, target: Any, rounding: Any) -> np.ndarray:
        # The interpreter truncates; a store on any GPU rounds to nearest even.
        if source == tl.float32 and target == tl.bfloat16:
            return _to_bfloat16(values)
        return convert(values, source, target, rounding)

    patch_language = interpreter._patch_lang
    run_grid = interpreter.GridExecutor.__call__
    seen: dict[Any, frozenset[str]] = {}  # function -> modules of the language that it sees
    scopes: list[Any] = []  # of the launch that is running
    patched: set[str] = set()

    class Nothing:
        def restore(self) -> None:
            return None

    def patch_once(function: Any) -> Any:
        # Each call of a device function patches all of triton.language again, which is 80 % of the time.
        if function not in seen:
            names = {id(tl): "tl", id(tl.core): "core"}
            seen[function] = frozenset(names[id(v)] for v in function.__globals__.values() if id(v) in names)
        if not seen[function] <= patched:
            scopes.append(patch_language(function))
            patched.update(seen[function])
        return Nothing()

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return run_grid(self, *args, **kwargs)
        finally:
            while scopes:
                scopes.pop().restore()
            patched.clear()

    interpreter._convert_float = convert_float
    interpreter._patch_lang = patch_once
    interpreter.GridExecutor.__call__ = run

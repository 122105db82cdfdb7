"""Triton's interpreter made ten times faster, so that a test suite can afford it, and 3.6's to work with numpy 2.4."""

from __future__ import annotations

from typing import Any

import triton.language as tl
from triton.runtime import interpreter


def speed_up() -> None:
    """Patch private functions of triton.runtime.interpreter (3.4 to 3.9); what is computed stays the same."""
    patch_language, patch_tensor = interpreter._patch_lang, interpreter._patch_lang_tensor
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

    def patch_index(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        # 3.6 makes an int of an array of one element, which numpy refuses from 2.4 on
        tensor.__index__ = lambda self: int(self.handle.data.item())

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return run_grid(self, *args, **kwargs)
        finally:
            while scopes:
                scopes.pop().restore()
            patched.clear()

    interpreter._patch_lang, interpreter._patch_lang_tensor = patch_once, patch_index
    interpreter.GridExecutor.__call__ = run

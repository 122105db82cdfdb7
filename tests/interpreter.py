"""Triton's interpreter made ten times faster, so that a test suite can afford it."""

from __future__ import annotations

from typing import Any

import triton.language as tl
from triton.runtime import interpreter


def speed_up() -> None:
    """Patch two private functions of triton.runtime.interpreter (3.4 to 3.9); what is computed stays the same."""
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

    interpreter._patch_lang = patch_once
    interpreter.GridExecutor.__call__ = run

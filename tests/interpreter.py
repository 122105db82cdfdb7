"""Triton's interpreter made twenty times faster, so that tests can afford it, and 3.6's to work with numpy 2.4."""

from __future__ import annotations

from typing import Any

import triton.language as tl
from triton.language import core, semantic
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
    _remember_types()


def _remember_types() -> None:
    """What Triton makes anew for each tensor of an operation, though it depends on nothing but shape and type.

    It was half of the time of what is left.
    """
    np_dtype, init_type, init_tensor = interpreter._get_np_dtype, core.block_type.__init__, core.tensor.__init__
    broadcast = semantic.TritonSemantic.broadcast_impl_value
    np_dtypes: dict[str, Any] = {}
    types: dict[tuple[str, tuple[int, ...]], dict[str, Any]] = {}
    shapes: dict[tuple[int, ...], Any] = {}

    def get_np_dtype(dtype: Any) -> Any:
        if dtype.name not in np_dtypes:
            np_dtypes[dtype.name] = np_dtype(dtype)
        return np_dtypes[dtype.name]

    def new_type(self: Any, element: Any, shape: Any) -> None:
        key = element.name, tuple(getattr(size, "value", size) for size in shape)
        if key not in types:
            init_type(self, element, shape)
            types[key] = vars(self).copy()
        vars(self).update(types[key])

    def new_tensor(self: Any, handle: Any, type: Any) -> None:
        shape = tuple(type.shape) if type.is_block() else ()
        if shape not in shapes:
            init_tensor(self, handle, type)
            shapes[shape] = self.shape, self.numel
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = shapes[shape]

    def broadcast_both(self: Any, lhs: Any, rhs: Any) -> Any:
        blocks = lhs.type.is_block(), rhs.type.is_block()
        alike = lhs.type.shape.values == rhs.type.shape.values if all(blocks) else not any(blocks)
        return (lhs, rhs) if alike else broadcast(self, lhs, rhs)

    interpreter._get_np_dtype, core.block_type.__init__, core.tensor.__init__ = get_np_dtype, new_type, new_tensor
    semantic.TritonSemantic.broadcast_impl_value = broadcast_both

"""What our integrations rely on of verl and TRL, as stubs of the same names and signatures.

One table: the targets of all patches, which carry their signatures, and :data:`RELIED_ON`. The main suite applies the
patches to stubs that are made of it, so that it needs neither package; ``tests/integrations/test_contract.py`` holds
the table against the packages as they are installed.
"""

from __future__ import annotations

import ast
import contextlib
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import entropy_kernels
from entropy_kernels.integrations._patch import patches

#: What ours call of theirs or is called with, beside what it replaces: signatures as Patch compares them; None: only
#: that it is there.
RELIED_ON: dict[str, str | None] = {
    "verl.utils.tensordict_utils:get_non_tensor_data": "(data, key, default)",
    "verl.utils.tensordict_utils:assign_non_tensor": "(tensor_dict, **kwargs)",
    "verl.workers.engine.fsdp.transformer_impl:FSDPEngine._gather_and_unpad_packed": "(self, tensor, pad_size)",
}


def table() -> dict[str, str | None]:
    """ "module:name" or "module:Class.name" -> signature, of all that is relied on."""
    replaced = {one.signature_of or one.target: one.signature for one in patches()}
    return {**{one.target: None for one in patches()}, **replaced, **RELIED_ON}


def imported() -> set[str]:
    """ "module:name" of every import from verl or TRL in the integrations."""
    folder = Path(entropy_kernels.__file__).parent / "integrations"
    nodes = [node for file in folder.rglob("*.py") for node in ast.walk(ast.parse(file.read_text()))]
    found = [node for node in nodes if isinstance(node, ast.ImportFrom) and node.module and node.level == 0]
    theirs = [node for node in found if node.module.partition(".")[0] in ("verl", "trl")]
    return {f"{node.module}:{name.name}" for node in theirs for name in node.names}


def _function(name: str, signature: str | None) -> Any:
    """Raises that theirs ran."""
    scope: dict[str, Any] = {}
    exec(f"def {name}{signature or '(*args, **kwargs)'}:\n    raise AssertionError('theirs ran: {name}')", scope)
    return scope[name]


@contextlib.contextmanager
def stubs(**behaviour: Any) -> Iterator[None]:
    """Stand-ins for verl and TRL in ``sys.modules``; ``behaviour``: functions by name, where ours needs theirs."""
    made: dict[str, types.ModuleType] = {}
    for target, signature in table().items():
        path, _, attributes = target.partition(":")
        parts = path.split(".")
        for i in range(1, len(parts) + 1):
            name = ".".join(parts[:i])
            made.setdefault(name, types.ModuleType(name))
            if i > 1:
                setattr(made[".".join(parts[: i - 1])], parts[i - 1], made[name])
        holder: Any = made[path]
        *classes, name = attributes.split(".")
        for each in classes:
            holder.__dict__.get(each) or setattr(holder, each, type(each, (), {}))
            holder = getattr(holder, each)
        function = behaviour.get(name) or _function(name, signature)
        setattr(holder, name, staticmethod(function) if (signature or "").startswith("(ctx") else function)
    before = {name: module for name, module in sys.modules.items() if name.partition(".")[0] in ("verl", "trl")}
    for name in before:
        del sys.modules[name]
    sys.modules.update(made)
    try:
        yield
    finally:
        for name in made:
            del sys.modules[name]
        sys.modules.update(before)

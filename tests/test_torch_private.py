"""The torch that torch does not document: used in one file, and there in every version that we know."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import torch

import entropy_kernels as ek

PACKAGE = Path(ek.__file__).parent
# Name, below torch -> the first and the last version of those that the package was run with that has it.
KNOWN = {
    "_C._AutoDispatchBelowAutograd": ("2.10", "2.13"),
    "_C.ScriptMethod": ("2.10", "2.13"),
    "_C._TorchDispatchModeKey.FAKE": ("2.10", "2.13"),
    "_C._get_dispatch_mode": ("2.10", "2.13"),
    "_C._get_schema": ("2.10", "2.13"),
    "_C._dispatch_has_kernel_for_dispatch_key": ("2.10", "2.13"),
    "_C._functorch.maybe_current_level": ("2.10", "2.13"),
    "_C._functorch.is_batchedtensor": ("2.10", "2.13"),
    "_C._functorch.is_gradtrackingtensor": ("2.10", "2.13"),
    "_disable_dynamo": ("2.10", "2.13"),
    "_assert_async": ("2.10", "2.13"),
    "autograd.forward_ad._current_level": ("2.10", "2.13"),
    "nn.modules.dropout._DropoutNd": ("2.10", "2.13"),
    "distributed.distributed_c10d._resolve_process_group": ("2.10", "2.13"),
    "distributed.distributed_c10d._get_pg_default_device": ("2.10", "2.13"),
}
SOMETIMES = {"_C._cuda_getDriverVersion"}  # builds with CUDA alone have it


def version(text: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", text)[:2]))


@pytest.mark.parametrize("name", KNOWN)
def test_this_torch_has_it(name: str) -> None:
    value: object = torch
    for part in name.split("."):
        assert hasattr(value, part), f"torch.{name} is not in torch {torch.__version__}; {name} was in {KNOWN[name]}"
        value = getattr(value, part)
    first, _ = KNOWN[name]
    assert version(torch.__version__) >= version(first)


def private(path: Path) -> set[str]:
    """Names of torch with an underscore in front that a file uses, from torch on."""
    tree = ast.parse(path.read_text())
    known = {"torch": "", "dist": "distributed.", "forward_ad": "autograd.forward_ad.", "functorch": "_C._functorch."}
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            parts, value = [node.attr], node.value
            while isinstance(value, ast.Attribute):
                parts, value = [value.attr, *parts], value.value
            dunder = any(part.startswith("__") for part in parts)
            if isinstance(value, ast.Name) and value.id in known and not dunder:
                name = known[value.id] + ".".join(parts)
                if any(part.startswith("_") for part in name.split(".")):
                    found.add(name)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch") and "._" in node.module:
            found.add(node.module.removeprefix("torch."))
    return found


def test_they_are_used_in_one_file() -> None:
    elsewhere = {path.name: private(path) for path in PACKAGE.rglob("*.py") if path.name != "_torch.py"}
    assert {name: found for name, found in elsewhere.items() if found} == {}
    used = private(PACKAGE / "_torch.py")
    whole = {name for name in used if not any(other.startswith(f"{name}.") for other in used)}
    assert whole - {"_C"} <= set(KNOWN) | SOMETIMES

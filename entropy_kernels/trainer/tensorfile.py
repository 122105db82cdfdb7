"""Trees of tensors and plain values in one file of safetensors, with a checksum over every byte: no pickle.

A tree is what a state_dict() holds: dicts, lists, tuples, tensors, numbers, texts, None. Its tensors are the file's,
under their paths (modules/policy/lm_head.weight), where any reader of safetensors finds them; the rest is JSON in the
metadata.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any, BinaryIO

import torch

from entropy_kernels.trainer.files import make_atomic

#: Of the metadata: an object with the checksum, first, and the tree.
_KEY = "entropy_kernels"
#: The checksum in a file's header: hexadecimal digits, which count as zeros in the SHA-256 of all the file's bytes.
_SEAL = re.compile(rb'sha256[\\": ]+([0-9a-f]{64})')
_UNSEALED = "0" * 64


class Damaged(ValueError):
    """What is wrong with a file, as the end of a sentence: "a file that ..."."""


def damage(path: Path) -> str | None:
    """What is wrong with a file of safetensors, by its length; its values are not read."""
    with open(path, "rb") as file:
        size = path.stat().st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or 8 + length > size:
            return f"it ends after {size} bytes, within its header"
        try:
            header = json.loads(file.read(length))
            end = max((v["data_offsets"][1] for k, v in header.items() if k != "__metadata__"), default=0)
            expected = 8 + length + end
        except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
            return "its header cannot be read"
    return None if size == expected else f"expected {expected} bytes, got {size}"


def save_tree(path: Path, tree: dict[str, Any], *, keep_old: Path | None = None) -> None:
    """Write `tree`, atomically; what `path` held becomes `keep_old`, if that is given.

    Tensors that lie in memory in one piece are written from where they are. OSError where there is no space: `path` is
    as it was then. TypeError for a value that no tree holds.
    """
    from safetensors.torch import save_file

    tensors: dict[str, torch.Tensor] = {}
    about = json.dumps({"sha256": _UNSEALED, "tree": _packed(tree, "", tensors, {})})

    def make(name: Path) -> None:
        save_file(tensors, name, {_KEY: about})
        with open(name, "r+b") as written:
            place, digest = _checksum(written)
            written.seek(place.start(1))
            written.write(digest.encode())

    make_atomic(path, make, keep_old=keep_old)


def load_tree(path: Path) -> dict[str, Any]:
    """What :func:`save_tree` wrote, on the CPU. Its tensors may be the file's own pages: they are there to be read.

    Raises :class:`Damaged`, also for a file of another program, and OSError for one that cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    size = path.stat().st_size
    reason = damage(path)
    if size == 0:
        raise Damaged("an empty file")
    if reason is not None:
        raise Damaged(f"a file that was cut off, is damaged, or is of another program ({reason})")
    with open(path, "rb") as file:
        try:
            place, digest = _checksum(file)
        except ValueError:
            raise Damaged("a file that is damaged or of another program (it has no checksum)") from None
    if place[1].decode() != digest:
        raise Damaged("a damaged file (its checksum does not match)")
    try:
        with safe_open(path, "pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  no mapping
            tree = _unpacked(json.loads(opened.metadata()[_KEY])["tree"], tensors)
    except (SafetensorError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise Damaged("a file of another program") from error
    if not isinstance(tree, dict):
        raise Damaged("a file of another program")
    return tree


def read_tree(path: Path, expected: str, way_out: str = "") -> dict[str, Any]:
    """:func:`load_tree`; its errors are ValueError or OSError, a sentence that begins as is `expected`."""
    try:
        return load_tree(path)
    except Damaged as error:
        raise ValueError(f"{expected}{error}{way_out}") from error
    except OSError as error:
        raise OSError(f"{expected}a file that cannot be read ({error.strerror})") from error


def _checksum(file: BinaryIO) -> tuple[re.Match[bytes], str]:
    """Where a file's checksum stands, and what it should be; ValueError if there is none."""
    head = file.read(8)
    head += file.read(int.from_bytes(head, "little"))
    place = _SEAL.search(head)
    if place is None:
        raise ValueError
    found = hashlib.sha256(head[: place.start(1)] + _UNSEALED.encode() + head[place.end(1) :])
    while data := file.read(1 << 20):
        found.update(data)
    return place, found.hexdigest()


def _packed(value: Any, path: str, tensors: dict[str, torch.Tensor], seen: dict[Any, Any]) -> Any:
    """`value` as JSON has it, its tensors in `tensors`; `seen` has where those lie in memory."""
    if isinstance(value, torch.Tensor):
        return {"$tensor": _named(value.detach(), path, tensors, seen)}
    if isinstance(value, dict):
        if all(isinstance(key, str) and not key.startswith("$") for key in value):
            return {key: _packed(x, f"{path}/{key}", tensors, seen) for key, x in value.items()}
        return {"$items": [[key, _packed(x, f"{path}/{key}", tensors, seen)] for key, x in value.items()]}
    if isinstance(value, (list, tuple)):
        items = [_packed(x, f"{path}/{i}", tensors, seen) for i, x in enumerate(value)]
        return items if isinstance(value, list) else {"$tuple": items}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"{path}: expected tensors, numbers, texts, or dicts and lists of them, got {type(value).__name__}")


def _named(value: torch.Tensor, path: str, tensors: dict[str, torch.Tensor], seen: dict[Any, Any]) -> str:
    """The name of a tensor in the file; of one that is there already (tied weights), that one's."""
    storage = (value.device, value.untyped_storage().data_ptr()) if value.numel() else (path,)
    view = (value.dtype, value.shape, value.stride(), value.storage_offset())
    if storage in seen and view in seen[storage]:
        return str(seen[storage][view])
    name = path.lstrip("/")
    while name in tensors:
        name += "_"
    # the format has no views of one memory
    tensors[name] = value.clone().contiguous() if storage in seen else value.contiguous()
    seen.setdefault(storage, {})[view] = name
    return name


def _unpacked(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, list):
        return [_unpacked(x, tensors) for x in value]
    if not isinstance(value, dict):
        return value
    match next(iter(value.items()), None):
        case "$tensor", name:
            return tensors[name]
        case "$tuple", items:
            return tuple(_unpacked(x, tensors) for x in items)
        case "$items", items:
            return {key: _unpacked(x, tensors) for key, x in items}
    return {key: _unpacked(x, tensors) for key, x in value.items()}

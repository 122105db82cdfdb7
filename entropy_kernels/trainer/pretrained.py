"""Loading a model and its tokenizer from a folder or from the hub; errors say what is wrong with the folder."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from entropy_kernels.trainer.files import read_json

#: The hub's names: NAME or OWNER/NAME, of up to 96 characters each.
_OF_THE_HUB = re.compile(
    r"(?!.*(--|\.\.))[A-Za-z0-9_](?:[\w.-]{0,94}[A-Za-z0-9_])?(?:/[A-Za-z0-9_](?:[\w.-]{0,94}[A-Za-z0-9_])?)?", re.A
)
#: How the files of a tokenizer begin or end.
_TOKENIZER = ("tokenizer", "vocab", "merges", "spiece", "sentencepiece")


def local_folder(name: str) -> Path | None:
    """The folder that the name of a model means, there or not; None for a name of the hub."""
    path = Path(name).expanduser()
    # the hub's names are NAME or OWNER/NAME
    means_a_path = name.startswith((".", "/", "~")) or name.endswith("/") or name.count("/") > 1 or "\\" in name
    return path if means_a_path or path.exists() else None


def check_model(name: str, argument: str = "model") -> None:
    """Raise, with the reason, if `name` is a folder that cannot hold a model; a name of the hub passes.

    FileNotFoundError for what is missing, ValueError for what is damaged.
    """
    if not name.strip():
        raise ValueError(f"{argument}: expected tiny, smollm2, a folder or a name of the hub, got {name!r}")
    folder = local_folder(name)
    if folder is None:
        if not _OF_THE_HUB.fullmatch(name):
            raise ValueError(
                f"{argument}: expected tiny, smollm2, a folder or a name of the hub (NAME or OWNER/NAME), got {name!r}"
            )
        return
    expected = f"{argument}: expected a folder with a model of transformers, got {name}, "
    if not folder.exists():
        raise FileNotFoundError(expected + "which does not exist")
    if not folder.is_dir():
        raise NotADirectoryError(expected + "which is a file")
    if (folder / "adapter_config.json").exists():
        return  # transformers loads an adapter with its base
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(expected + "which has no config.json")
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    for path in (folder / name for name in names if name == "config.json" or name.endswith(".index.json")):
        try:
            values = read_json(path)
            shards = set(values["weight_map"].values()) if path.name != "config.json" else set()
            if not isinstance(values, dict):
                raise ValueError(f"a {type(values).__name__}, no object")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{expected}whose {path.name} cannot be read ({error})") from error
        lost = sorted(str(shard) for shard in shards - set(names))
        if lost:
            raise FileNotFoundError(f"{expected}which has no {lost[0]}, one of the files that {path.name} names")
    weights = [name for name in names if name.endswith((".safetensors", ".bin", ".pt", ".pth", ".gguf"))]
    if not any((folder / name).stat().st_size for name in weights):
        raise FileNotFoundError(expected + "which has no weights (model.safetensors)")
    for name in weights:
        if name.endswith(".safetensors") and (reason := _damage(folder / name)):
            raise ValueError(f"{expected}whose {name} is damaged: {reason}")
    if not any(name.startswith(_TOKENIZER) or name.endswith((".model", ".tiktoken")) for name in names):
        raise FileNotFoundError(expected + "which has no tokenizer (tokenizer.json)")


def load_model(name: str, argument: str = "model") -> tuple[Any, Any]:
    """Model and tokenizer of a folder or of the hub, by transformers; errors as those of :func:`check_model`."""
    import transformers

    auto: Any = transformers.AutoModelForCausalLM
    check_model(name, argument)
    folder = local_folder(name)
    source = name if folder is None else str(folder)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source)
        model, report = auto.from_pretrained(source, output_loading_info=True)
    except ImportError:
        raise
    except Exception as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        if folder is not None:
            raise ValueError(
                f"{argument}: expected a model that transformers can load, got the folder {name} ({reason})"
            ) from error
        raise OSError(
            f"{argument}: expected tiny, smollm2, a folder, or a model of the Hugging Face hub, got {name!r}: there is "
            f"no such folder here, and the hub does not give it ({reason})"
        ) from error
    missing = sorted(map(str, report["missing_keys"]))
    if missing:  # transformers draws them at random
        raise ValueError(
            f"{argument}: expected weights for the whole model, got {name}, which lacks {len(missing)} of them "
            f"({', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''})"
        )
    return model, tokenizer


def _damage(path: Path) -> str | None:
    """What is wrong with a file of safetensors, by its length; its values are not read."""
    with open(path, "rb") as file:
        size = path.stat().st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or 8 + length > size:
            return f"it ends after {size} bytes, within its header"
        try:
            header = json.loads(file.read(length))
            end = max((v["data_offsets"][1] for k, v in header.items() if k != "__metadata__"), default=0)
        except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
            return "its header cannot be read"
    return None if size == 8 + length + end else f"expected {8 + length + end} bytes, got {size}"

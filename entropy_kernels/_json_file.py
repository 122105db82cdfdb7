"""JSON files that are whole or not there, whoever else writes or reads them."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write(path: Path, document: Mapping[str, Any]) -> None:
    """Replace `path` in one step; after an OSError it holds what it held, and nothing is left beside it."""
    # processes of several nodes may write to one disk
    scratch = path.with_name(f".{path.name}.{platform.node()}.{os.getpid()}")
    try:
        scratch.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)

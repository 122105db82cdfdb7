"""Import of an optional package where it is used, with an error that names the extra to install."""

from __future__ import annotations

import importlib
from types import ModuleType


def require(module: str, purpose: str, extra: str = "analysis") -> ModuleType:
    """Import ``module``; ImportError saying what needs it and which extra installs it if it is not there.

    Only a missing *top-level package* is turned into advice: an error inside an installed package is raised as it is.
    """
    package = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != package:
            raise
        raise ImportError(
            f"{purpose} needs {package}, which is not installed: pip install 'entropy_kernels[{extra}]'", name=package
        ) from error

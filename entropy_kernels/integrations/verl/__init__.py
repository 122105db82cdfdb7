"""Drop-in for verl."""

from __future__ import annotations

from entropy_kernels.integrations._patch import Patch

PATCHES: tuple[Patch, ...] = ()

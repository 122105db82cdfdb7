"""Drop-in for verl."""

from __future__ import annotations

from entropy_kernels.integrations._patch import Patch
from entropy_kernels.integrations.verl import statistics

PATCHES: tuple[Patch, ...] = statistics.PATCHES

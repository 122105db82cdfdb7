"""Switches of the GPU kernels that are read once, from the environment, when the package is imported."""

from __future__ import annotations

import os

# Rows are cut without regard to how many there are, at the price of idle multiprocessors where they are few: the same
# row gives the same bits (docs/gpu.md, "Same row, same bits").
ROW_INVARIANT = os.environ.get("ENTROPY_KERNELS_ROW_INVARIANT", "0") == "1"
# Triton's kernels take the tilings that `entropy-kernels tune` has measured here (docs/gpu.md, "Tuning").
TRITON_TUNE = os.environ.get("ENTROPY_KERNELS_TRITON_TUNE", "0") == "1"

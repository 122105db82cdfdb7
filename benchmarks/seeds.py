"""What the experiments on the trainer share: means over seeds with intervals, means over steps, Markdown tables."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence

import numpy as np


def t_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean of a value per seed, and the ends of Student's 95 % interval: NaN for one value, all three for none."""
    from scipy.stats import t

    n = len(values)
    if n < 2:
        return values[0] if n else math.nan, math.nan, math.nan
    mean = statistics.fmean(values)
    reach = float(t.ppf(0.975, n - 1)) * float(np.std(values, ddof=1)) / math.sqrt(n)
    return mean, mean - reach, mean + reach


def holm(samples: Sequence[Sequence[float]]) -> list[bool]:
    """Which means differ from zero at 5 % for all samples together: t tests, p values after Holm."""
    from scipy.stats import t
    from statsmodels.stats.multitest import multipletests

    known = {i: np.std(sample, ddof=1) for i, sample in enumerate(samples) if len(sample) > 1}
    known = {i: spread for i, spread in known.items() if spread > 0}
    found = [False] * len(samples)
    if known:
        size = {i: abs(statistics.fmean(samples[i])) * math.sqrt(len(samples[i])) / known[i] for i in known}
        p = [2 * float(t.sf(size[i], len(samples[i]) - 1)) for i in known]
        for i, rejected in zip(known, multipletests(p, alpha=0.05, method="holm")[0], strict=True):
            found[i] = bool(rejected)
    return found


def window_means(values: Sequence[float] | np.ndarray, window: int) -> np.ndarray:
    """Of `window` neighbouring steps, full windows only."""
    return np.convolve(values, np.full(window, 1 / window), "valid")


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; its columns, of which there may be many, are not padded."""
    lines = ["| " + " | ".join(cells) + " |" for cells in (header, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(header), *lines[1:]])

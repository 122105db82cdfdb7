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

    p = {}
    for i, sample in enumerate(samples):
        if len({*sample}) > 1:
            size = abs(statistics.fmean(sample)) / (statistics.stdev(sample) / math.sqrt(len(sample)))
            p[i] = 2 * float(t.sf(size, len(sample) - 1))
    differs = dict(zip(p, multipletests([*p.values()], alpha=0.05, method="holm")[0], strict=True)) if p else {}
    return [bool(differs.get(i, False)) for i in range(len(samples))]


def window_means(values: Sequence[float] | np.ndarray, window: int) -> np.ndarray:
    """Of `window` neighbouring steps, full windows only."""
    return np.convolve(values, np.full(window, 1 / window), "valid")


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; its columns, of which there may be many, are not padded."""
    lines = ["| " + " | ".join(cells) + " |" for cells in (header, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(header), *lines[1:]])

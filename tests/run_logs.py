"""Runs that follow the entropy law, and logs of them."""

import json

import numpy as np
import pytest

from entropy_kernels.analysis import report


def course(steps, seed=0, a=0.15, b=0.6, start=0.9, end=0.2):
    """Steps, entropies, performances of a run that follows the law but for noise."""
    rng = np.random.default_rng(seed)
    steps = np.asarray(steps)
    h = end + (start - end) * np.exp(-3 * steps / max(steps.max(), 1))
    return steps, h, b - a * np.exp(h) + 0.004 * rng.standard_normal(len(steps))


def law(h, r):
    """(a, b) by least squares in float64, straight from numpy."""
    x = np.exp(np.asarray(h, float))
    (a, b), *_ = np.linalg.lstsq(np.column_stack([-x, np.ones_like(x)]), np.asarray(r, float), rcond=None)
    return a, b


def rows(steps, h, r, entropy="entropy", performance="val_pass1"):
    return [{"step": int(s), entropy: float(x), performance: float(y)} for s, x, y in zip(steps, h, r, strict=True)]


def jsonl(path, entries):
    path.write_text("".join(entry if isinstance(entry, str) else json.dumps(entry) + "\n" for entry in entries))
    return path


def fitted(*paths, **options):
    return report.fit_logs(paths, **options)


def check(fit, h, r):
    a, b = law(h, r)
    assert (fit.law.a, fit.law.b) == (pytest.approx(a, rel=1e-6), pytest.approx(b, rel=1e-6))

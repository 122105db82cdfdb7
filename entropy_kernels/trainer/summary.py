"""End values of runs, and the claims by which a reproduction is judged: numbers, no sentences on them (report.py)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

import entropy_kernels as ek
from entropy_kernels.trainer.config import HEADS
from entropy_kernels.trainer.methods import BASELINE, METHODS

if TYPE_CHECKING:
    from pandas import DataFrame

#: The entropy at the end is the mean of this many last rollouts: one rollout is noisy.
END_ROLLOUTS = 8
#: Parts of a step whose seconds a log has.
PHASES = ("sample", "verify", "score", "update", "measure", "ops")
#: Comparisons of the entropy change: name in the summary -> columns with the prediction and with the measurement.
CHANGES = {
    "logits": ("predicted_dh", "measured_dh"),
    "network": ("first_order_dh", "first_update_dh"),
    "network_small": ("first_order_dh", "small_update_dh"),
    "network_step": ("first_order_step_dh", "measured_dh"),
}


def end_values(log: DataFrame) -> dict[str, float]:
    """End values of one run: entropy, validation, the law, the correlations of the entropy change, and cost."""

    def measured(column: str) -> Any:
        return log[column].dropna() if column in log else log.iloc[:0]

    validated = log[log["val_pass1"].notna()] if "val_pass1" in log else log.iloc[:0]
    start, end = float(log["entropy"].iloc[0]), float(log["entropy"].iloc[-END_ROLLOUTS:].mean())
    values = {"entropy_start": start, "entropy_end": end, "entropy_fall": 1.0 - end / start}
    if len(validated):
        ends = [name for name in validated.columns if name.startswith(("val_", "final_"))]
        values |= {name: float(validated[name].iloc[-1]) for name in ends}
    values |= law_values(validated)
    for name, (predicted, change) in CHANGES.items():
        if {predicted, change} <= set(log.columns):
            pairs = log[[predicted, change]].dropna().to_numpy(float)
            values |= {f"{name}_{key}": value for key, value in agreement(pairs[:, 0], pairs[:, 1]).items()}
    for head in HEADS:
        if len(peak := measured(f"memory/{head}")):
            values[f"memory_{head}"] = float(peak.iloc[0])
    if "tokens" in log:
        values["tokens"] = float(log["tokens"].mean())
    # medians: first steps compile, measure and wait for files
    columns = {f"seconds_{name}": f"time/{name}" for name in PHASES} | {"memory_peak": "memory/peak"}
    values |= {name: float(found.median()) for name, column in columns.items() if len(found := measured(column))}
    if "time/step" in log:
        values["seconds_per_step"] = float(log["time/step"].median())
        values["ops_share"] = float((log["time/ops"] / log["time/step"]).median())
        values["tokens_per_s"] = float((log["tokens"] / log["time/step"]).median())
    return values


def law_values(validated: DataFrame) -> dict[str, float]:
    """Law and line over all validations, and the law of the first third judged at the last; {} without a fit."""
    h, r = validated["entropy"].to_numpy(float), validated["val_pass1"].to_numpy(float)
    if len(h) < 6 or np.ptp(h) == 0 or np.ptp(r) == 0:
        return {}
    law = ek.fit_entropy_law(h, r)
    third = ek.fit_entropy_law(h, r, fit_fraction=max(1 / 3, 3.01 / len(h)))
    assert third.extrapolation is not None
    return {
        "law_a": law.a,
        "law_b": law.b,
        "law_ceiling": law.ceiling,
        "law_r2": law.r2,
        "law_rmse": law.rmse,
        "line_r2": law.r2_linear,
        "line_rmse": law.rmse_linear,
        "third_final_error": third.extrapolation.final_error,
        "third_rmse": third.extrapolation.rmse,
    }


def agreement(predicted: Any, measured: Any) -> dict[str, float]:
    """Correlation, slope of measured on predicted through the origin, share of equal signs, count; {} if undefined."""
    x, y = np.asarray(predicted, float), np.asarray(measured, float)
    if len(x) < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return {}
    return {
        "correlation": float(np.corrcoef(x, y)[0, 1]),
        "slope": float(x @ y / (x @ x)),
        "same_sign": float(np.mean(np.sign(x) == np.sign(y))),
        "n": len(x),
    }


def over_seeds(runs: Mapping[str, Sequence[DataFrame]]) -> dict[str, dict[str, Any]]:
    """Per run and end value: ``mean``, ``sd`` (None for one seed), ``seeds``, the values themselves."""
    result: dict[str, dict[str, Any]] = {}
    for run, logs in runs.items():
        per_seed = [end_values(log) for log in logs]
        # the names of any seed: entropy changes need not be measured on all of them
        names = list(dict.fromkeys(name for values in per_seed for name in values))
        result[run] = {name: _spread([values[name] for values in per_seed if name in values]) for name in names}
    return result


def _spread(values: list[float]) -> dict[str, Any]:
    sd = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {"mean": float(np.mean(values)), "sd": sd, "seeds": values}


def criteria(
    summary: Mapping[str, Mapping[str, Any]], experiment: Mapping[str, Sequence[float]], *, walk: bool = True
) -> list[dict[str, Any]]:
    """The claims of a reproduction: what is claimed, the figure, and whether it holds.

    "By more than the spread of the seeds": the difference of means exceeds the larger of the two standard deviations,
    and the worst seed of the one is above the best of the other. With `walk` False only what theory says of any task:
    how far entropy falls and methods differ is claimed of the embedded task alone.
    """
    checks: list[dict[str, Any]] = []

    def check(claim: str, holds: bool, figure: str) -> None:
        checks.append({"claim": claim, "holds": bool(holds), "figure": figure})

    base = summary[BASELINE]
    if walk:
        fall = base["entropy_fall"]["mean"]
        check("the baseline's entropy falls by at least 75 %", fall >= 0.75, f"{fall:.1%}")
    for name, method in METHODS.items() if walk else ():
        if method.entropy_factor is None or name not in summary:
            continue
        ratio, factor = summary[name]["entropy_end"]["mean"] / base["entropy_end"]["mean"], method.entropy_factor
        check(
            f"{method.label} ends with at least {factor:g} x the baseline's entropy", ratio >= factor, f"{ratio:.2f} x"
        )
        for other, beside in METHODS.items():
            compared = other == BASELINE or beside.control_of is not None
            if not compared or other not in summary or "final_pass8" not in summary[name]:
                continue
            mine, theirs = summary[name]["final_pass8"], summary[other]["final_pass8"]
            gap = mine["mean"] - theirs["mean"]
            noise = max(mine["sd"] or 0.0, theirs["sd"] or 0.0)
            of = "the baseline's" if other == BASELINE else f"that of {beside.label.lower()}"
            check(
                f"{method.label}'s pass@8 is above {of} by more than the spread of the seeds",
                gap > noise and min(mine["seeds"]) > max(theirs["seeds"]),
                f"{mine['mean']:.3f} against {theirs['mean']:.3f}, gap {gap:+.3f}, spread {noise:.3f}",
            )
    fit = agreement(experiment["predicted"], experiment["measured"])
    # a start that is never right, or always, has no advantages to step along
    none = "no token had an advantage"
    check(
        "logits as parameters: measured and predicted entropy change correlate at 0.999 or better",
        bool(fit) and fit["correlation"] >= 0.999,
        f"{fit['correlation']:.6f}" if fit else none,
    )
    check(
        "logits as parameters: slope within 1 % of 1",
        bool(fit) and abs(fit["slope"] - 1.0) <= 0.01,
        f"{fit['slope']:.5f}" if fit else none,
    )
    if "network_small_correlation" in base:
        lowest = min(
            v["network_small_correlation"]["mean"] for v in summary.values() if "network_small_correlation" in v
        )
        check(
            "through the network: its first order correlates with the change over a tenth of an update at 0.999 or "
            "better, every method",
            lowest >= 0.999,
            f"lowest {lowest:.4f}",
        )
    return checks

"""What a report counts: the end values of runs, how their courses compare, and the claims of a reproduction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

import entropy_kernels as ek
from entropy_kernels.analysis.plot_style import curve
from entropy_kernels.trainer.config import HEADS
from entropy_kernels.trainer.methods import BASELINE, METHODS, TARGET_RUN

if TYPE_CHECKING:
    from pandas import DataFrame, Series

Logs = Mapping[str, Sequence["DataFrame"]]
Summary = Mapping[str, Mapping[str, Any]]

#: The entropy at the end is the mean of this many last rollouts: one rollout is noisy.
END_ROLLOUTS = 8
#: Of one seed smaller differences in pass@k are called none: on the embedded task equal runs differ by as much.
ONE_SEED_NOISE = 0.05
LEAST_SLOWDOWN, SAME_MACHINE = 0.05, 0.1
#: Validations that a course is averaged over, and the least mean distance that is called behind.
SMOOTH, LEAST_BEHIND = 3, 0.01
#: Nats that the entropy may be off its target, on average and at worst (:func:`held_values`).
HELD, HELD_AT_WORST = 0.02, 0.04
#: Parts of a step whose seconds a log has.
PHASES = ("sample", "verify", "score", "update", "measure", "ops")
#: Columns of which a run's mean over the steps is told.
MEANS = ("tokens", "tokens_touched", "decrease_share", "free_dh", "control_dh", "measured_dh")
#: Comparisons of the entropy change: name in the summary -> columns with the prediction and with the measurement.
CHANGES = {
    "logits": ("predicted_dh", "measured_dh"),
    "network": ("first_order_dh", "first_update_dh"),
    "network_small": ("first_order_dh", "small_update_dh"),
    "network_step": ("first_order_step_dh", "measured_dh"),
}


def end_values(log: DataFrame) -> dict[str, float]:
    """End values of one run: entropy, validation, the law, the correlations of the entropy change, and cost. NaN counts
    as not measured, as which a log keeps what is not finite; ValueError if no entropy is left."""
    entropy = log["entropy"].dropna()
    if not len(entropy):
        raise ValueError(f"runs: expected finite entropies, got a log of {len(log)} steps without one")

    def measured(column: str) -> Any:
        return log[column].dropna() if column in log else log.iloc[:0]

    start, end = float(entropy.iloc[0]), float(entropy.iloc[-END_ROLLOUTS:].mean())
    values = {"entropy_start": start, "entropy_end": end, "entropy_fall": (start - end) / max(start, 1e-9)}
    values |= {"entropy_missing": float(len(log) - len(entropy))} if len(entropy) < len(log) else {}
    ends = [name for name in log if str(name).startswith(("val_", "final_"))]
    values |= {str(name): float(found.iloc[-1]) for name in ends if len(found := measured(name))}
    values |= law_values(log) | held_values(log)
    for name, (predicted, change) in CHANGES.items():
        if {predicted, change} <= set(log.columns):
            pairs = log[[predicted, change]].dropna().to_numpy(float)
            values |= {f"{name}_{key}": value for key, value in agreement(pairs[:, 0], pairs[:, 1]).items()}
    for head in HEADS:
        if len(peak := measured(f"memory/{head}")):
            values[f"memory_{head}"] = float(peak.iloc[0])
    values |= {name: float(found.mean()) for name in MEANS if len(found := measured(name))}
    # medians: first steps compile, measure and wait for files
    columns = {f"seconds_{name}": f"time/{name}" for name in PHASES} | {"memory_peak": "memory/peak"}
    values |= {name: float(found.median()) for name, column in columns.items() if len(found := measured(column))}
    if "time/step" in log:
        values["seconds_per_step"] = float(log["time/step"].median())
        values["ops_share"] = float((log["time/ops"] / log["time/step"]).median())
        values["tokens_per_s"] = float((log["tokens"] / log["time/step"]).median())
    return values


def held_values(log: DataFrame) -> dict[str, float]:
    """How well a target entropy was held over the second half of a run, in means of END_ROLLOUTS, which one rollout's
    sampling moves little: mean and largest distance, nats. {} without a target, or of a run that is too short."""
    if "target_entropy" not in log or not log["target_entropy"].notna().any():
        return {}
    gap = (log["entropy"] - log["target_entropy"]).iloc[len(log) // 2 :].rolling(END_ROLLOUTS).mean().dropna().abs()
    if not len(gap):
        return {}
    end = float(log["target_entropy"].iloc[-1])
    return {"target_end": end, "target_off": float(gap.mean()), "target_worst": float(gap.max())}


def law_values(log: DataFrame) -> dict[str, float]:
    """Law and line over all validations, and the law of the first third judged at the last; {} without a fit."""
    h, r = log.reindex(columns=["entropy", "val_pass1"]).dropna().to_numpy(float).T
    if len(h) < 6 or np.ptp(h) == 0 or np.ptp(r) == 0:
        return {}
    law = ek.fit_entropy_law(h, r)
    third = ek.fit_entropy_law(h, r, fit_fraction=max(1 / 3, 3.01 / len(h)))
    assert third.extrapolation is not None
    return {
        **{f"law_{name}": getattr(law, name) for name in ("a", "b", "ceiling", "r2", "rmse")},
        "line_r2": law.r2_linear,
        "line_rmse": law.rmse_linear,
        **{f"third_{name}": getattr(third.extrapolation, name) for name in ("final_error", "rmse")},
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


def over_seeds(runs: Logs) -> dict[str, dict[str, Any]]:
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


def criteria(summary: Summary, experiment: Mapping[str, Sequence[float]], *, walk: bool = True) -> list[dict[str, Any]]:
    """The claims of a reproduction: what is claimed, the figure, and whether it holds.

    "By more than the spread of the seeds": the difference of means exceeds the larger of the two standard deviations,
    and the worst seed of the one is above the best of the other; not claimed of one seed, which has no spread. With
    `walk` False only what theory says of any task: how far entropy falls and methods differ is claimed of the embedded
    task alone.
    """
    checks: list[dict[str, Any]] = []

    def check(claim: str, holds: object, figure: str) -> None:
        checks.append({"claim": claim, "holds": bool(holds), "figure": figure})

    base = summary[BASELINE]
    if walk:
        fall = base["entropy_fall"]["mean"]
        check("the baseline's entropy falls by at least 75 %", fall >= 0.75, f"{fall:.1%}")
    for name, method in METHODS.items() if walk else ():
        if method.entropy_factor is None or name not in summary:
            continue
        ratio, factor = entropy_ratio(summary, name), method.entropy_factor
        check(
            f"{method.label} ends with at least {factor:g} x the baseline's entropy", ratio >= factor, f"{ratio:.2f} x"
        )
        for other, beside in METHODS.items():
            compared = other == BASELINE or beside.control_of is not None
            if not compared or any("final_pass8" not in summary.get(each, ()) for each in (name, other)):
                continue
            mine, theirs = summary[name]["final_pass8"], summary[other]["final_pass8"]
            gap, noise = difference(mine, theirs)
            if noise is None:
                continue
            of = "the baseline's" if other == BASELINE else f"that of {beside.label.lower()}"
            check(
                f"{method.label}'s pass@8 is above {of} by more than the spread of the seeds",
                gap > noise and min(mine["seeds"]) > max(theirs["seeds"]),
                f"{mine['mean']:.3f} against {theirs['mean']:.3f}, gap {gap:+.3f}, spread {noise:.3f}",
            )
    held = summary.get(TARGET_RUN, {}) if walk else {}
    for name, text, most in (("target_off", "on average", HELD), ("target_worst", "at worst", HELD_AT_WORST)):
        if name in held:
            figure = max(held[name]["seeds"])
            claim = f"the target entropy is held within {most:g} nats {text}, by means of {END_ROLLOUTS} rollouts"
            check(claim, figure <= most, f"{figure:.3f}")
    fit = agreement(experiment["predicted"], experiment["measured"])
    claim = "logits as parameters: measured and predicted entropy change correlate at 0.999 or better"
    # a start that is never right, or always, has no advantages to step along
    none = "no token had an advantage"
    check(claim, fit and fit["correlation"] >= 0.999, f"{fit['correlation']:.6f}" if fit else none)
    claim = "logits as parameters: slope within 1 % of 1"
    check(claim, fit and abs(fit["slope"] - 1.0) <= 0.01, f"{fit['slope']:.5f}" if fit else none)
    name = "network_small_correlation"
    if name in base:
        lowest = min(values[name]["mean"] for values in summary.values() if name in values)
        claim = "through the network: its first order correlates with the change over a tenth of an update at 0.999 or "
        check(claim + "better, every method", lowest >= 0.999, f"lowest {lowest:.4f}")
    return checks


def entropy_ratio(summary: Summary, run: str) -> float:
    """Entropy at the end over the baseline's."""
    mine, theirs = (summary[name]["entropy_end"]["mean"] for name in (run, BASELINE))
    return float(mine / theirs) if theirs else float("inf" if mine else 1)


def difference(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> tuple[float, float | None]:
    """Of two means over seeds, and the larger standard deviation of the two: None for one seed."""
    spreads = [value["sd"] for value in (mine, theirs) if value["sd"] is not None]
    return mine["mean"] - theirs["mean"], max(spreads, default=None)


def beside_baseline(summary: Summary, run: str, metric: str) -> tuple[float, float, int] | None:
    """Value of a metric of the validation at the end, its difference to the baseline's, and that one's sign: 0 where
    the seeds spread by more, or, of one seed, where it is smaller than ONE_SEED_NOISE. None if it was not measured."""
    there = (name for name in (f"final_{metric}", f"val_{metric}") if name in summary[BASELINE])
    if (name := next(there, "")) not in summary[run]:
        return None
    mine, theirs = summary[run][name], summary[BASELINE][name]
    gap, noise = difference(mine, theirs)
    if noise is None:
        noise = ONE_SEED_NOISE * (1.0 if metric.startswith("pass") else max(1.0, theirs["mean"]))
    return mine["mean"], gap, int(np.sign(gap)) if abs(gap) > noise else 0


def disturbance(summary: Summary, run: str) -> float | None:
    """How many times the baseline's seconds a run took to sample a token, which no method changes; None if unknown."""
    mine, theirs = ({name: v["mean"] for name, v in summary[of].items()} for of in (run, BASELINE))
    if not {"tokens_per_s", "seconds_sample", "tokens"} <= mine.keys() & theirs.keys():
        return None
    return float(mine["seconds_sample"] / mine["tokens"] / (theirs["seconds_sample"] / theirs["tokens"]))


def slowdown(summary: Summary, run: str) -> float:
    """By what share a run's tokens/s are below the baseline's; 0 below :data:`LEAST_SLOWDOWN`, and where sampling
    differs by more than :data:`SAME_MACHINE`: the machine had other work."""
    times = disturbance(summary, run)
    if times is None or abs(times - 1) > SAME_MACHINE:
        return 0.0
    share = 1 - summary[run]["tokens_per_s"]["mean"] / summary[BASELINE]["tokens_per_s"]["mean"]
    return float(share) if share >= LEAST_SLOWDOWN else 0.0


def courses(runs: Logs) -> dict[str, dict[str, Any]]:
    """What a reader should see in the curves, per run, of means over seeds and :data:`SMOOTH` validations.

    ``last``: the last step. ``half_fall``: the step by which half of the entropy's fall is over. ``pass8_loss``: pass@8
    at its best minus that at the end. ``behind``: how long pass@1 is below the baseline's (:func:`behind`), or None.
    """
    base = curve(runs[BASELINE], "val_pass1")["mean"]
    found: dict[str, dict[str, Any]] = {}
    for run, logs in runs.items():
        entropy, pass8 = curve(logs, "entropy")["mean"], curve(logs, "val_pass8")["mean"]
        half = (entropy.iloc[0] + entropy.iloc[-END_ROLLOUTS:].mean()) / 2
        fell = entropy.rolling(END_ROLLOUTS, min_periods=1).mean() <= half
        smooth = pass8.rolling(min(SMOOTH, max(1, len(pass8)))).mean().dropna()
        found[run] = {
            "last": int(entropy.index[-1]),
            "half_fall": int(fell.idxmax()) if fell.any() else None,
            "pass8_loss": float(smooth.max() - smooth.iloc[-1]) if len(smooth) > 1 else None,
            "behind": None if run == BASELINE else behind(curve(logs, "val_pass1")["mean"] - base),
        }
    return found


def behind(gap: Series[float]) -> dict[str, Any] | None:
    """How long `gap`, by step, is below 0 from the start, in means of :data:`SMOOTH` validations: ``until`` which step,
    ``by`` how much on average, and whether ``to_end``. None if it is so for less than a fifth of the course, or by less
    than :data:`LEAST_BEHIND`."""
    gap = gap.dropna().iloc[1:]  # they start together
    below = (gap.rolling(SMOOTH).mean().dropna() < 0).to_numpy()
    windows = len(below) if below.all() else int(below.argmin())
    stretch = gap.iloc[: windows + SMOOTH - 1]
    if not windows or len(stretch) < max(SMOOTH, len(gap) / 5) or -stretch.mean() < LEAST_BEHIND:
        return None
    return {"until": int(stretch.index[-1]), "by": -float(stretch.mean()), "to_end": len(stretch) == len(gap)}

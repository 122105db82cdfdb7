"""The report of a set of runs: one self-contained HTML page, the same as Markdown, and their figures.

Read :func:`write_report` first; then the numbers: end values of runs, and the claims by which a reproduction is judged
(:func:`over_seeds`, :func:`criteria`); then tables and sentences on them, put together by :func:`sections`.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import entropy_kernels as ek
from entropy_kernels._machine import cpu_name, gpu_name, usable_cores
from entropy_kernels.analysis import plots
from entropy_kernels.trainer.config import HEADS, TrainerConfig
from entropy_kernels.trainer.files import OwnFiles, write_bytes, write_json, write_text
from entropy_kernels.trainer.log import COVARIANCE_COLUMNS, describe_memory
from entropy_kernels.trainer.methods import BASELINE, METHODS, PAPER, TARGET_ROW, TARGET_RUN, TARGETS, Method
from entropy_kernels.trainer.ppo import versions
from entropy_kernels.trainer.start import resolve_device

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

Logs = Mapping[str, Sequence["DataFrame"]]
Summary = Mapping[str, Mapping[str, Any]]
Table = dict[str, Any]

#: At the end of a run's name: the method under head = torch.
TORCH_OPS = "_torch_ops"
#: The page's figures: name of the file -> what it shows.
FIGURES = {
    "entropy": "Policy entropy over training steps",
    "performance": "pass@1 and pass@8 over training steps",
    "law": "Validation accuracy against entropy, with the fitted law and a straight line",
    "entropy_change": "Measured against predicted entropy change, three ways",
    "covariance": "Mean covariance of the top fractions of tokens",
}

#: Columns of the logs that are worth keeping under version control, as csv/.
KEPT_COLUMNS = (
    *("step", "entropy", "reward", "tokens", "val_pass1", "val_pass8", "val_distinct"),
    *("final_pass1", "final_pass8", "final_pass32", "final_distinct", "cov_mean", "tokens_in_band"),
    *("target_entropy", "wanted_dh", "planned_dh", "target_gain", "target_saturated"),
    *("tokens_dropped", "tokens_penalized", "tokens_touched", "decrease_share", "clipfrac", "ppo_kl_abs"),
    *("predicted_dh", "control_dh", "free_dh", "measured_dh"),
    *("first_order_dh", "first_update_dh", "small_update_dh", "first_order_step_dh"),
)

#: Where the runs end: name in the summary, head, divisor, decimals.
END_COLUMNS = (
    ("entropy_start", "H start", 1, 3),
    ("entropy_end", "H end", 1, 3),
    ("target_end", "target", 1, 2),
    ("entropy_fall", "fall", 1, 2),
    ("final_pass1", "pass@1", 1, 3),
    ("final_pass8", "pass@8", 1, 3),
    ("final_pass32", "pass@32", 1, 3),
    ("final_distinct", "distinct right", 1, 2),
    ("law_r2", "law R²", 1, 3),
    ("line_r2", "line R²", 1, 3),
    ("law_rmse", "law RMSE", 1, 3),
    ("tokens_per_s", "tokens/s", 1, 0),
    ("ops_share", "share of ops", 1, 2),
)
#: What is done to tokens, means over the steps.
CONTROL_COLUMNS = (
    ("tokens_touched", "tokens touched", 1, 1),
    ("decrease_share", "share of the decrease", 1, 3),
    ("free_dh", "predicted without it, 1e-9 nats", 1e-9, 1),
    ("control_dh", "predicted, 1e-9 nats", 1e-9, 1),
    ("measured_dh", "measured, 1e-3 nats", 1e-3, 2),
)
#: What a step costs.
COST_COLUMNS = (
    ("tokens_per_s", "tokens/s", 1, 0),
    ("seconds_per_step", "step, s", 1, 3),
    ("seconds_sample", "sample", 1, 3),
    ("seconds_verify", "verify", 1, 3),
    ("seconds_score", "score", 1, 3),
    ("seconds_update", "update", 1, 3),
    ("seconds_measure", "measure", 1, 3),
    ("seconds_ops", "statistics and losses", 1, 3),
    ("memory_linear", "micro-batch, linear, GB", 1e9, 3),
    ("memory_logits", "logits, GB", 1e9, 3),
    ("memory_torch", "torch, GB", 1e9, 3),
    ("memory_peak", "GPU peak, GB", 1e9, 2),
)
#: Effect of a method -> what it does to tokens, in a sentence.
TREATMENTS = {
    "dropped": "lose their gradient", "detached": "lose their gradient", "penalized": "get a penalty",
    "token_weight": "are weighted", "advantages": "get another advantage", "entropy_coef": "get an entropy bonus",
}  # fmt: skip
COSTS = (
    "Seconds, medians over the steps. Measure: what the entropy change of a step is measured with. Statistics and "
    "losses: in all parts of the step, forward and backward, from hidden states with the head's matrix products."
)
WALK = (
    "A small Llama learns by PPO to walk from one number to another in four arithmetic moves. An exact verifier pays 1 "
    "for a right walk and nothing else, and every prompt has many right walks."
)


def report_names(picture: str, names: Iterable[str]) -> list[str]:
    """The files that :func:`write_report` writes, with the logs `names` kept."""
    return [
        *("report.html", "report.md", "summary.json", picture),
        *(f"{name}.png" for name in FIGURES),
        *(f"csv/{name}.csv" for name in names),
    ]


def write_report(
    out: Path,
    runs: Logs,
    *,
    base: TrainerConfig,
    experiment: Mapping[str, Sequence[float]],
    command: str,
    seeds: Sequence[int],
    seconds: float,
    workers: int,
    title: str,
    kept: Mapping[str, DataFrame],
    picture: str = "curves.png",
) -> dict[str, Any]:
    """Write report.html, report.md, pictures, csv/ and summary.json into `out`; returns what the last one holds.

    Parameters
    ----------
    runs : mapping
        Method, method + TORCH_OPS, or TARGET_RUN to logs, one DataFrame per seed. The baseline must be among them.
    base : TrainerConfig
        What the runs have in common.
    experiment : mapping
        ``predicted`` and ``measured`` of the experiment with logits as parameters.
    command : str
        What made the runs; `seconds` of wall time, with `workers` runs at the same time.
    kept : mapping
        File name to log: their small columns become csv/.
    picture : str
        The curves, for report.md.
    """
    if BASELINE not in runs:
        raise ValueError(f"runs: expected the baseline {BASELINE!r} among them, got {', '.join(runs)}")
    OwnFiles(out).claim(*report_names(picture, kept))
    summary = over_seeds(runs)
    fit = agreement(experiment["predicted"], experiment["measured"])
    device = resolve_device(base.device)
    cpu = f"{cpu_name()}, {usable_cores()} cores, {base.threads} thread{'s' if base.threads > 1 else ''} a run"
    record = {
        "command": command,
        "task": base.task,
        "model": base.model,
        "hardware": gpu_name(device.index or 0) if device.type == "cuda" else cpu,
        "seeds": list(seeds),
        "seconds": round(seconds, 1),
        "workers": workers,
        "versions": versions(),
        "criteria": criteria(summary, experiment, walk=base.task == "walk"),
        "logits_as_parameters": fit,
        "target_method": base.target_method,
        "limits": limits(summary, base),
        "methods": summary,
    }
    write_json(out / "summary.json", record)
    labelled = {label(run): list(logs) for run, logs in runs.items()}
    main = {label(run): list(logs) for run, logs in runs.items() if not is_beside(run)}
    shown = {}
    for name, figure in draw(labelled, main, experiment).items():
        data = plots.png(figure)
        write_bytes(out / f"{name}.png", data)
        encoded = base64.b64encode(data).decode("ascii")
        shown[name] = f'<img alt="{FIGURES[name]}" src="data:image/png;base64,{encoded}">'
    covariance = plots.covariance_table(labelled, dict(COVARIANCE_COLUMNS))
    about = plots.html_table(covariance, caption="Mean covariance of the top tokens at the first step")
    shown["covariance"] = f'<div class="wide">{about}</div>\n{shown["covariance"]}'
    write_text(out / "report.html", page(record, title=title, shown=shown))
    columns = {"entropy": "policy entropy (nats)", "val_pass1": "pass@1", "val_pass8": "pass@8"}
    task = base.task.partition("?")[0]  # its options would run into the next panel's title
    curves = plots.performance_figure(labelled, columns=columns, title=task)
    write_bytes(out / picture, plots.png(curves, dpi=110))
    write_text(out / "report.md", markdown(record, picture=picture))
    for name, log in kept.items():
        small = log[[column for column in KEPT_COLUMNS if column in log]]
        write_text(out / "csv" / f"{name}.csv", small.to_csv(index=False, float_format="%.5g"))
    return record


def draw(runs: Logs, main: Logs, experiment: Mapping[str, Sequence[float]]) -> dict[str, Figure]:
    """The figures of the page by the names of their files; runs by their labels, in `main` those of methods alone."""
    import pandas as pd

    panels: dict[str, Any] = {"logits as parameters": (experiment["predicted"], experiment["measured"])}
    base = pd.concat(runs[label(BASELINE)])
    if {"predicted_dh", "measured_dh"} <= set(base.columns):
        panels["baseline: logits-level prediction (unit step)"] = base
    if {"first_order_dh", "first_update_dh"} <= set(base.columns):
        pairs = base[["first_order_dh", "first_update_dh"]].dropna()
        panels["baseline: the network's first order"] = (pairs["first_order_dh"], pairs["first_update_dh"])
    return {
        "entropy": plots.entropy_figure(runs),
        "performance": plots.performance_figure(runs),
        "law": plots.law_figure(main),
        "entropy_change": plots.entropy_change_figure(panels),
        "covariance": plots.covariance_figure(plots.covariance_table(main, dict(COVARIANCE_COLUMNS))),
    }


# --- end values and claims: numbers -----------------------------------------------------------------------------------

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
    values |= law_values(validated) | held_values(log)
    for name, (predicted, change) in CHANGES.items():
        if {predicted, change} <= set(log.columns):
            pairs = log[[predicted, change]].dropna().to_numpy(float)
            values |= {f"{name}_{key}": value for key, value in agreement(pairs[:, 0], pairs[:, 1]).items()}
    for head in HEADS:
        if len(peak := measured(f"memory/{head}")):
            values[f"memory_{head}"] = float(peak.iloc[0])
    means = ("tokens", *(name for name, *_ in CONTROL_COLUMNS))
    values |= {name: float(found.mean()) for name in means if len(found := measured(name))}
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


def law_values(validated: DataFrame) -> dict[str, float]:
    """Law and line over all validations, and the law of the first third judged at the last; {} without a fit."""
    h, r = validated["entropy"].to_numpy(float), validated["val_pass1"].to_numpy(float)
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

    def check(claim: str, holds: object, figure: str) -> None:
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
            gap, noise = difference(mine, theirs)
            of = "the baseline's" if other == BASELINE else f"that of {beside.label.lower()}"
            check(
                f"{method.label}'s pass@8 is above {of} by more than the spread of the seeds",
                gap > noise and min(mine["seeds"]) > max(theirs["seeds"]),
                f"{mine['mean']:.3f} against {theirs['mean']:.3f}, gap {gap:+.3f}, spread {noise:.3f}",
            )
    held = summary.get(TARGET_RUN, {}) if walk else {}
    for name, text, most in (("target_off", "on average", 0.02), ("target_worst", "at worst", 0.04)):
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


def difference(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> tuple[float, float]:
    """Of two means over seeds, and the larger standard deviation of the two: 0 for one seed."""
    return mine["mean"] - theirs["mean"], max(mine["sd"] or 0.0, theirs["sd"] or 0.0)


# --- tables and sentences --------------------------------------------------------------------------------------------


def method_of(run: str) -> Method:
    """The row of what a run is under."""
    return TARGET_ROW if run == TARGET_RUN else METHODS[run.removesuffix(TORCH_OPS)]


def label(run: str) -> str:
    """What a run is called: its method's label, and that it is by torch's own operations."""
    return method_of(run).label + (", torch ops" if run.endswith(TORCH_OPS) else "")


def is_beside(run: str) -> bool:
    """Whether it is there to compare a method with: a control, or the method by torch's own operations."""
    return run.endswith(TORCH_OPS) or method_of(run).control_of is not None


def heading(record: Mapping[str, Any]) -> str:
    """What was trained, in a few words."""
    if record["task"] != "walk":
        return f"{record['model']} on {record['task']}"
    controls = any(not run.endswith(TORCH_OPS) and is_beside(run) for run in record["methods"])
    return "Walk, with random-token controls" if controls else "Walk"


def table(summary: Summary, columns: Sequence[tuple[str, str, float, int]], *, spread: bool = False) -> Table:
    """``head`` and ``rows`` as text, a row per run, of the columns that any has; with the seeds' deviation if asked."""
    columns = [column for column in columns if any(column[0] in values for values in summary.values())]

    def cell(values: Mapping[str, Any], name: str, by: float, n: int) -> str:
        if name not in values:
            return "–"
        sd = values[name]["sd"]
        return f"{values[name]['mean'] / by:.{n}f}" + (f" ± {sd / by:.{n}f}" if spread and sd is not None else "")

    rows = [[label(run), *(cell(v, name, by, n) for name, _, by, n in columns)] for run, v in summary.items()]
    return {"head": ["", *(text for _, text, _, _ in columns)], "rows": rows}


def law_lines(summary: Summary) -> list[str]:
    """One sentence per run on the law beside the straight line, and on the law of the first third."""
    return [
        f"{label(run)}: R = -({v['law_a']['mean']:.4f}) e^H + {v['law_b']['mean']:.4f}, "
        f"R² {v['law_r2']['mean']:.3f}, RMSE {v['law_rmse']['mean']:.4f}, ceiling {v['law_ceiling']['mean']:.3f}; "
        f"straight line in H: R² {v['line_r2']['mean']:.3f}, RMSE {v['line_rmse']['mean']:.4f}. "
        "Fitted on the first third of the validations, the law is off by "
        f"{v['third_final_error']['mean']:+.3f} at the last one."
        for run, v in summary.items()
        if "law_a" in v
    ]


def held_line(record: Mapping[str, Any]) -> str:
    """What the run under a target entropy shows; empty without one."""
    held = record["methods"].get(TARGET_RUN, {})
    if "target_off" not in held:
        return ""
    off, worst = held["target_off"]["mean"], max(held["target_worst"]["seeds"])
    touched = held["tokens_touched"]["mean"] / held["tokens"]["mean"]
    did = {
        "dropped": f", with {touched:.1%} of the tokens dropped over the run",
        "token_weight": f", with {touched:.0%} of the tokens weighted over the run",
    }
    return (
        f"{TARGET_ROW.label}: the run was given a number, {held['target_end']['mean']:g} nats (dashed), and finds by "
        f"feedback what to do. Over the second half the means of {END_ROLLOUTS} rollouts are {off:.3f} nats off on "
        f"average and {worst:.3f} at worst{did.get(TARGETS[record['target_method']], '')}. It is a brake: above the "
        "target nothing is done, and the entropy falls as the baseline's."
    )


def memory_line(summary: Summary) -> str | None:
    """The baseline's peak memory under each head; None if it was not measured."""
    values = summary[BASELINE]
    return describe_memory(
        {f"memory/{head}": values[f"memory_{head}"]["mean"] for head in HEADS if f"memory_{head}" in values}
    )


def change_lines(summary: Summary, experiment: Mapping[str, float]) -> list[str]:
    """What the three comparisons of the entropy change gave."""
    lines = ["Logits as parameters: no token had an advantage."]
    if experiment:
        lines = [
            f"Logits as parameters: correlation {experiment['correlation']:.6f}, slope {experiment['slope']:.5f}, "
            f"{experiment['n']} tokens, step 1e-3."
        ]
    for run, values in summary.items():
        v = {name: value["mean"] for name, value in values.items()}
        if "logits_correlation" in v:
            lines.append(
                f"{label(run)}, logits-level prediction against the measured change of a rollout: correlation "
                f"{v['logits_correlation']:.2f}, same sign {v['logits_same_sign']:.0%}."
            )
        if "network_correlation" in v:
            lines.append(
                f"{label(run)}, the network's own first order against the measured change of one update: correlation "
                f"{v['network_correlation']:.4f}, slope {v['network_slope']:.3f}."
            )
        for name, over, n in (("small", "a tenth of that update", 5), ("step", "all updates of a rollout", 4)):
            if f"network_{name}_correlation" in v:
                correlation, slope = v[f"network_{name}_correlation"], v[f"network_{name}_slope"]
                lines[-1] += f" Over {over}: {correlation:.{n}f}, slope {slope:.3f}."
    return lines


def limits(summary: Summary, base: TrainerConfig) -> list[str]:
    """What does not show at this scale, with the figures of these very runs."""
    lines = []
    first, walk = summary[BASELINE], base.task == "walk"
    treating = {name: METHODS[name] for name in PAPER if METHODS[name].effect and not METHODS[name].control_of}
    for name, method in {**treating, TARGET_RUN: TARGET_ROW}.items():
        if name in summary and "final_pass1" in summary[name]:
            gap, noise = difference(summary[name]["final_pass1"], first["final_pass1"])
            one = "seeds spread by 0.01 to 0.03, and this is one" if walk else "this is one seed"
            seeds = f"the seeds spread by {noise:.3f}" if noise else one
            shows = " The gain that shows here is in pass@k and diversity." if walk else ""
            lines.append(f"pass@1: {method.label} ends {gap:+.3f} from the baseline; {seeds}.{shows}")
    if "law_r2" in first:
        lines.append(
            f"The shape of the law: on the baseline e^H explains {first['law_r2']['mean']:.3f} of the variance and a "
            f"straight line in H {first['line_r2']['mean']:.3f}. Over this range of entropies the data do not choose "
            "between them."
        )
    if "logits_correlation" in first:
        lines.append(
            "The logits-level prediction through the network is a trend (baseline: correlation "
            f"{first['logits_correlation']['mean']:.2f}): weights are shared between tokens, "
            "and AdamW rescales every weight's step."
        )
    if "tokens" in first:
        tokens = first["tokens"]["mean"] / base.minibatches
        for name, method in treating.items():
            times = base.under(name).selection_ratio / method.paper_ratio
            lines.append(
                f"{method.label}: the paper's fraction, {method.paper_ratio:g} of a minibatch of {tokens:.0f} tokens, "
                f"is {method.paper_ratio * tokens:.1f} tokens. That of these runs is {times:.0f} times larger."
            )
    return lines


# --- the page and the note; they refer to nothing outside the folder --------------------------------------------------


class Html(str):
    """Goes into the page as it is, and not into the note."""


Block = str | list[str] | Table  # a paragraph, a list of sentences, a table


def sections(record: Mapping[str, Any], shown: Mapping[str, str]) -> list[tuple[str, list[Block]]]:
    """Headings and blocks of page and note, of what summary.json holds; `shown` has the page's figures as HTML."""
    summary, workers, walk = record["methods"], record["workers"], record["task"] == "walk"
    about = f"{record['model']} learns {record['task']} by PPO. Its verifier gives the reward."
    treated: dict[str, list[str]] = {}
    for run in summary:
        effect = TARGETS[record["target_method"]] if run == TARGET_RUN else method_of(run).effect
        if effect is not None and not is_beside(run):
            treated.setdefault(TREATMENTS[effect], []).append(label(run))
    differ = "".join(f"{what} ({', '.join(names)}), " for what, names in treated.items())
    memory = memory_line(summary)
    costs = COSTS + (f" {workers} runs at the same time." if workers > 1 else "")
    if memory:
        costs += f" {memory} {HEADS_NOTE}"
    claims = [
        [check["claim"], check["figure"], "✓ holds" if check["holds"] else "✗ does not hold"]
        for check in record["criteria"]
    ]
    figures = {name: Html(shown.get(name, "")) for name in FIGURES}
    start = (
        f"{WALK if walk else about} All runs start from the same model; they differ in which tokens {differ}or nothing "
        "of the kind (baseline). Dashed are controls, which treat at random as many tokens as their method would "
        "select in the same batch, runs that take torch's own operations in place of this library's, and the entropy "
        "that a run is to hold."
    )
    about_panels = Html(f"<p>{escape(WHY)}</p>" if shown else "")  # the note has no panels
    one = len(record["seeds"]) == 1
    ends = ENDS if one else f"Means ± standard deviations over the seeds. {ENDS}"
    return [
        ("", [start]),
        ("Where the runs end", [table(summary, END_COLUMNS, spread=True), ends]),
        ("What a step does to the entropy", [table(summary, CONTROL_COLUMNS), TOUCHED]),
        ("What a step costs", [table(summary, COST_COLUMNS), costs]),
        ("Entropy", [figures["entropy"], CAUSE, held_line(record)]),
        ("pass@1 and pass@k", [figures["performance"]]),
        ("The law R = -a e^H + b", [figures["law"], law_lines(summary)]),
        (
            "Entropy change: measured against predicted",
            [figures["entropy_change"], change_lines(summary, record["logits_as_parameters"]), about_panels],
        ),
        ("Covariance is heavy-tailed", [figures["covariance"]]),
        ("Claims", [{"head": ["claim", "measured", ""], "rows": claims}, ONE_SEED if walk and one else ""]),
        ("What does not show at this scale", record["limits"] and [record["limits"]]),
    ]


def made(record: Mapping[str, Any]) -> str:
    """Seeds, time and versions."""
    seeds = f"Seed{'s' if len(record['seeds']) > 1 else ''} {', '.join(map(str, record['seeds']))}"
    again = " this time" if "--reuse" in record["command"].split() else ""
    versions = [f"{name} {value}" for name, value in record["versions"].items()]
    return " · ".join([seeds, f"{record['seconds'] / 60:.1f} minutes{again}", record["hardware"], *versions])


def page(record: Mapping[str, Any], *, title: str, shown: Mapping[str, str]) -> str:
    """report.html."""

    def show(block: Block) -> str:
        if isinstance(block, Html):
            return block
        if isinstance(block, str):
            return f"<p>{escape(block)}</p>"
        if isinstance(block, list):
            return f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in block)}</ul>"
        head = "".join(f'<th scope="col">{escape(text)}</th>' for text in block["head"])
        rows = ""
        for first, *cells in block["rows"]:
            marks = [{"✓": ' class="yes"', "✗": ' class="no"'}.get(cell[:1], "") for cell in cells]
            data = "".join(f"<td{mark}>{escape(cell)}</td>" for mark, cell in zip(marks, cells, strict=True))
            rows += f'<tr><th scope="row">{escape(first)}</th>{data}</tr>\n'
        return (
            f'<div class="wide"><table class="data"><thead><tr>{head}</tr></thead><tbody>\n{rows}</tbody></table></div>'
        )

    lines = [f"<h1>{escape(title)}</h1>", f'<p class="muted">{escape(made(record))}</p>']
    lines.append(f"<pre>{escape(record['command'])}</pre>")
    for section, blocks in sections(record, shown):
        lines += [f"<h2>{escape(section)}</h2>"] if section else []
        lines += [show(block) for block in blocks if block]
    head = f'<meta charset="utf-8">\n{VIEWPORT}\n<title>{escape(title)}</title>\n<style>{STYLE}</style>'
    body = "\n".join(lines)
    return f'<!doctype html>\n<html lang="en">\n<head>\n{head}\n</head>\n<body>\n{body}\n</body>\n</html>\n'


def markdown(record: Mapping[str, Any], *, picture: str) -> str:
    """report.md."""

    def show(block: Block) -> str:
        if isinstance(block, str):
            return block
        if isinstance(block, list):
            return "\n".join(f"- {line}" for line in block)
        rows = [block["head"], ["---"] * len(block["head"]), *block["rows"]]
        return "\n".join(f"| {' | '.join(row)} |" for row in rows)

    seeds = len(record["seeds"])
    parts = [f"# {heading(record)}, {seeds} seed{'s' if seeds > 1 else ''}", f"`{record['command']}`", made(record)]
    parts.append(f"![entropy, pass@1 and pass@8 over training steps]({picture})")
    for section, blocks in sections(record, {}):
        texts = [show(block) for block in blocks if block]
        parts += [f"## {section}", *texts] if section and texts else texts
    return "\n\n".join(parts) + "\n"


ENDS = (
    "H: policy entropy in nats per token, mean of the last rollouts. pass@k: chance that one of k samples is right, "
    "on held-out prompts, unbiased, in a larger validation at the end than those of the curves. Distinct right: "
    "different right answers among the samples of a prompt. Share of ops: time in this library's ops, by default with "
    "the head's matrix products, over the time of a step."
)
TOUCHED = (
    "Means over the steps. Touched: dropped, penalised, weighted, or given another advantage. Share of the decrease: "
    "what these tokens carry of what the step is predicted to take from the entropy, to first order. The prediction is "
    "for a step of the learning rate times the loss's gradient in logits that are free; AdamW's steps are far larger, "
    "so only its sign and its course can be compared with the measured change."
)
HEADS_NOTE = (
    "Linear: from hidden states; logits: materialised; torch: materialised, and torch's own operations. Weights and "
    "optimizer state, the same under all, are not counted."
)
CAUSE = (
    "Without intervention the policy spends its entropy early. The tokens that spend it are few: those whose "
    "log-probability and advantage are both high. Taking their gradient, or holding them back, keeps the entropy; "
    "doing the same to random tokens does not."
)
WHY = (
    "Why the three differ. The theory takes each row of logits as its own parameter: there, for a small step, "
    "prediction and measurement agree to rounding and curvature (first panel). In a network a step for one token "
    "moves the logits of all others, and AdamW rescales the step of every weight, so a sum of per-token predictions "
    "keeps the direction and loses the size (second panel; its prediction is for a unit step, so only correlation and "
    "sign mean something). The gradient of the entropy in the weights, times the change of the weights in one update, "
    "contains all of this and is again exact to first order (third panel). Over all updates of a rollout curvature "
    "adds up, and the agreement is less close."
)
ONE_SEED = (
    "The claims are stated for three seeds, make reproduce-toy: one seed has no spread to compare with and may miss a "
    "claim (where twice the baseline's entropy is claimed, single seeds were seen to end with 1.8 to 2.1 times)."
)
VIEWPORT = '<meta name="viewport" content="width=device-width, initial-scale=1">'
STYLE = """
  body { font: 16px/1.55 system-ui, sans-serif; color: #222; background: #fff; max-width: 62rem; margin: 2.5rem auto;
  padding: 0 1.2rem; } h1 { font-size: 1.7rem; line-height: 1.25; margin-bottom: .3rem; }
  h2 { font-size: 1.2rem; margin-top: 2.4rem; }
  p, li { max-width: 48rem; }
  img { max-width: 100%; height: auto; display: block; margin: .8rem 0; }
  table.data { border-collapse: collapse; font-size: .86rem; font-variant-numeric: tabular-nums; margin: 1rem 0; }
  table.data caption { text-align: left; color: #666; padding-bottom: .3rem; }
  table.data th, table.data td { padding: .3rem .6rem; text-align: right; border-bottom: 1px solid #e3e3e3;
  white-space: nowrap; } table.data th[scope=row], table.data thead th:first-child { text-align: left; }
  .wide { overflow-x: auto; }
  .muted, .wide + p { color: #666; }
  code, pre { font: .86rem/1.5 ui-monospace, monospace; background: #f5f5f5; }
  pre { padding: .7rem .9rem; overflow-x: auto; }
  td.yes { color: #1a7f37; font-weight: 600; } td.no { color: #b3261e; font-weight: 600; }
"""

"""Figure 8 of arXiv 2505.22617 on the embedded task: what a step takes from the entropy, beside covariances.

    python -m benchmarks.figure8            # five seeds, a start each; one that is done is not run again
    python -m benchmarks.figure8 --quick    # two short runs into runs/figure8-quick, to see that all of it works
    python -m benchmarks.figure8 --report   # figure8.md and figure8.png from the runs that are there

GRPO with one update per rollout (on-policy, every ratio 1), as the paper has it. Per step, with no change of the run:

measured    -ΔH, mean over tokens: on the rollout's own tokens before and after the update ("same"), and between this
            rollout and the next one ("next"), which is what a log of entropies shows and the paper plots.
group       the paper's covariance (its section 3.3): a prompt's completions y, Cov(log p(y)/|y|, A), mean over prompts.
literal     its Eq. 8 word by word, with Eq. 9's log-prob in it: Cov(lp, exp(lp)·A), lp = log p(y)/|y|.
batch       Cov(log p, A) over all tokens of the batch: the mean of what Clip-Cov and KL-Cov select by.
exact       A·C/T², mean over tokens: -ΔH of a step in logits that are free parameters (docs/math.md).
gradient    ∇H·(-∇L): -ΔH of a plain gradient step in the weights, to first order, by unit learning rate.
first order -∇H·Δθ, Δθ being what AdamW did: the most that any first order can say.

Covariances divide by the number of completions; prompts whose completions all got the same reward count with 0.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.plots import save
from benchmarks.results import RESULTS, ROOT, describe, write
from benchmarks.seeds import markdown, t_interval, window_means
from entropy_kernels._progress import ProgressBoard
from entropy_kernels.analysis import plot_style as style
from entropy_kernels.trainer.config import TrainerConfig
from entropy_kernels.trainer.files import write_text
from entropy_kernels.trainer.ppo import train
from entropy_kernels.trainer.probes import FirstOrder, Probe, Step, entropy_now
from entropy_kernels.trainer.rollout import Rollout, mean_over

OUT = RESULTS / "figure8"
SEEDS = (0, 1, 2, 3, 4)
#: Tried on seeds from 100 on; everything else is the trainer's default.
SETTINGS: dict[str, Any] = {"method": "grpo", "minibatches": 1, "epochs": 1, "steps": 240}
#: The optimizer is AdamW, as usual (with a momentum of 0.9); then the same without momentum.
VARIANTS: dict[str, dict[str, Any]] = {"adamw": SETTINGS, "no-momentum": {**SETTINGS, "adam_beta1": 0.0}}
QUICK: dict[str, Any] = {"steps": 40, "warm_steps": 200, "prompts_per_step": 16}
#: What a prompt has of each, by its accuracy.
BY_ACCURACY = ("group", "exact", "measured", "entropy")
BLOCK = 10  # steps


# --- what is measured -------------------------------------------------------------------------------------------------


def covariance(x: Tensor, y: Tensor) -> Tensor:
    """Of each row, in float64, divided by its length: (G, n), (G, n) -> (G,)."""
    x, y = x.double(), y.double()
    return ((x - x.mean(1, keepdim=True)) * (y - y.mean(1, keepdim=True))).mean(1)


def of_prompts(rollout: Rollout, after: Tensor, temperature: float) -> dict[str, Tensor]:
    """What each prompt of a rollout has, (G,) float64 each; `after` is the entropy after the update, (B, L).

    ``group`` and ``literal`` of its completions; ``exact``, ``measured`` and ``entropy`` as means over its tokens;
    ``accuracy``, the share of its completions with the full reward, and ``tokens``.
    """
    mask, (prompts, samples) = rollout.mask.double(), rollout.rewards.shape
    lengths = mask.sum(1)

    def of_tokens(values: Tensor) -> Tensor:
        sums = torch.where(rollout.mask, values.double(), 0.0).view(prompts, -1).sum(1)
        return sums / lengths.view(prompts, samples).sum(1)

    logprob = torch.where(rollout.mask, rollout.old_logprob.double(), 0.0).sum(1) / lengths
    logprob, advantage = logprob.view(prompts, samples), rollout.advantages[:, 0].double().view(prompts, samples)
    return {
        "accuracy": (rollout.rewards >= 1).double().mean(1),
        "tokens": lengths.view(prompts, samples).sum(1),
        "group": covariance(logprob, advantage),
        "literal": covariance(logprob, logprob.exp() * advantage),
        "exact": of_tokens(rollout.advantages.double() * rollout.vocab_covariance) / temperature**2,
        "measured": of_tokens(rollout.entropy.double() - after),
        "entropy": of_tokens(rollout.entropy),
    }


def of_batch(rollout: Rollout, prompts: Mapping[str, Tensor]) -> dict[str, float]:
    """The step's numbers: means over prompts of the paper's covariances, over tokens of everything else."""
    weights = prompts["tokens"] / prompts["tokens"].sum()
    tokens = (rollout.old_logprob[rollout.mask][None], rollout.advantages[rollout.mask][None])
    return {
        "entropy": mean_over(rollout.entropy, rollout.mask),
        "reward": float(rollout.rewards.mean()),
        "same": float((weights * prompts["measured"]).sum()),
        "group": float(prompts["group"].mean()),
        "literal": float(prompts["literal"].mean()),
        "batch": float(covariance(*tokens)),
        "exact": float((weights * prompts["exact"]).sum()),
    }


class Courses(Probe):
    """A row per step, and what the prompts have by their right answers: a (number of completions + 1,) tensor each."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []
        self.by_accuracy: list[dict[str, Tensor]] = []

    def after_rollout(self, step: Step) -> None:
        if step.last:
            self.rows.append({"entropy": mean_over(step.sampled.entropy, step.sampled.mask)})
        else:
            self._first = FirstOrder(step.policy, step.sampled, step.config)

    def after_step(self, step: Step) -> None:
        rollout, (update,) = step.sampled, step.updates
        prompts = of_prompts(rollout, entropy_now(step), step.config.temperature)
        kept = min(1.0, step.config.grad_clip / (update.grad_norm + 1e-6)) if step.config.grad_clip else 1.0
        row = of_batch(rollout, prompts)
        row |= {"gradient": -self._first.of_gradient() / kept, "first order": -self._first.change()}
        self.rows.append(row | {"grad_norm": update.grad_norm})
        self.by_accuracy.append(accuracy_sums(prompts, rollout.rewards.shape[1]))


def accuracy_sums(prompts: Mapping[str, Tensor], samples: int) -> dict[str, Tensor]:
    """``prompts`` (how many) and the sum of each quantity over the prompts with 0, 1, ... `samples` right answers."""
    right = (prompts["accuracy"] * samples).round().long()
    sums = {"prompts": torch.ones_like(prompts["accuracy"]), **{name: prompts[name] for name in BY_ACCURACY}}
    zero = torch.zeros(samples + 1, dtype=torch.float64)
    return {name: zero.index_add(0, right.cpu(), values.cpu()) for name, values in sums.items()}


def in_blocks(rows: Sequence[Mapping[str, Tensor]]) -> dict[str, list[list[float | None]]]:
    """The means over blocks of so many steps, blocks x accuracies; None where there was no such prompt."""
    blocks = [rows[start : start + BLOCK] for start in range(0, len(rows), BLOCK)]
    sums = {
        name: torch.stack([torch.stack([row[name] for row in block]).sum(0) for block in blocks]) for name in rows[0]
    }
    count = sums.pop("prompts")
    means = {name: (values / count).tolist() for name, values in sums.items()}
    short = {name: [[None if v != v else _short(v) for v in row] for row in table] for name, table in means.items()}
    return {"prompts": count.long().tolist(), **short}


def measure(variant: str, seed: int, changes: Mapping[str, Any]) -> dict[str, Any]:
    """A run from a supervised start of its own: columns over the steps, and blocks of steps by accuracy."""
    probe, started = Courses(), time.perf_counter()

    def tell(phase: str, done: int, total: int, row: Mapping[str, Any]) -> None:
        board.update(f"{variant}, seed {seed}, {phase}", done, total)

    with ProgressBoard() as board, tempfile.TemporaryDirectory() as folder:
        config = TrainerConfig(
            out=Path(folder) / "run", seed=seed, warm_seed=seed, tensorboard=False, save_every=0, **changes
        )
        train(config, probes=[probe], report=tell)
    entropy, rows = [row["entropy"] for row in probe.rows], probe.rows[:-1]
    columns = {name: [_short(row[name]) for row in rows] for name in rows[0]}
    columns["next"] = [_short(before - after) for before, after in itertools.pairwise(entropy)]
    return {
        "variant": variant,
        "seed": seed,
        "settings": dict(changes),
        "seconds": round(time.perf_counter() - started, 1),
        "machine": {name: value for name, value in describe(torch.device("cpu")).items() if name != "variables"},
        "columns": columns,
        "by_accuracy": in_blocks(probe.by_accuracy),
    }


def _short(value: float) -> float:
    return float(f"{value:.6g}")


def run(out: Path, variants: Mapping[str, Mapping[str, Any]], seeds: Sequence[int]) -> None:
    """What of the runs is not there yet, a file each; ValueError for a file of other settings."""
    for variant, changes in variants.items():
        for seed in seeds:
            path = out / f"{variant}-{seed}.json"
            if not path.exists():
                write(path, measure(variant, seed, changes))
            elif (found := json.loads(path.read_text())["settings"]) != changes:
                raise ValueError(
                    f"{path}: expected a run of {changes}, got one of {found}; move it away, or take --out"
                )


# --- what comes of it -------------------------------------------------------------------------------------------------

Run = Mapping[str, Any]

#: What is set against the measured change, and how it is called.
PREDICTORS = {
    "group": "paper: Cov of completions",
    "literal": "paper's Eq. 8, literal",
    "exact": "A·C of tokens, exact",
    "gradient": "plain gradient step",
    "first order": "first order of the step taken",
}
WINDOWS = (1, 5, 10, 20, 40)  # steps; both series are averaged, and only full windows count
COURSE = 20  # steps: window of the courses in the figure, of what is taken away, and of the comparison between seeds
AS_STEPS = "raw, as AdamW steps"
#: Columns of the table that the documentation shows.
SHORT = (
    "raw",
    f"mean of {COURSE}",
    f"another seed's, mean of {COURSE}",
    "raw, without course",
    f"{AS_STEPS}, without course",
)
EARLY = 60  # steps
#: What the columns of the tables are.
VIEWS = f"""*Mean of W*: of W neighbouring steps, both series; *first*: of the run's first steps. *Without course*:
less the mean of the {COURSE} steps around; what is left is from step to step. *As AdamW steps*: clipped with the
gradient, averaged by the first beta, over the root of the averaged squared gradient norm, as AdamW makes its step.
*Another seed's*: one run's quantity with the change of every other run, which is owed to the course that all runs
share. Settings were frozen before these seeds were run; the views without course and as AdamW steps were chosen after
looking at another seed (100) and at three of these."""
Interval = tuple[float, float, float]  # mean, lower and upper end


def column(run: Run, name: str) -> np.ndarray:
    return np.asarray(run["columns"][name], float)


def correlation(x: np.ndarray, y: np.ndarray, window: int = 1) -> float:
    """Of means of `window` neighbours; NaN where fewer than three are left."""
    if len(x) < window + 2:
        return float("nan")
    with np.errstate(invalid="ignore"):  # NaN where one of them never changes
        return float(np.corrcoef(window_means(x, window), window_means(y, window))[0, 1])


def without_course(values: np.ndarray) -> np.ndarray:
    """Less the mean of the COURSE steps around: what is left is from step to step."""
    near = np.ones(min(2 * (COURSE // 2) + 1, len(values)))
    return values - np.convolve(values, near, "same") / np.convolve(np.ones_like(values), near, "same")


def stepped(run: Run, name: str) -> np.ndarray:
    """A column as AdamW makes a step of gradients: clipped as they are, averaged by its first beta, over the root of
    the average of the squared gradient norm by its second; bias corrected. One number stands for all weights."""
    config = TrainerConfig(**run["settings"])
    norm = column(run, "grad_norm")
    kept = np.minimum(1.0, config.grad_clip / (norm + 1e-6)) if config.grad_clip else np.ones_like(norm)
    first = running_mean(column(run, name) * kept, config.adam_beta1)
    return first / np.sqrt(running_mean((norm * kept) ** 2, config.adam_beta2))


def running_mean(values: np.ndarray, beta: float) -> np.ndarray:
    """Exponential, without the bias of its start."""
    powers = np.tril(beta ** np.maximum(np.subtract.outer(np.arange(len(values)), np.arange(len(values))), 0))
    return np.asarray(powers @ values / powers.sum(1))


def interval(values: Sequence[float], *, fisher: bool = False) -> Interval:
    """Mean and 95 % t interval over the seeds; of correlations through Fisher's z = artanh r. NaN ends for one seed."""
    if not fisher:
        return t_interval(values)
    mean, low, high = t_interval(np.arctanh(np.clip(values, -1 + 1e-12, 1 - 1e-12)).tolist())
    return math.tanh(mean), math.tanh(low), math.tanh(high)


def correlations(runs: Sequence[Run], target: str, name: str) -> dict[str, list[float]]:
    """Those of a predictor with the measured change, a number per seed, by how it is looked at."""
    pairs = [(column(run, name), column(run, target)) for run in runs]
    found = {_view(w): [correlation(x, y, w) for x, y in pairs] for w in WINDOWS}
    found["raw, without course"] = [correlation(without_course(x), without_course(y)) for x, y in pairs]
    for w in (1, 10):
        found[f"{_view(w)}, first {EARLY}"] = [correlation(x[:EARLY], y[:EARLY], w) for x, y in pairs]
    if name in ("group", "literal", "exact", "gradient"):
        pairs = [(stepped(run, name), column(run, target)) for run in runs]
        found[AS_STEPS] = [correlation(x, y) for x, y in pairs]
        found[f"{AS_STEPS}, without course"] = [correlation(without_course(x), without_course(y)) for x, y in pairs]
    if len(runs) > 1:  # what is owed to a course that all runs share
        found[f"another seed's, mean of {COURSE}"] = with_others(runs, target, lambda run: column(run, name), COURSE)
        if AS_STEPS in found:
            found["another seed's, as AdamW steps"] = with_others(runs, target, lambda run: stepped(run, name))
    return found


def with_others(runs: Sequence[Run], target: str, of: Callable[[Run], np.ndarray], window: int = 1) -> list[float]:
    """Of each run: the mean correlation with the measured changes of all others."""
    return [
        float(np.mean([correlation(of(run), column(other, target), window) for other in runs if other is not run]))
        for run in runs
    ]


def differences(one: Mapping[str, list[float]], other: Mapping[str, list[float]]) -> dict[str, Interval]:
    """Of two predictors, seed by seed."""
    return {
        view: interval([a - b for a, b in zip(one[view], other[view], strict=True)]) for view in one if view in other
    }


def _view(window: int) -> str:
    return "raw" if window == 1 else f"mean of {window}"


def correlation_table(
    runs: Sequence[Run], target: str, predictors: Mapping[str, str], views: Sequence[str] | None = None
) -> str:
    """A line per predictor; `views` are columns, None for all."""
    found = {label: correlations(runs, target, name) for name, label in predictors.items()}
    views = list(found[PREDICTORS["exact"]]) if views is None else [v for v in views if v in found[PREDICTORS["exact"]]]
    rows = [
        [label, *(_interval(interval(mine[view], fisher=True)) if view in mine else "" for view in views)]
        for label, mine in found.items()
    ]
    if len(runs) > 1:
        gained = differences(found[PREDICTORS["exact"]], found[PREDICTORS["group"]])
        rows.append(["*A·C less paper's*", *(_interval(gained[view]) for view in views)])
    return markdown(["correlation with -ΔH", *views], rows)


def by_accuracy(run: Run, name: str) -> np.ndarray:
    """Of each number of right answers: the mean over blocks of steps of the means over its prompts. Blocks count alike:
    early and late, when right answers are rare and frequent."""
    table = np.array(run["by_accuracy"][name], float)
    with np.errstate(invalid="ignore"):  # NaN where there was no such prompt at all
        return np.asarray(np.nansum(table, axis=0) / np.sum(~np.isnan(table), axis=0))


def accuracy_table(runs: Sequence[Run]) -> str:
    samples = len(runs[0]["by_accuracy"]["prompts"][0]) - 1
    counts = np.array([np.sum(run["by_accuracy"]["prompts"], axis=0) for run in runs])
    shares = 100 * (counts / counts.sum(1, keepdims=True)).mean(0)
    names = {"group": "Cov of completions", "exact": "A·C", "measured": "measured -ΔH", "entropy": "entropy"}
    rows = []
    for right in range(samples + 1):
        values = [interval([by_accuracy(run, name)[right] for run in runs]) for name in names]
        cells = [_interval(v, 3 if name in ("group", "entropy") else 5) for name, v in zip(names, values, strict=True)]
        rows.append([f"{right} of {samples}", f"{shares[right]:.0f} %", *cells])
    return markdown(["right answers", "of all prompts", *names.values()], rows)


def report(runs: Mapping[str, Sequence[Run]]) -> str:
    """Markdown, from the runs of each variant."""
    first = next(iter(runs.values()))
    steps, seeds = len(first[0]["columns"]["same"]), len(first)
    apart = max(
        float(np.abs(column(run, "group") - column(run, "batch")).max() / np.abs(column(run, "group")).max())
        for run in first
    )
    parts = [
        "# Figure 8 on the embedded task\n\n"
        f"GRPO, one update per rollout, {steps} steps, {seeds} seeds with a supervised start each. Correlations "
        "are of one run's steps, then mean and 95 % t interval over seeds, through Fisher's z (differences: plain). "
        "What each quantity is stands in the head of `python -m benchmarks.figure8`, which makes this page.\n\n"
        "![courses, correlations, accuracy](figure8.png)\n\n"
        "In short, with AdamW as usual, on the rollout's own tokens:\n\n"
        f"{correlation_table(first, 'same', PREDICTORS, SHORT)}\n\n"
        f"The token-level covariance of the batch differs from the paper's by at most {apart:.1g} of its largest "
        "value, in six digits: all answers have one length, and advantages are centred in each group. Length "
        "normalisation is a constant factor.\n\n" + VIEWS
    ]
    beside = {**PREDICTORS, "same": "measured on the same tokens"}
    for variant, mine in runs.items():
        what = "AdamW as usual (momentum 0.9)" if variant == "adamw" else "AdamW without momentum (`adam_beta1` 0)"
        what += f", {len(mine)} seeds"
        own, between = (_interval(interval([column(run, name).sum() for run in mine])) for name in ("same", "next"))
        parts.append(
            f"## {what}: -ΔH on the rollout's own tokens\n\n{correlation_table(mine, 'same', PREDICTORS)}\n\n"
            f"All steps together take {own} nats from their own tokens; from first to last rollout it is {between}."
        )
        parts.append(f"## {what}: -ΔH from one rollout to the next\n\n{correlation_table(mine, 'next', beside)}")
    parts.append(
        "## By the accuracy of the prompt\n\n"
        f"AdamW as usual. Means over blocks of {BLOCK} steps that count alike, 95 % t intervals over the seeds. "
        "Prompts with no or only right answers have advantage 0: what they lose, other prompts' updates take.\n\n"
        + accuracy_table(first)
    )
    return "\n\n".join(parts) + "\n"


def _interval(value: Interval, digits: int = 2) -> str:
    mean, low, high = (0.0 if abs(v) < 0.5 * 10**-digits else v for v in value)
    if np.isnan(mean):
        return ""
    if digits == 2 and 0.95 < abs(mean) <= 1:
        digits = 3
    return f"{mean:.{digits}f}" + ("" if np.isnan(low) else f" [{low:.{digits}f}, {high:.{digits}f}]")


# --- the figure -------------------------------------------------------------------------------------------------------

_COLORS = {"same": style.INK, "group": "#0072b2", "literal": "#56b4e9", "exact": "#d55e00", "gradient": "#009e73",
           "first order": "#aa4499"}  # fmt: skip
_HARD_TO_EASY = ("#d55e00", "#b8860b", "#009e73")


def figure(runs: Sequence[Run]) -> Any:
    """Courses, correlations, and the paper's right half twice: as courses and over all accuracies."""
    fig, axes = style.figure(2, 2, (12.0, 8.6))
    _courses(axes[0, 0], runs)
    _correlations(axes[0, 1], runs)
    _accuracy_courses(axes[1, 0], runs)
    _accuracies(axes[1, 1], runs)
    return fig


def _band(ax: Any, x: np.ndarray, table: np.ndarray, color: str, label: str, **line: Any) -> None:
    """`table`: seeds x points; mean and 95 % t interval."""
    mean, low, high = np.array([interval(values) for values in table.T]).T
    ax.plot(x, mean, color=color, label=label, **{"linewidth": 1.9, **line})
    if len(table) > 1:
        ax.fill_between(x, low, high, color=color, alpha=0.13, linewidth=0)


def _courses(ax: Any, runs: Sequence[Run]) -> None:
    for name, label in (("same", "measured -ΔH"), ("group", PREDICTORS["group"]), ("exact", PREDICTORS["exact"])):
        table = np.array([window_means(column(run, name), min(COURSE, len(column(run, name)))) for run in runs])
        x = np.arange(table.shape[1]) + (COURSE - 1) / 2
        _band(ax, x, table / abs(table.mean()), _COLORS[name], label)
    ax.axhline(0, color=style.MUTED, linewidth=0.8)
    ax.set(xlabel="training step", ylabel="over its mean of all steps and seeds")
    style.title(
        ax, "Entropy decrease of a step, and covariances", f"means of {COURSE} steps; 95 % band over {len(runs)} seeds"
    )
    style.legend(ax)


def _correlations(ax: Any, runs: Sequence[Run]) -> None:
    windows = [_view(w) for w in WINDOWS]
    views = [*windows, "raw, without course", AS_STEPS, f"{AS_STEPS}, without course"]
    for i, (name, label) in enumerate(PREDICTORS.items()):
        found = correlations(runs, "same", name)
        shown = [view for view in views if view in found]
        mean, low, high = np.array([interval(found[view], fisher=True) for view in shown]).T
        x = np.array([views.index(view) for view in shown]) + 0.08 * (i - 2)
        ends = np.nan_to_num([mean - low, high - mean])
        ax.errorbar(
            x, mean, yerr=ends, color=_COLORS[name], fmt="o", markersize=4, capsize=2.5, linewidth=1.3, label=label
        )
        ax.plot(x[: len(windows)], mean[: len(windows)], color=_COLORS[name], linewidth=0.9, alpha=0.6)
    ax.axhline(0, color=style.MUTED, linewidth=0.8)
    ends_of = ("raw,\nwithout\ncourse", "as\nAdamW\nsteps", "as AdamW\nsteps, with-\nout course")
    ax.set_xticks(range(len(views)), ["raw", *(f"mean\nof {w}" for w in WINDOWS[1:]), *ends_of], fontsize=7.5)
    ax.set(ylabel="correlation over the steps of a run", xlim=(-0.5, len(views) - 0.4))
    style.title(ax, "Correlation with the measured -ΔH", "on the rollout's own tokens; 95 % intervals over seeds")
    style.legend(ax, loc="lower right")


def _accuracy_courses(ax: Any, runs: Sequence[Run]) -> None:
    samples = len(runs[0]["by_accuracy"]["prompts"][0]) - 1
    # 1, 4 and 7 of 8, as in the paper
    for right, color in zip((1, samples // 2, samples - 1), _HARD_TO_EASY, strict=True):
        table = np.array([np.array(run["by_accuracy"]["group"], float)[:, right] for run in runs])
        _band(ax, (np.arange(table.shape[1]) + 0.5) * BLOCK, table, color, f"{right} of {samples} right")
    ax.axhline(0, color=style.MUTED, linewidth=0.8)
    ax.set(xlabel="training step", ylabel="Cov(log p(y)/|y|, A) of a prompt")
    style.title(ax, "The paper's covariance by the prompt's accuracy", f"means of {BLOCK} steps; 95 % band over seeds")
    style.legend(ax)


def _accuracies(ax: Any, runs: Sequence[Run]) -> None:
    for i, (name, key, label) in enumerate(
        (
            ("measured", "same", "measured -ΔH"),
            ("group", "group", PREDICTORS["group"]),
            ("exact", "exact", PREDICTORS["exact"]),
        )
    ):
        table = np.array([by_accuracy(run, name) for run in runs])
        mean, low, high = np.array([interval(values) for values in table.T]).T / abs(np.nanmean(table))
        ax.errorbar(
            np.arange(len(mean)) + 0.1 * (i - 1), mean, yerr=np.nan_to_num([mean - low, high - mean]), label=label,
            color=_COLORS[key], fmt="o-", markersize=4, capsize=2.5, linewidth=1.3,
        )  # fmt: skip
    ax.axhline(0, color=style.MUTED, linewidth=0.8)
    ax.set(xlabel=f"right answers of {table.shape[1] - 1}", ylabel="over its mean of all accuracies")
    style.title(ax, "By the prompt's accuracy", "none and all right: advantage 0; 95 % intervals over seeds")
    style.legend(ax)


# --- the command ------------------------------------------------------------------------------------------------------


def load(out: Path) -> dict[str, list[dict[str, Any]]]:
    """The runs that are there, by variant, in the order of the seeds."""
    found = {
        variant: sorted(
            (json.loads(path.read_text()) for path in out.glob(f"{variant}-*.json")), key=lambda run: int(run["seed"])
        )
        for variant in VARIANTS
    }
    return {variant: runs for variant, runs in found.items() if runs}


def write_report(out: Path) -> None:
    runs = load(out)
    if not runs:
        raise ValueError(f"{out}: expected runs, got none; run without --report first")
    write_text(out / "figure8.md", report(runs))
    save(figure(next(iter(runs.values()))), out / "figure8.png")
    print(f"{out / 'figure8.md'}")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="figure8", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="two short runs, seeds 100 and 101")
    parser.add_argument("--report", action="store_true", help="from the runs that are there; nothing is run")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/figure8, with --quick runs/figure8-quick")
    given = parser.parse_args(argv)
    out = given.out or (ROOT / "runs" / "figure8-quick" if given.quick else OUT)
    if not given.report:
        quick = {variant: {**changes, **QUICK} for variant, changes in VARIANTS.items()}
        run(out, quick if given.quick else VARIANTS, (100, 101) if given.quick else SEEDS)
    write_report(out)


if __name__ == "__main__":
    main()

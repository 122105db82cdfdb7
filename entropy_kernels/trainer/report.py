"""The report of a set of runs: one self-contained HTML page, with its figures as PNG files beside it."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from entropy_kernels._machine import cpu_name, gpu_name, usable_cores
from entropy_kernels.analysis import plots
from entropy_kernels.analysis.plot_style import method_style
from entropy_kernels.trainer.config import TrainerConfig
from entropy_kernels.trainer.files import OwnFiles, write_bytes, write_json, write_text
from entropy_kernels.trainer.metrics_log import COVARIANCE_COLUMNS
from entropy_kernels.trainer.policy import resolve_device
from entropy_kernels.trainer.ppo import versions
from entropy_kernels.trainer.report_template import TEMPLATE
from entropy_kernels.trainer.report_text import (
    COSTS,
    WALK,
    beside,
    change_lines,
    cost_rows,
    end_rows,
    heading,
    html_table,
    law_lines,
    limits,
    markdown,
    memory_line,
)
from entropy_kernels.trainer.summary import agreement, criteria, over_seeds

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

Runs = Mapping[str, Sequence["DataFrame"]]

FIGURES = ("entropy", "performance", "law", "entropy_change", "covariance")
#: What :func:`write_report` writes.
REPORT_FILES = ("report.html", "summary.json", *(f"{name}.png" for name in FIGURES))

#: Columns of the small per-run logs that are worth keeping under version control.
KEPT_COLUMNS = (
    "step",
    "entropy",
    "reward",
    "tokens",
    "val_pass1",
    "val_pass8",
    "val_distinct",
    "final_pass1",
    "final_pass8",
    "final_pass32",
    "final_distinct",
    "cov_mean",
    "tokens_in_band",
    "tokens_dropped",
    "tokens_penalized",
    "clipfrac",
    "ppo_kl_abs",
    "predicted_dh",
    "measured_dh",
    "first_order_dh",
    "first_update_dh",
    "small_update_dh",
    "first_order_step_dh",
)


def write_report(
    out: Path,
    runs: Runs,
    *,
    base: TrainerConfig,
    experiment: Mapping[str, Sequence[float]],
    command: str,
    seeds: Sequence[int],
    seconds: float,
    workers: int,
    title: str,
) -> Path:
    """Write report.html, its PNGs and summary.json into `out`; returns the path of the page.

    Parameters
    ----------
    out : Path
    runs : mapping
        Method to logs, one DataFrame per seed. ``grpo`` must be among them.
    base : TrainerConfig
        What the runs have in common.
    experiment : mapping
        ``predicted`` and ``measured`` of the experiment with logits as parameters.
    command : str
        What made the runs.
    seeds : sequence of int
    seconds : float
        Wall time of everything.
    workers : int
        Runs at the same time.
    title : str
    """
    if "grpo" not in runs:
        raise ValueError(f"runs: expected the baseline 'grpo' among them, got {', '.join(runs)}")
    try:
        import jinja2
    except ImportError as error:
        raise ImportError("the report needs jinja2: pip install 'entropy_kernels[train]'") from error
    OwnFiles(out).claim(*REPORT_FILES)
    summary = over_seeds(runs)
    walk = base.task == "walk"
    checks = criteria(summary, experiment, walk=walk)
    figures = draw(runs, experiment)
    pictures = {}
    for name, figure in figures.items():
        data = plots.png(figure)
        write_bytes(out / f"{name}.png", data)
        pictures[name] = "data:image/png;base64," + base64.b64encode(data).decode("ascii")
    fit = agreement(experiment["predicted"], experiment["measured"])
    record = {
        "command": command,
        "task": base.task,
        "model": base.model,
        "hardware": hardware_line(base),
        "seeds": list(seeds),
        "seconds": round(seconds, 1),
        "workers": workers,
        "versions": versions(),
        "criteria": checks,
        "logits_as_parameters": fit,
        "limits": limits(summary, base),
        "methods": summary,
    }
    write_json(out / "summary.json", record)
    page = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(TEMPLATE)
    text = page.render(
        title=title,
        record=record,
        minutes=f"{seconds / 60:.1f}",
        about=WALK if walk else f"{base.model} learns {base.task} by PPO. Its verifier gives the reward.",
        walk=walk,
        pictures=pictures,
        end_table=html_table(*end_rows(summary)),
        costs=COSTS + beside(workers),
        cost_table=html_table(*cost_rows(summary)),
        memory=memory_line(summary),
        covariance_table=plots.html_table(
            plots.covariance_table(runs, dict(COVARIANCE_COLUMNS)),
            caption="Mean covariance of the top tokens at the first step",
        ),
        laws=law_lines(summary),
        changes=change_lines(summary, fit),
    )
    write_text(out / "report.html", text)
    return out / "report.html"


def hardware_line(base: TrainerConfig) -> str:
    """The GPU that runs of this configuration use, else the processor."""
    device = resolve_device(base.device)
    if device.type == "cuda":
        return gpu_name(device.index or 0)
    return f"{cpu_name()}, {usable_cores()} cores, {base.threads} thread{'s' if base.threads > 1 else ''} a run"


def kept_files(picture: str, names: Iterable[str]) -> tuple[str, ...]:
    """What :func:`write_kept` writes."""
    return "report.md", picture, *(f"csv/{name}.csv" for name in names)


def write_kept(out: Path, runs: Runs, *, names: Mapping[str, DataFrame], picture: str) -> None:
    """What of a report is worth keeping under version control: report.md, one picture, the small columns as csv/.

    `names`: file name to log. summary.json and the figures are there already.
    """
    OwnFiles(out).claim(*kept_files(picture, names))
    record = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    columns = {"entropy": "policy entropy (nats)", "val_pass1": "pass@1", "val_pass8": "pass@8"}
    title = heading(record)
    write_bytes(out / picture, plots.png(plots.performance_figure(dict(runs), columns=columns, title=title), dpi=110))
    write_text(out / "report.md", markdown(record, picture=picture))
    for name, log in names.items():
        small = log[[column for column in KEPT_COLUMNS if column in log]]
        write_text(out / "csv" / f"{name}.csv", small.to_csv(index=False, float_format="%.5g"))


def draw(runs: Runs, experiment: Mapping[str, Sequence[float]]) -> dict[str, Figure]:
    """All figures of the report, by the name of their file."""
    import pandas as pd

    one = {name: list(logs) for name, logs in runs.items()}
    panels: dict[str, Any] = {"logits as parameters": (experiment["predicted"], experiment["measured"])}
    base = pd.concat(one["grpo"])
    if {"predicted_dh", "measured_dh"} <= set(base.columns):
        panels["baseline: logits-level prediction (unit step)"] = base
    if {"first_order_dh", "first_update_dh"} <= set(base.columns):
        pairs = base[["first_order_dh", "first_update_dh"]].dropna()
        panels["baseline: the network's first order"] = (pairs["first_order_dh"], pairs["first_update_dh"])
    main = {name: logs for name, logs in one.items() if not method_style(name).control}
    return {
        "entropy": plots.entropy_figure(one),
        "performance": plots.performance_figure(one),
        "law": plots.law_figure(main),
        "entropy_change": plots.entropy_change_figure(panels),
        "covariance": plots.covariance_figure(plots.covariance_table(main, dict(COVARIANCE_COLUMNS))),
    }

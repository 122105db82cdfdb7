"""The report of a set of runs: one self-contained HTML page, the same as Markdown, and their figures.

Read :func:`write_report` first; then report_numbers.py (end values, courses, claims), report_text.py (the verdict,
tables and sentences on them) and report_page.py (HTML and Markdown).
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from entropy_kernels._machine import cpu_name, gpu_name, usable_cores
from entropy_kernels.analysis import plots
from entropy_kernels.trainer.config import TrainerConfig
from entropy_kernels.trainer.files import OwnFiles, write_bytes, write_json, write_text
from entropy_kernels.trainer.log import COVARIANCE_COLUMNS
from entropy_kernels.trainer.methods import BASELINE
from entropy_kernels.trainer.report_numbers import Logs, agreement, courses, criteria, over_seeds
from entropy_kernels.trainer.report_page import PHONE, markdown, page
from entropy_kernels.trainer.report_text import CURVES, PICTURES, Table, is_beside, label, limits
from entropy_kernels.trainer.start import resolve_device, versions

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

#: Columns of the logs that are worth keeping under version control, as csv/.
KEPT_COLUMNS = (
    *("step", "entropy", "reward", "groups_mixed", "tokens", "length_mean", "truncated"),
    *("val_pass1", "val_pass8", "val_distinct"),
    *("final_pass1", "final_pass8", "final_pass32", "final_distinct", "cov_mean", "tokens_in_band"),
    *("target_entropy", "wanted_dh", "planned_dh", "target_gain", "target_saturated"),
    *("tokens_dropped", "tokens_penalized", "tokens_touched", "decrease_share", "clipfrac", "ppo_kl_abs"),
    *("predicted_dh", "control_dh", "free_dh", "measured_dh"),
    *("first_order_dh", "first_update_dh", "small_update_dh", "first_order_step_dh"),
)


def report_names(picture: str, names: Iterable[str]) -> list[str]:
    """The files that :func:`write_report` writes, with the logs `names` kept."""
    return [
        *("report.html", "report.md", "summary.json", picture),
        *(f"{shown.name}.png" for shown in PICTURES if shown != CURVES),
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
        "courses": courses(runs),
        "covariance": covariance(runs),
        "methods": summary,
    }
    write_json(out / "summary.json", record)
    shown = {}
    for drawn in PICTURES:
        wide = plots.png(draw(drawn.name, runs, experiment))
        narrow = plots.png(draw(drawn.name, runs, experiment, narrow=True), dpi=200)  # phones have three pixels in one
        write_bytes(out / (picture if drawn == CURVES else f"{drawn.name}.png"), wide)
        shown[drawn.name] = (
            f'<picture><source media="(max-width: {PHONE}px)" srcset="{_inline(narrow)}">'
            f'<img alt="{drawn.about}" src="{_inline(wide)}"></picture>'
        )
    write_text(out / "report.html", page(record, title=title, shown=shown))
    write_text(out / "report.md", markdown(record, picture=picture))
    for name, log in kept.items():
        small = log[[column for column in KEPT_COLUMNS if column in log]]
        write_text(out / "csv" / f"{name}.csv", small.to_csv(index=False, float_format="%.5g"))
    return record


def _inline(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}"


def covariance(runs: Logs) -> Table:
    """Mean covariance of the top tokens at the first step, the same for all methods; and the paper's."""
    found = plots.covariance_table({label(BASELINE): list(runs[BASELINE])}, dict(COVARIANCE_COLUMNS))
    rows = [[str(run), *(f"{value:.3f}" for value in values)] for run, *values in found.itertuples()]
    return {"head": [found.columns.name, *found.columns], "rows": rows}


def draw(name: str, runs: Logs, experiment: Mapping[str, Sequence[float]], *, narrow: bool = False) -> Figure:
    """A picture of the page by its name, for a wide or a narrow screen."""
    import pandas as pd

    labelled = {label(run): list(logs) for run, logs in runs.items()}
    if name == "curves":
        columns = {"entropy": "policy entropy (nats)", "val_pass1": "pass@1", "val_pass8": "pass@8"}
        return plots.performance_figure(labelled, columns=columns, title="", narrow=narrow)
    if name == "law":
        main = {label(run): labelled[label(run)] for run in runs if not is_beside(run)}
        return plots.law_figure(main, narrow=narrow)
    first = label(BASELINE)
    panels: dict[str, Any] = {"logits as parameters": (experiment["predicted"], experiment["measured"])}
    base, unit_step = pd.concat(labelled[first]), f"{first}: logits-level prediction (unit step)"
    if {"predicted_dh", "measured_dh"} <= set(base.columns):
        panels[unit_step] = base
    if {"first_order_dh", "first_update_dh"} <= set(base.columns):
        pairs = base[["first_order_dh", "first_update_dh"]].dropna()
        panels[f"{first}: the network's first order"] = (pairs["first_order_dh"], pairs["first_update_dh"])
    return plots.entropy_change_figure(panels, scaleless={unit_step} & {*panels}, narrow=narrow)

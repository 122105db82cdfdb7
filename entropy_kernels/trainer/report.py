"""The report of a set of runs: one self-contained HTML page, with its figures as PNG files beside it."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from entropy_kernels.analysis import plots
from entropy_kernels.analysis.plot_style import method_style
from entropy_kernels.trainer.checkpoint import write_bytes, write_json, write_text
from entropy_kernels.trainer.metrics_log import COVARIANCE_COLUMNS
from entropy_kernels.trainer.ppo import versions
from entropy_kernels.trainer.progress import describe_memory
from entropy_kernels.trainer.report_template import TEMPLATE
from entropy_kernels.trainer.summary import agreement, criteria, over_seeds

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

Runs = Mapping[str, Sequence["DataFrame"]]

#: Columns of the table of end values: name in the summary, head, decimals.
END_COLUMNS = (
    ("entropy_start", "H start", 3),
    ("entropy_end", "H end", 3),
    ("entropy_fall", "fall", 2),
    ("final_pass1", "pass@1", 3),
    ("final_pass8", "pass@8", 3),
    ("final_pass32", "pass@32", 3),
    ("final_distinct", "distinct right", 2),
    ("law_r2", "law R²", 3),
    ("line_r2", "line R²", 3),
    ("law_rmse", "law RMSE", 3),
    ("tokens_per_s", "tokens/s", 0),
    ("ops_share", "share of ops", 2),
)


def write_report(
    out: Path,
    runs: Runs,
    *,
    experiment: Mapping[str, Sequence[float]],
    command: str,
    seeds: Sequence[int],
    seconds: float,
    title: str,
) -> Path:
    """Write report.html, its PNGs and summary.json into `out`; returns the path of the page.

    Parameters
    ----------
    out : Path
    runs : mapping
        Method to logs, one DataFrame per seed. ``grpo`` must be among them.
    experiment : mapping
        ``predicted`` and ``measured`` of the experiment with logits as parameters.
    command : str
        What made the runs.
    seeds : sequence of int
    seconds : float
        Wall time of everything.
    title : str
    """
    if "grpo" not in runs:
        raise ValueError(f"runs: expected the baseline 'grpo' among them, got {', '.join(runs)}")
    try:
        import jinja2
    except ImportError as error:
        raise ImportError("the report needs jinja2: pip install 'entropy_kernels[train]'") from error
    out.mkdir(parents=True, exist_ok=True)
    summary = over_seeds(runs)
    checks = criteria(summary, experiment)
    figures = draw(runs, experiment)
    pictures = {}
    for name, figure in figures.items():
        data = plots.png(figure)
        write_bytes(out / f"{name}.png", data)
        pictures[name] = "data:image/png;base64," + base64.b64encode(data).decode("ascii")
    fit = agreement(experiment["predicted"], experiment["measured"])
    record = {
        "command": command,
        "seeds": list(seeds),
        "seconds": round(seconds, 1),
        "versions": versions(),
        "criteria": checks,
        "logits_as_parameters": fit,
        "methods": summary,
    }
    write_json(out / "summary.json", record)
    page = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(TEMPLATE)
    text = page.render(
        title=title,
        record=record,
        minutes=f"{seconds / 60:.1f}",
        pictures=pictures,
        end_table=end_table(summary),
        memory=memory_line(summary),
        covariance_table=plots.html_table(
            plots.covariance_table(runs, dict(COVARIANCE_COLUMNS)),
            caption="Mean covariance of the top tokens at the first step",
        ),
        laws=law_lines(summary),
        changes=change_lines(summary, fit),
        limits=limits(summary),
    )
    write_text(out / "report.html", text)
    return out / "report.html"


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


def cell(entry: Mapping[str, Any], decimals: int) -> str:
    """Mean, with the standard deviation over seeds where there is one."""
    text = f"{entry['mean']:.{decimals}f}"
    return f"{text} ± {entry['sd']:.{decimals}f}" if len(entry["seeds"]) > 1 else text


def end_rows(summary: Mapping[str, Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table of end values, as text."""
    columns = [column for column in END_COLUMNS if any(column[0] in values for values in summary.values())]
    rows = [
        [method_style(method).label, *(cell(values[name], n) if name in values else "–" for name, _, n in columns)]
        for method, values in summary.items()
    ]
    return ["", *(head for _, head, _ in columns)], rows


def end_table(summary: Mapping[str, Mapping[str, Any]]) -> str:
    """The table of end values as HTML."""
    head, rows = end_rows(summary)
    cells = "".join(f"<th scope='col'>{html.escape(text)}</th>" for text in head)
    body = "".join(
        f"<tr><th scope='row'>{html.escape(row[0])}</th>"
        + "".join(f"<td>{html.escape(c)}</td>" for c in row[1:])
        + "</tr>"
        for row in rows
    )
    return f"<table class='data'><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table>"


def law_lines(summary: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """One sentence per method on the law beside the straight line, and on the law of the first third."""
    return [
        f"{method_style(method).label}: R = -({v['law_a']['mean']:.4f}) e^H + {v['law_b']['mean']:.4f}, "
        f"R² {v['law_r2']['mean']:.3f}, RMSE {v['law_rmse']['mean']:.4f}, ceiling {v['law_ceiling']['mean']:.3f}; "
        f"straight line in H: R² {v['line_r2']['mean']:.3f}, RMSE {v['line_rmse']['mean']:.4f}. "
        "Fitted on the first third of the validations, the law is off by "
        f"{v['third_final_error']['mean']:+.3f} at the last one."
        for method, v in summary.items()
        if "law_a" in v
    ]


def memory_line(summary: Mapping[str, Mapping[str, Any]]) -> str | None:
    """The baseline's peak memory with either head; None if it was not measured."""
    values = summary["grpo"]
    return describe_memory(
        {
            f"memory/{head}": values[f"memory_{head}"]["mean"]
            for head in ("linear", "logits")
            if f"memory_{head}" in values
        }
    )


def change_lines(summary: Mapping[str, Mapping[str, Any]], experiment: Mapping[str, float]) -> list[str]:
    """What the three comparisons of the entropy change gave."""
    lines = ["Logits as parameters: no token had an advantage."]
    if experiment:
        lines = [
            f"Logits as parameters: correlation {experiment['correlation']:.6f}, slope {experiment['slope']:.5f}, "
            f"{experiment['n']} tokens, step 1e-3."
        ]
    for method, v in summary.items():
        label = method_style(method).label
        if "logits_correlation" in v:
            lines.append(
                f"{label}, logits-level prediction against the measured change of a rollout: correlation "
                f"{v['logits_correlation']['mean']:.2f}, same sign {v['logits_same_sign']['mean']:.0%}."
            )
        if "network_correlation" in v:
            lines.append(
                f"{label}, the network's own first order against the measured change of one update: correlation "
                f"{v['network_correlation']['mean']:.4f}, slope {v['network_slope']['mean']:.3f}."
            )
        if "network_small_correlation" in v:
            lines[-1] += (
                f" Over a tenth of that update: {v['network_small_correlation']['mean']:.5f}, slope "
                f"{v['network_small_slope']['mean']:.3f}."
            )
        if "network_step_correlation" in v:
            lines[-1] += (
                f" Over all updates of a rollout: {v['network_step_correlation']['mean']:.4f}, slope "
                f"{v['network_step_slope']['mean']:.3f}."
            )
    return lines


def limits(summary: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What does not show at this scale, with the figures of these very runs."""
    lines = []
    base = summary["grpo"]
    for method, label in (("clip_cov", "Clip-Cov"), ("kl_cov", "KL-Cov")):
        if method in summary and "final_pass1" in summary[method]:
            gap = summary[method]["final_pass1"]["mean"] - base["final_pass1"]["mean"]
            noise = max(summary[method]["final_pass1"]["sd"] or 0.0, base["final_pass1"]["sd"] or 0.0)
            seeds = f"the seeds spread by {noise:.3f}" if noise else "seeds spread by .01 to .03, and this is one"
            lines.append(
                f"pass@1: {label} ends {gap:+.3f} from the baseline; {seeds}. "
                "The gain that shows here is in pass@k and diversity."
            )
    if "law_r2" in base:
        lines.append(
            f"The shape of the law: on the baseline e^H explains {base['law_r2']['mean']:.3f} of the variance and a "
            f"straight line in H {base['line_r2']['mean']:.3f}. Over this range of entropies the data do not choose "
            "between them."
        )
    if "logits_correlation" in base:
        lines.append(
            "The logits-level prediction through the network is a trend (baseline: correlation "
            f"{base['logits_correlation']['mean']:.2f}): weights are shared between tokens, "
            "and AdamW rescales every weight's step."
        )
    lines.append(
        "The paper's fractions: 2e-4 and 2e-3 of a minibatch of 896 tokens are 0.2 and 1.8 tokens. The defaults here "
        "are 150 (Clip-Cov) and 35 (KL-Cov) times larger."
    )
    return lines

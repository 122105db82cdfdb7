"""What the reports say: tables and sentences, made of a summary."""

from __future__ import annotations

import dataclasses
import html
from collections.abc import Mapping, Sequence
from typing import Any

from entropy_kernels.analysis.plot_style import method_style
from entropy_kernels.trainer.config import HEADS, TrainerConfig
from entropy_kernels.trainer.progress import describe_memory

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

COSTS = (
    "Seconds, medians over the steps. Measure: what the entropy change of a step is measured with. Statistics and "
    "losses: in all parts of the step, forward and backward, from hidden states with the head's matrix products."
)
#: What a step costs: name in the summary, head, divisor, decimals.
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

WALK = (
    "A small Llama learns by PPO to walk from one number to another in four arithmetic moves. An exact verifier pays 1 "
    "for a right walk and nothing else, and every prompt has many right walks."
)


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


def cost_rows(summary: Mapping[str, Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table of what a step costs, as text: medians over the steps."""
    columns = [column for column in COST_COLUMNS if any(column[0] in values for values in summary.values())]
    rows = [
        [
            method_style(method).label,
            *(f"{values[name]['mean'] / by:.{n}f}" if name in values else "–" for name, _, by, n in columns),
        ]
        for method, values in summary.items()
    ]
    return ["", *(head for _, head, _, _ in columns)], rows


def html_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table as HTML; the first column names the rows."""
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
        {f"memory/{head}": values[f"memory_{head}"]["mean"] for head in HEADS if f"memory_{head}" in values}
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


def limits(summary: Mapping[str, Mapping[str, Any]], base: TrainerConfig) -> list[str]:
    """What does not show at this scale, with the figures of these very runs."""
    lines = []
    first = summary["grpo"]
    for method, label in (("clip_cov", "Clip-Cov"), ("kl_cov", "KL-Cov")):
        if method in summary and "final_pass1" in summary[method]:
            gap = summary[method]["final_pass1"]["mean"] - first["final_pass1"]["mean"]
            noise = max(summary[method]["final_pass1"]["sd"] or 0.0, first["final_pass1"]["sd"] or 0.0)
            walk = base.task == "walk"
            one = "seeds spread by .01 to .03, and this is one" if walk else "this is one seed"
            seeds = f"the seeds spread by {noise:.3f}" if noise else one
            shows = " The gain that shows here is in pass@k and diversity." if walk else ""
            lines.append(f"pass@1: {label} ends {gap:+.3f} from the baseline; {seeds}.{shows}")
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
        ratios = {m: dataclasses.replace(base, method=m).selection_ratio for m in ("clip_cov", "kl_cov")}
        lines.append(
            f"The paper's fractions: 2e-4 and 2e-3 of a minibatch of {tokens:.0f} tokens are {2e-4 * tokens:.1f} and "
            f"{2e-3 * tokens:.1f} tokens. Those of these runs are {ratios['clip_cov'] / 2e-4:.0f} (Clip-Cov) and "
            f"{ratios['kl_cov'] / 2e-3:.0f} (KL-Cov) times larger."
        )
    return lines


def markdown(record: Mapping[str, Any], *, picture: str) -> str:
    """The report as Markdown: criteria, end values, costs, the law, entropy changes, what does not show."""
    summary = record["methods"]
    memory = memory_line(summary)
    checks = [[c["claim"], c["figure"], "holds" if c["holds"] else "**does not hold**"] for c in record["criteria"]]
    versions = ", ".join(f"{name} {value}" for name, value in record["versions"].items())
    seeds = len(record["seeds"])
    minutes = f"{record['seconds'] / 60:.0f} minutes{again(record)}"
    return "\n".join(
        [
            f"# {heading(record)}, {seeds} seed{'s' if seeds > 1 else ''}",
            "",
            f"`{record['command']}` took {minutes} on {record['hardware']} ({versions}).",
            "",
            f"![entropy, pass@1 and pass@8 over training steps]({picture})",
            "",
            "## Criteria",
            "",
            *markdown_table(["claim", "measured", ""], checks),
            "",
            "## End values" + (", mean ± standard deviation over seeds" if seeds > 1 else ""),
            "",
            *markdown_table(*end_rows(summary)),
            "",
            "## What a step costs",
            "",
            COSTS + beside(record["workers"]),
            "",
            *markdown_table(*cost_rows(summary)),
            "",
            *([memory, ""] if memory else []),
            "## The law",
            "",
            *(f"- {line}" for line in law_lines(summary)),
            "",
            "## Entropy change, measured against predicted",
            "",
            *(f"- {line}" for line in change_lines(summary, record["logits_as_parameters"])),
            "",
            "## What does not show at this scale",
            "",
            *(f"- {line}" for line in record["limits"]),
            "",
        ]
    )


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Its lines."""
    return ["| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows]]


def again(record: Mapping[str, Any]) -> str:
    """That an earlier call did a part of the work."""
    return " this time" if "--reuse" in record["command"].split() else ""


def beside(workers: int) -> str:
    """What the times are to be read with."""
    return f" {workers} runs at the same time." if workers > 1 else ""


def heading(record: Mapping[str, Any]) -> str:
    """What was trained, in a few words."""
    if record["task"] != "walk":
        return f"{record['model']} on {record['task']}"
    controls = any(method.startswith("random") for method in record["methods"])
    return "Walk, with random-token controls" if controls else "Walk"

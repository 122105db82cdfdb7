"""What a report says: the verdict, the tables, and the sentences on them, all from what summary.json holds.

Read :func:`sections` first, the order of everything; then :func:`verdict`, :func:`look` and :func:`lines`, with which a
report opens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from entropy_kernels.analysis.plot_style import method_style
from entropy_kernels.trainer.config import TrainerConfig
from entropy_kernels.trainer.methods import BASELINE, METHODS, PAPER, TARGET_ROW, TARGET_RUN, TARGETS, Method
from entropy_kernels.trainer.report_numbers import (
    END_ROLLOUTS,
    HELD,
    ONE_SEED_NOISE,
    SAME_MACHINE,
    Summary,
    beside_baseline,
    difference,
    disturbance,
    entropy_ratio,
    slowdown,
)

#: At the end of a run's name: the method under head = torch.
TORCH_OPS = "_torch_ops"
#: A run's entropy is called more or less than the baseline's from this ratio on.
ENTROPY_RATIO = 1.2
#: Two R² nearer to each other do not choose a curve; a smaller correlation is called a trend.
SAME_R2, TREND = 0.1, 0.9
#: Metrics of the validation that a verdict is about: name in the summary -> what it is called, decimals.
JUDGED = {"pass1": ("pass@1", 3), "pass8": ("pass@8", 3), "distinct": ("distinct right", 2)}

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
    ("ops_share", "their share", 1, 2),
    ("memory_peak", "GPU peak, GB", 1e9, 2),
)
#: The law, and the straight line, on all validations; that of the first third judged at the last.
LAW_COLUMNS = (
    ("law_a", "a", 1, 3),
    ("law_b", "b", 1, 3),
    ("law_ceiling", "ceiling b - a", 1, 3),
    ("law_r2", "law R²", 1, 3),
    ("line_r2", "line R²", 1, 3),
    ("law_rmse", "law RMSE", 1, 4),
    ("line_rmse", "line RMSE", 1, 4),
    ("third_final_error", "first third's law, error at the end", 1, 3),
)
#: Entropy changes: what is predicted against what is measured.
CHANGE_COLUMNS = (
    ("logits_correlation", "logits level, a rollout: correlation", 1, 2),
    ("logits_same_sign", "same sign, %", 0.01, 0),
    ("network_correlation", "network's first order, an update: correlation", 1, 4),
    ("network_slope", "slope", 1, 3),
    ("network_small_correlation", "a tenth of it: correlation", 1, 5),
    ("network_small_slope", "slope", 1, 3),
    ("network_step_correlation", "a rollout: correlation", 1, 4),
    ("network_step_slope", "slope", 1, 3),
)
#: What a micro-batch holds at once, by head.
MEMORY_COLUMNS = (
    ("memory_linear", "linear, MB", 1e6, 1),
    ("memory_logits", "logits, MB", 1e6, 1),
    ("memory_torch", "torch, MB", 1e6, 1),
)
#: Effect of a method -> what it does to tokens, in a sentence.
TREATMENTS = {
    "dropped": "lose their gradient", "detached": "lose their gradient", "penalized": "get a penalty",
    "token_weight": "are weighted", "advantages": "get another advantage", "entropy_coef": "get an entropy bonus",
}  # fmt: skip
COSTS = (
    "Seconds, medians over the steps. Measure: what the entropy change of a step is measured with. Statistics and "
    "losses: in all parts of the step, forward and backward, by default from hidden states with the head's matrix "
    "products; their share is that of the step's time."
)
WALK = (
    "A small Llama learns by PPO to walk from one number to another in four arithmetic moves. An exact verifier pays 1 "
    "for a right walk and nothing else, and every prompt has many right walks."
)
ENDS = (
    "H: policy entropy in nats per token, mean of the last rollouts. pass@k: chance that one of k samples is right, "
    "on held-out prompts, unbiased, in a larger validation at the end than those of the curves. Distinct right: "
    "different right answers among the samples of a prompt."
)
TOUCHED = (
    "Means over the steps. Touched: dropped, penalised, weighted, or given another advantage. Share of the decrease: "
    "what these tokens carry of what the step is predicted to take from the entropy, to first order. The prediction is "
    "for a step of the learning rate times the loss's gradient in logits that are free; AdamW's steps are far larger, "
    "so only its sign and its course can be compared with the measured change."
)
HEADS_NOTE = (
    "Peak memory of a micro-batch's forward, loss and backward under each head. Linear: from hidden states; logits: "
    "materialised; torch: materialised, and torch's own operations. Weights and optimizer state are not counted."
)
LAW = (
    "R: pass@1 of the validations on the way; line: a straight line in H on the same points. The first third's law is "
    "fitted on the first third of the validations and told by how much it is off at the last one."
)
CAUSE = (
    "The account of arXiv 2505.22617, which Clip-Cov and KL-Cov come from: a policy spends its entropy early, and the "
    "tokens that spend it are few, those whose log-probability and advantage are both high. Taking their gradient, or "
    "holding them back, keeps the entropy; as many random tokens should not."
)
WHY = (
    "Why they differ. The theory takes each row of logits as its own parameter: there, for a small step, prediction "
    "and measurement agree to rounding and curvature. In a network a step for one token moves the logits of all "
    "others, and AdamW rescales the step of every weight, so a sum of per-token predictions keeps the direction and "
    "loses the size; it is for a unit step, so only correlation and sign mean something. The gradient of the entropy "
    "in the weights, times the change of the weights in one update, contains all of this and is exact to first order. "
    "Over all updates of a rollout curvature adds up."
)
ONE_SEED = (
    "The claims are stated for three seeds, make reproduce-toy: those on pass@8 need them and are left out, and one "
    "seed may miss another (where twice the baseline's entropy is claimed, single seeds were seen to end with 1.8 to "
    "2.1 times)."
)
NEVER_RIGHT = (
    "At the end no answer was right in any run, so there was nothing to learn from: the supervised start is too short "
    "(--warm-steps), or the task too hard for the model."
)
COVARIANCE = "Mean covariance of the tokens of largest covariance at the first step, where all runs are alike."


# --- what a report opens with -----------------------------------------------------------------------------------------


def joined(names: Sequence[str]) -> str:
    """As words: a, b and c."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def more_entropy(summary: Summary, run: str) -> int:
    """Whether a run ends with more entropy than the baseline (1), with less (-1), or with about as much (0)."""
    gap, noise = difference(*(summary[name]["entropy_end"] for name in (run, BASELINE)))
    told = abs(gap) > (noise or 0.0) and not 1 / ENTROPY_RATIO < entropy_ratio(summary, run) < ENTROPY_RATIO
    return (1 if gap > 0 else -1) * told


def verdict(record: Mapping[str, Any]) -> str:
    """What came out, in words: of the baseline's entropy, of every run beside it, and of the claims."""
    summary, first = record["methods"], label(BASELINE)
    start, end, fall = (summary[BASELINE][f"entropy_{name}"]["mean"] for name in ("start", "end", "fall"))
    course = "collapses" if fall >= 0.5 else "falls" if fall >= 0.1 else "stays" if fall > -0.1 else "rises"
    said = [f"{first}'s entropy {course}: {start:.2f} nats at the start, {end:.2f} at the end."]
    alike: dict[tuple[tuple[str, int], ...], list[str]] = {}
    for run in summary:
        if run != BASELINE:
            signs = [("entropy", more_entropy(summary, run))]
            for metric in ("pass8", "pass1"):
                if found := beside_baseline(summary, run, metric):
                    signs.append((JUDGED[metric][0], found[2]))
            alike.setdefault(tuple(signs), []).append(label(run))
    for outcome, names in alike.items():
        more, level, less = ([name for name, sign in outcome if sign == of] for of in (1, 0, -1))
        parts = [joined([f"{'more' if name == 'entropy' else 'higher'} {name}" for name in more])] if more else []
        parts += [("but " * bool(more)) + joined([f"lower {name}" for name in less])] if less else []
        parts += [("and " * bool(parts)) + f"about {first}'s {joined(level)}"] if level else []
        said.append(f"{joined(names)} end{'' if len(names) > 1 else 's'} with {', '.join(parts)}.")
    right = [found[0] for run in summary if (found := beside_baseline(summary, run, "pass1"))]
    said += [NEVER_RIGHT] if right and not any(right) else []
    said += [f"{label(TARGET_RUN)} is {missed}." for missed in [off_target(summary)] if missed]
    said += [f"{label(run)} {' and '.join(why)}." for run in summary if (why := incomplete(record, run))]
    seeds, noise = len(record["seeds"]), "within their standard deviation"
    if seeds == 1:
        noise = f"in pass@k below {ONE_SEED_NOISE:g}"
    said.append(f"{'One seed' if seeds == 1 else f'{seeds} seeds'}: differences {noise} count as none.")
    failed = sum(not check["holds"] for check in record["criteria"])
    claims = len(record["criteria"])
    if claims:
        said.append(f"{claims - failed} of {claims} claims hold." if failed else f"All {claims} claims hold.")
    return " ".join(said)


def off_target(summary: Summary) -> str:
    """By how much the run under a target missed it; empty where it was held, or there is none."""
    off = max(summary.get(TARGET_RUN, {}).get("target_off", {"seeds": [0.0]})["seeds"])
    return f"{off:.2f} nats off its target" if off > HELD else ""


def look(record: Mapping[str, Any]) -> list[str]:
    """What to see in the curves."""
    courses, first, summary = record["courses"], label(BASELINE), record["methods"]
    base = courses[BASELINE]
    said = []
    if base["half_fall"] is not None and summary[BASELINE]["entropy_fall"]["mean"] >= 0.1:
        said.append(f"Entropy: half of {first}'s fall is over by step {base['half_fall']} of {base['last']}.")
    late: dict[str, list[str]] = {}
    for run, course in courses.items():
        if course["behind"]:
            late.setdefault(where(course["behind"]), []).append(label(run))
    if late:
        said.append(f"pass@1, below {first}'s: {'; '.join(f'{joined(who)} {when}' for when, who in late.items())}.")
    lost = [(label(run), course["pass8_loss"]) for run, course in courses.items() if not is_beside(run)]
    lost = [(name, loss) for name, loss in lost if loss is not None]
    if lost:
        said.append("pass@8, from its best to the end: " + ", ".join(f"{n} {0.0 - v:+.2f}" for n, v in lost) + ".")
    return said


def incomplete(record: Mapping[str, Any], run: str) -> list[str]:
    """What makes a run's end another than that of the others."""
    last, most = record["courses"][run]["last"], max(course["last"] for course in record["courses"].values())
    missing = sum(record["methods"][run].get("entropy_missing", {"seeds": []})["seeds"])
    return [
        *([f"has no entropy after step {last} of {most}"] if last < most else []),
        *([f"has {missing:.0f} steps with an entropy that is not finite, left out"] if missing else []),
    ]


def where(behind: Mapping[str, Any]) -> str:
    """How long a curve is behind."""
    return "in the whole curve" if behind["to_end"] else f"until step {behind['until']}"


def dashed(summary: Summary) -> str:
    """The kinds of dashed lines that these runs have, as a sentence; empty for none."""
    ours = {run for run in summary if not run.endswith(TORCH_OPS)}
    kinds = {
        "tokens chosen at random": any(method_style(label(run)).control for run in ours),
        "torch's own operations in place of this library's": len(ours) < len(summary),
        "the entropy that a run is to hold": any("target_end" in values for values in summary.values()),
    }
    there = [kind for kind, found in kinds.items() if found]
    return f"Dashed: {'; '.join(there)}." if there else ""


def lines(record: Mapping[str, Any]) -> Table:
    """A row per run: what it ends with, the difference to the baseline, and what got worse."""
    summary, courses = record["methods"], record["courses"]
    metrics = [name for name in JUDGED if beside_baseline(summary, BASELINE, name)]
    rows = []
    for run, values in summary.items():
        first = run == BASELINE
        worse = ["entropy"] if more_entropy(summary, run) < 0 else []
        ratio = "" if first else f" ({entropy_ratio(summary, run):.1f} x)"
        cells = [f"{values['entropy_end']['mean']:.3f}{ratio}"]
        for name in metrics:
            text, digits = JUDGED[name]
            found = beside_baseline(summary, run, name)
            if found is None:
                cells.append("–")
                continue
            mean, gap, sign = found
            cells.append(f"{mean:.{digits}f}" + ("" if first else f" ({round(gap, digits) + 0.0:+.{digits}f})"))
            worse += [f"{text} at the end"] if sign < 0 else []
        if late := courses[run]["behind"]:
            worse.append(f"{JUDGED['pass1'][0]} behind {where(late)}, by {late['by']:.3f}")
        slower = slowdown(summary, run)
        worse += ["target missed"] if run == TARGET_RUN and off_target(summary) else []
        worse += [f"tokens/s {-slower:.0%}"] if slower else []
        rows.append([label(run), *cells, "" if first else "; ".join(worse) or "nothing"])
    head = ["at the end", "entropy", *(JUDGED[name][0] for name in metrics), "worse"]
    return {"head": head, "rows": rows, "class": "lines"}


def verdict_lines(record: Mapping[str, Any]) -> list[str]:
    """Verdict and methods for the console."""
    table = lines(record)
    named = [zip(table["head"][1:], cells, strict=True) for _, *cells in table["rows"]]
    rows = ["; ".join(f"{name} {cell}" for name, cell in cells) for cells in named]
    return [verdict(record), *(f"{row[0]}: {text}" for row, text in zip(table["rows"][1:], rows[1:], strict=True))]


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
    """``head`` and ``rows`` as text, a row per run, of the runs and columns that have any values; with the seeds'
    deviation if asked. Empty if there are none."""
    columns = [column for column in columns if any(column[0] in values for values in summary.values())]
    summary = {run: values for run, values in summary.items() if any(name in values for name, *_ in columns)}
    if not summary:
        return {}

    def cell(values: Mapping[str, Any], name: str, by: float, n: int) -> str:
        if name not in values:
            return "–"
        sd = values[name]["sd"]
        return f"{values[name]['mean'] / by:.{n}f}" + (f" ± {sd / by:.{n}f}" if spread and sd is not None else "")

    rows = [[label(run), *(cell(v, name, by, n) for name, _, by, n in columns)] for run, v in summary.items()]
    return {"head": ["", *(text for _, text, _, _ in columns)], "rows": rows}


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


def exact_line(fit: Mapping[str, float]) -> str:
    """What the experiment with logits as parameters gave."""
    if not fit:
        return "Logits as parameters: no token had an advantage."
    values = f"correlation {fit['correlation']:.6f}, slope {fit['slope']:.5f}, {fit['n']} tokens, step 1e-3"
    return f"Logits as parameters: {values}."


def limits(summary: Summary, base: TrainerConfig) -> list[str]:
    """What does not show at this scale, with the figures of these very runs."""
    said, first = [], summary[BASELINE]
    treating = {name: METHODS[name] for name in PAPER if METHODS[name].effect and not METHODS[name].control_of}
    gaps = {run: beside_baseline(summary, run, "pass1") for run in (*treating, TARGET_RUN) if run in summary}
    if level := [f"{label(run)} {gap[1]:+.3f}" for run, gap in gaps.items() if gap and gap[2] <= 0]:
        said.append(f"A gain in pass@1 at the end: {', '.join(level)} against {label(BASELINE)}.")
    if "law_r2" in first and abs(first["law_r2"]["mean"] - first["line_r2"]["mean"]) < SAME_R2:
        said.append(
            f"The shape of the law: on the baseline e^H explains {first['law_r2']['mean']:.3f} of the variance and a "
            f"straight line in H {first['line_r2']['mean']:.3f}. Over this range of entropies the data do not choose "
            "between them."
        )
    if "logits_correlation" in first and first["logits_correlation"]["mean"] < TREND:
        said.append(
            "The logits-level prediction through the network is a trend (baseline: correlation "
            f"{first['logits_correlation']['mean']:.2f}): weights are shared between tokens, "
            "and AdamW rescales every weight's step."
        )
    if "tokens" in first:
        tokens = first["tokens"]["mean"] / base.minibatches
        for name, method in treating.items():
            times = base.under(name).selection_ratio / method.paper_ratio
            if name not in summary or not times:  # 0: another option says how many
                continue
            said.append(
                f"{method.label}: the paper's fraction, {method.paper_ratio:g} of a minibatch of {tokens:.0f} tokens, "
                f"is {method.paper_ratio * tokens:.1f} tokens; these runs take {times:.3g} times as many."
            )
    return said


# --- the whole --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Picture:
    """A picture of the page; the note has the curves alone."""

    name: str
    about: str


class Code(str):
    """A command."""


Table = dict[str, Any]  # "head" and "rows" of text, "class" if it has one
Block = str | list[str] | Table | Picture | Code  # str: a paragraph; list: sentences
CURVES = Picture("curves", "policy entropy, pass@1 and pass@8 over training steps")
PICTURES = (
    CURVES,
    Picture("law", "validation accuracy against entropy, with the fitted law and a straight line"),
    Picture("entropy_change", "measured against predicted entropy change"),
)


def sections(record: Mapping[str, Any]) -> list[tuple[str, list[Block]]]:
    """Headings and blocks of page and note, of what summary.json holds; none where the first block has nothing."""
    summary, workers, walk = record["methods"], record["workers"], record["task"] == "walk"
    about = f"{record['model']} learns {record['task']} by PPO. Its verifier gives the reward."
    treated: dict[str, list[str]] = {}
    for run in summary:
        effect = TARGETS[record["target_method"]] if run == TARGET_RUN else method_of(run).effect
        if effect is not None and not is_beside(run):
            treated.setdefault(TREATMENTS[effect], []).append(label(run))
    differ = "".join(f"{what} ({', '.join(names)}), " for what, names in treated.items())
    start = f"{WALK if walk else about} All runs start from the same model"
    start += f"; they differ in which tokens {differ}or nothing of the kind ({label(BASELINE)})." if differ else "."
    costs = COSTS + (f" {workers} runs at the same time." if workers > 1 else "")
    times = [found for run in summary if (found := disturbance(summary, run)) is not None]
    if times and max(times) - min(times) > SAME_MACHINE:
        costs += (
            f" Sampling a token took {min(times):.2f} to {max(times):.2f} times as long as under the baseline, and no "
            "method has a part in it: the machine had other work, and these times cannot be compared."
        )
    memory = table({BASELINE: summary[BASELINE]}, MEMORY_COLUMNS)
    claims = [
        [check["claim"], check["figure"], "✓ holds" if check["holds"] else "✗ does not hold"]
        for check in record["criteria"]
    ]
    one = len(record["seeds"]) == 1
    ends = ENDS if one else f"Means ± standard deviations over the seeds. {ENDS}"
    _, law, change = PICTURES
    whole: list[tuple[str, list[Block]]] = [
        ("", [verdict(record), look(record), lines(record), CURVES, dashed(summary)]),
        ("What was run", [start, CAUSE if {*PAPER[1:]} & {*summary} else "", held_line(record)]),
        ("Where the runs end", [table(summary, END_COLUMNS, spread=True), ends]),
        ("What a step does to the entropy", [table(summary, CONTROL_COLUMNS), TOUCHED]),
        ("What a step costs", [table(summary, COST_COLUMNS), costs, memory, HEADS_NOTE if memory else ""]),
        ("The law R = -a e^H + b", [law, table(summary, LAW_COLUMNS), LAW]),
        (
            "Entropy change: measured against predicted",
            [change, exact_line(record["logits_as_parameters"]), table(summary, CHANGE_COLUMNS), WHY],
        ),
        ("Covariance of the top tokens", [record["covariance"], COVARIANCE]),
        (
            "Claims",
            [{"head": ["claim", "measured", ""], "rows": claims}, ONE_SEED if walk and one else ""],
        ),
        ("What does not show at this scale", record["limits"] and [record["limits"]]),
        ("How it was made", [made(record), Code(record["command"])]),
    ]
    return [(name, blocks) for name, blocks in whole if blocks and blocks[0]]


def made(record: Mapping[str, Any]) -> str:
    """Seeds, time and versions."""
    seeds = f"Seed{'s' if len(record['seeds']) > 1 else ''} {', '.join(map(str, record['seeds']))}"
    again = " this time" if "--reuse" in record["command"].split() else ""
    versions = [f"{name} {value}" for name, value in record["versions"].items()]
    return " · ".join([seeds, f"{record['seconds'] / 60:.1f} minutes{again}", record["hardware"], *versions])

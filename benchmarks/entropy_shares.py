"""How much of the entropy decrease the tokens of each rule carry: the exact covariance beside the paper's proxy.

    python -m benchmarks.entropy_shares walk       # the embedded task: before, in the middle and at the end of a run
    python -m benchmarks.entropy_shares smollm2    # first rollouts of SmolLM2-135M-Instruct, untrained
    python -m benchmarks.entropy_shares report     # benchmarks/results/entropy-shares/shares.md from what these wrote

No training is compared: each rule chooses the same share of the tokens of one rollout, and the predicted first-order
decrease of entropy, Σ A·C over A·C > 0 (docs/control.md), says what its tokens carry of it: `decrease_share` of
``ek.control``. Several rollouts of one policy give mean and standard deviation. "Random in the range" is Clip-Cov's
rule; where the range holds fewer tokens it has no more to give, and treats fewer.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import entropy_kernels as ek
from benchmarks.results import RESULTS, describe
from benchmarks.seeds import markdown
from entropy_kernels._console import print_table
from entropy_kernels.trainer.config import TrainerConfig
from entropy_kernels.trainer.ppo import collect, train
from entropy_kernels.trainer.probes import Probe, Step
from entropy_kernels.trainer.rollout import Rollout, mean_over

OUT = RESULTS / "entropy-shares"
RATIO = 0.03  # of the tokens, for every rule
#: label -> method of ek.control and its options beside the ratio
RULES: dict[str, tuple[str, dict[str, Any]]] = {
    "random in the range [1, 5]": ("clip_cov", {"seed": 1}),
    "top proxy": ("kl_cov", {}),
    "top exact": ("exact_cov", {}),
    "random": ("random", {"seed": 2}),
}


def shares(rollout: Rollout, ratio: float = RATIO) -> dict[str, Any]:
    """What each rule's tokens carry of one rollout's entropy decrease, and how many they are, as shares."""
    batch = ek.TokenBatch(
        rollout.old_logprob, None, rollout.advantages, rollout.mask, vocab_covariance=rollout.vocab_covariance
    )
    found: dict[str, Any] = {"entropy": mean_over(rollout.entropy, rollout.mask), "tokens": rollout.tokens}
    for label, (method, options) in RULES.items():
        metrics = ek.control(method, batch, ratio=ratio, **options).metrics
        found[label] = {name: float(metrics[name]) for name in ("decrease_share", "touched_frac")}
    return found


class Shares(Probe):
    """Some rollouts more of the policies at some steps, from a generator of their own: the run stays as it is."""

    def __init__(self, at: dict[int, str], rollouts: int) -> None:
        self.at, self.rollouts = at, rollouts
        self.rows: list[dict[str, Any]] = []

    def after_rollout(self, step: Step) -> None:
        if step.number not in self.at:
            return
        generator = torch.Generator(step.policy.device).manual_seed(1_000_003 + step.number)
        for i in range(self.rollouts):
            # prompts of steps that the run does not reach
            rollout = collect(step.policy, step.task, step.config, step=10**6 + i, generator=generator)
            self.rows.append({"where": self.at[step.number], "step": step.number, **shares(rollout)})
            print(f"{self.at[step.number]}: rollout {i + 1} of {self.rollouts}", flush=True)


#: What is trained, and where it is looked at.
RUNS: dict[str, tuple[dict[str, Any], dict[int, str]]] = {
    "walk": (
        {"method": "clip_cov", "steps": 240, "eval_every": 0, "final_eval_prompts": 8, "final_eval_samples": 1},
        {0: "walk, at the start", 120: "walk, in the middle", 240: "walk, at Clip-Cov's end"},
    ),
    "smollm2": (
        {
            "task": "reasoning_gym:chain_sum?min_terms=2&max_terms=3&min_digits=1&max_digits=1", "model": "smollm2",
            "chat_template": False, "warm_steps": 0, "steps": 0, "max_new_tokens": 24, "prompts_per_step": 16,
            "partial_credit": True, "final_eval_prompts": 1, "final_eval_samples": 1,
        },
        {0: "SmolLM2-135M, untrained"},
    ),
}  # fmt: skip


def measure(name: str, seed: int, rollouts: int, steps: int | None) -> dict[str, Any]:
    """A run with its rollouts: machine, settings, a row per rollout."""
    options, at = RUNS[name]
    if steps is not None and options["steps"]:
        at = dict(zip((0, steps // 2, steps), at.values(), strict=True))
        options = {**options, "steps": steps}
    probe = Shares(at, rollouts)
    with tempfile.TemporaryDirectory() as folder:
        config = TrainerConfig(
            out=Path(folder) / "run", seed=seed, warm_seed=seed, tensorboard=False, measure_entropy_change=False,
            first_order_every=0, measure_memory=False, threads=torch.get_num_threads(), **options,
        )  # fmt: skip
        train(config, probes=[probe])
    machine = describe(torch.device("cpu"))
    return {"run": name, "seed": seed, "ratio": RATIO, "options": options, "machine": machine, "rows": probe.rows}


def table(rows: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """A line per policy: entropy, tokens, and the share that each rule's tokens carry, mean ± standard deviation."""
    found = []
    for where in dict.fromkeys(row["where"] for row in rows):
        mine = [row for row in rows if row["where"] == where]
        cells = [where, f"{statistics.mean(row['entropy'] for row in mine):.2f}", f"{mine[0]['tokens']}"]
        for label in RULES:
            values = [100 * row[label]["decrease_share"] for row in mine]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            touched = 100 * statistics.mean(row[label]["touched_frac"] for row in mine)
            fewer = f" ({touched:.1f} % of the tokens)" if touched < 95 * RATIO else ""
            cells.append(f"{statistics.mean(values):.1f} ± {spread:.1f} %{fewer}")
        found.append(tuple(cells))
    return found


def report(files: Sequence[Path]) -> str:
    """Markdown."""
    runs = [json.loads(path.read_text()) for path in files]
    header = ("policy", "entropy", "tokens", *RULES)
    rows = [cells for run in runs for cells in table(run["rows"])]
    counts = {sum(row["where"] == where for row in run["rows"]) for run in runs for where in [run["rows"][0]["where"]]}
    return (
        f"# Share of the predicted entropy decrease that {100 * RATIO:.0f} % of the tokens carry, by rule\n\n"
        + markdown(header, rows)
        + f"\n\nMean ± standard deviation over {'/'.join(map(str, sorted(counts)))} rollouts of each policy. "
        "`python -m benchmarks.entropy_shares` (its head says how).\n"
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="entropy_shares", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("run", choices=(*RUNS, "report"), help="what to measure, or the table of what is there")
    parser.add_argument("--rollouts", type=int, default=8, help="of each policy; default: %(default)s")
    parser.add_argument("--seed", type=int, default=11, help="of start and run; default: %(default)s")
    parser.add_argument("--steps", type=int, help="of the run, for a rehearsal")
    parser.add_argument("--out", type=Path, default=OUT, help="default: %(default)s")
    given = parser.parse_args(argv)
    given.out.mkdir(parents=True, exist_ok=True)
    if given.run != "report":
        found = measure(given.run, given.seed, given.rollouts, given.steps)
        print_table(given.run, table(found["rows"]), ("policy", "entropy", "tokens", *RULES))
        (given.out / f"{given.run}.json").write_text(json.dumps(found, indent=1) + "\n")
    files = sorted(given.out.glob("*.json"), key=lambda path: [*RUNS].index(path.stem))
    (given.out / "shares.md").write_text(report(files))


if __name__ == "__main__":
    main()

"""What a run tells: a JSON object per step in metrics.jsonl, which trackers.py hands on, and a few beside its bar.

Names are defined here once (`DEFINITIONS`), and a name that is not defined cannot be logged. Numbers that describe an
update are averaged over all updates of a step. Names under ``time/`` are the only ones that may differ between two
runs of one seed.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from entropy_kernels._progress import ProgressBoard, in_words
from entropy_kernels.trainer.checkpoint import BROKEN, CHECKPOINT
from entropy_kernels.trainer.config import HEADS, TrainerConfig
from entropy_kernels.trainer.files import OwnFiles, to_disk, write_text, writing
from entropy_kernels.trainer.methods import METHODS, TARGET_ROW
from entropy_kernels.trainer.trackers import Trackers

#: Fractions of the paper's table 1, and the columns that hold the mean covariance of each top fraction.
COVARIANCE_COLUMNS = {fraction: f"cov_top_{fraction:g}" for fraction in (0.0002, 0.002, 0.02, 0.2, 0.5, 1.0)}

DEFINITIONS = {
    "step": "finished RL steps when the row's policy was measured",
    "entropy": "policy entropy, nats: mean over the tokens of the rollout, before the step's updates",
    "target_entropy": "the entropy that the step aims at, nats",
    "reward": "mean reward of what was sampled: the rollout, and what dynamic_sampling has left out of it",
    "reward_std": "standard deviation of all these rewards (n - 1 in the denominator)",
    "reward_min": "smallest of these rewards",
    "reward_max": "largest of these rewards",
    "reward_group_std": "standard deviation of the rewards of one prompt's completions, mean over these prompts",
    "groups_right": "share of these prompts whose completions are all right (reward >= 1)",
    "groups_wrong": "share of these prompts of whose completions none is right",
    "groups_sampled": "groups that dynamic_sampling has sampled for the step, its own included",
    "unscored": "answers of what was sampled that their verifier could not judge (reward 0); the first in "
    "unscored.jsonl",
    "unscored_late": "of these, answers whose score took longer than scoring_seconds",
    "groups_mixed": "share of these prompts whose completions got different rewards (under the "
    "estimators that compare within a prompt, the others have advantage 0)",
    "tokens": "completion tokens of the rollout",
    "length_mean": "mean length of the rollout's completions, tokens, the end token included",
    "length_min": "shortest of them",
    "length_max": "longest of them",
    "length_ended_mean": "mean length of those that ended by themselves, not at max_new_tokens",
    "length_ended_min": "shortest of these",
    "length_ended_max": "longest of these",
    "truncated": "share of completions that were cut off at max_new_tokens",
    "prompt_length_mean": "mean length of the rollout's prompts, tokens",
    "prompt_length_min": "shortest of them",
    "prompt_length_max": "longest of them",
    "advantage_mean": "mean advantage over the tokens that count in the losses",
    "advantage_std": "its standard deviation over these tokens (n - 1 in the denominator)",
    "advantage_min": "smallest of these advantages",
    "advantage_max": "largest of these advantages",
    "sampling_gap": "largest |log-prob while sampling - log-prob of the full forward|, nats",
    "val_pass1": "held-out prompts: mean chance that one completion is right",
    "val_pass": "held-out prompts: unbiased chance that at least one of K completions is right (val_passK)",
    "val_distinct": "held-out prompts: mean number of different right completions",
    "val_unscored": "answers to held-out prompts that their verifier could not judge",
    "val_entropy": "policy entropy on held-out prompts, nats",
    "val_reward": "held-out prompts: mean reward of a completion",
    "val_length": "held-out prompts: mean length of a completion, tokens",
    "val_truncated": "held-out prompts: share of completions that were cut off at max_new_tokens",
    "final_": "the same (final_pass1, final_passK, final_distinct, ...), on the larger validation at the end",
    "cov_mean": "mean token covariance (log-prob minus its mean) x (advantage minus its mean) over the rollout",
    "cov_max": "largest token covariance of the rollout",
    "cov_top_": "mean covariance of the top fraction of the rollout's tokens (cov_top_FRACTION), at least one token",
    "tokens_in_band": "tokens of the rollout with covariance in the range 1 < cov < 5 (or the configured absolute one)",
    "tokens_dropped": "tokens whose gradient was removed, over all updates of the step",
    "tokens_penalized": "tokens that got the KL penalty, over all updates of the step",
    "tokens_touched": "tokens that the method drops, detaches, penalises or weighs, or whose advantage it changes, "
    "over all updates of the step",
    "decrease_share": "share of the predicted entropy decrease, sum of c F over F > 0, that these tokens carry, mean "
    "over updates; F = A r C/T^2, c the token's weight in the loss",
    "entropy_coef": "coefficient of the entropy bonus, where the method sets it, mean over updates",
    "ref_kl": "KL divergence of the policy from the reference, estimate k3 whichever the penalty takes: mean over the "
    "tokens of the rollout, before the step's updates, nats",
    "loss": "loss of an update, without the critic's, mean over updates; the critic's while it learns alone",
    "pg_loss": "policy-gradient part of the loss, mean over updates",
    "clipfrac": "share of tokens that the surrogate's clip stops, mean over updates",
    "clipfrac_low": "of these, those with a negative advantage (under ppo clipped from below), mean over updates",
    "clipfrac_high": "those with a positive one (clipped from above), mean over updates",
    "clipfrac_lower": "share of tokens that the dual clip stops, or another bound of the surrogate, mean over updates",
    "ppo_kl": "mean of old minus new log-prob, mean over updates",
    "ppo_kl_abs": "mean of |old minus new log-prob|, mean over updates",
    "ratio_mean": "mean probability ratio, mean over updates",
    "ratio_max": "largest probability ratio of the step",
    "nonfinite_tokens": "valid tokens with a non-finite loss, over all updates of the step",
    "grad_norm": "gradient norm before clipping, mean over updates",
    "value_mean": "mean of the critic's values over the rollout's tokens, before the step's updates",
    "value_min": "smallest of these values",
    "value_max": "largest of these values",
    "return_mean": "mean of what the critic learns: values plus advantages before whitening",
    "return_min": "smallest of these returns",
    "return_max": "largest of these returns",
    "explained_variance": "1 - variance of return minus value / variance of return, over the rollout's tokens, before "
    "the step's updates; null where all returns are equal",
    "value_loss": "loss of the critic in an update, half a squared error, without value_coef, mean over updates",
    "value_clipfrac": "share of tokens where the clipped value's error is the larger one, mean over updates",
    "critic_grad_norm": "gradient norm before clipping of what the critic alone has, mean over updates",
    "critic_lr": "learning rate of the critic in the step",
    "measured_dh": "entropy change of the step on its own tokens: mean after the updates minus mean before, nats; with "
    "the rounding of dtype = mixed",
    "predicted_dh": "mean over tokens of -(A/T^2) C: change for a unit step in the logits, were they free parameters",
    "control_dh": "predicted entropy change of the step under the method: -lr x epochs x mean of c F over an update's "
    "tokens, mean over updates, nats; for steps of lr times the loss's gradient in logits that are free parameters",
    "free_dh": "the same if the method did nothing",
    "wanted_dh": "entropy change that the target asks of the step, nats",
    "planned_dh": "entropy change that the step's plan is predicted to have, by the learned gain, nats; measured_dh is "
    "what it had",
    "target_gain": "measured over predicted entropy change, as learned so far; see docs/control.md",
    "target_saturated": "1: no plan could bring the entropy as high as wanted, or max_change holds it back; -1: none "
    "as low; 0: neither",
    "method/": "method/NAME: what the method, or the target entropy, remembers after the step, by its own names: those "
    "of its options, or of docs/control.md",
    "lr": "learning rate of the step, of its schedule and warm-up",
    "updates": "optimizer updates of the step; fewer than minibatches x epochs where mask_truncated leaves a minibatch "
    "without a token",
    "own_update_dh": "entropy change of the step's first update on that update's own tokens, nats",
    "first_order_dh": "gradient of the mean entropy in the weights, times their change in the first update, nats",
    "first_update_dh": "entropy change of the step's first update on the rollout's tokens, nats",
    "small_update_dh": "ten times the entropy change of a tenth of that update, nats",
    "first_order_step_dh": "the same gradient, times the weights' change in the whole step, nats",
    "memory/linear": "bytes a micro-batch's forward, loss and backward hold at once, under head = linear; step 0 only",
    "memory/logits": "the same under head = logits",
    "memory/torch": "the same under head = torch",
    "memory/peak": "most bytes that torch held on the GPU at any time of the step; not at step 0 if that has measured "
    "the heads",
    "head_gap": "mean |log-prob under one head - log-prob under the other|, nats; step 0 only",
    "time/step": "seconds of the step",
    "time/rollout": "seconds of sampling, verifying and scoring",
    "time/sample": "of these, drawing the completions",
    "time/verify": "of these, decoding and rewards",
    "time/score": "of these, old log-probs and entropies, and the reference's log-probs",
    "time/update": "seconds of the updates",
    "time/measure": "seconds of what else is measured in the step, the entropy change above all",
    "time/val": "seconds of validation",
    "time/final": "seconds of the larger validation at the end",
    "time/ops": "seconds in entropy_kernels' ops, forward and backward, validation left out; under head = linear with "
    "the head's matrix products, which under head = logits are the model's",
    "time/ops_share": "time/ops over time/step without validation",
    "time/tokens_per_s": "completion tokens of the rollout per second of the step without validation",
}


#: Of DEFINITIONS, those that many names begin with.
PREFIXES = ("val_pass", "final_", "cov_top_", "method/")


def defined(name: str) -> bool:
    """Whether a metric's meaning is written down."""
    return name in DEFINITIONS or name.startswith(PREFIXES)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a metrics.jsonl by step; lines that are none, as a crash may leave them, are left out."""
    return read_log(path)[0]


def read_log(path: Path) -> tuple[list[dict[str, Any]], dict[int, bytes]]:
    """Rows by step, and the other lines by their number. Of several rows of one step the last counts."""
    rows: dict[int, dict[str, Any]] = {}
    broken = {}
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        text = line.strip(b"\0\r\t ")  # zeros: what some file systems leave after a loss of power
        try:
            row = json.loads(text.decode("utf-8-sig" if number == 1 else "utf-8"))  # editors put a mark there
            if type(row["step"]) is not int:
                raise ValueError
            rows[row["step"]] = row
        except (ValueError, KeyError, TypeError, RecursionError):
            if line.strip(b"\r\t "):
                broken[number] = line
    return [rows[step] for step in sorted(rows)], broken


def rows_before(path: Path, step: int, last: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The rows of an earlier part of the run, up to a checkpoint after `step` steps whose last row was `last`.

    Warns of lines and rows that are missing; broken lines are kept beside the log. ValueError if the log is another
    run's.
    """
    if not path.exists():
        if step:
            warnings.warn(f"{path}: not there; the log begins anew at step {step}", stacklevel=3)
        return []
    found, broken = read_log(path)
    rows = [row for row in found if row["step"] < step]
    if last is not None and rows and rows[-1]["step"] == last["step"] and any(
        rows[-1].get(name, value) != value for name, value in last.items()
    ):  # fmt: skip
        raise ValueError(
            f"resume: expected in {path} the log of the run in {CHECKPOINT}, got another run's: its row of "
            f"step {last['step']} differs; move it away, and the log begins anew"
        )
    if broken:
        aside = OwnFiles(path.parent).file(BROKEN)
        with writing(aside), open(aside, "ab") as file:
            file.write(b"".join(line + b"\n" for line in broken.values()))
        numbers = ", ".join(map(str, broken))
        warnings.warn(f"{path}: line {numbers} is no row and is left out; kept in {aside.name}", stacklevel=3)
    missing = sorted(set(range(step)) - {row["step"] for row in rows})
    if missing:
        shown = ", ".join(map(str, missing[:5])) + (", ..." if len(missing) > 5 else "")
        warnings.warn(f"{path}: no row of step {shown} of the {step} before the checkpoint", stacklevel=3)
    return rows


class MetricsLog:
    """Appends rows to ``metrics.jsonl``, and hands them to the trackers.

    Parameters
    ----------
    directory : Path
        Of the run.
    keep_before : int
        Rows of an earlier part of the run with ``step`` below this are kept, the others removed (0 starts afresh).
    last : dict, optional
        The last of these, if known; a log that has another one is refused.
    trackers : Trackers, optional
        Whoever opened them closes them.
    """

    def __init__(
        self,
        directory: Path,
        *,
        keep_before: int = 0,
        last: dict[str, Any] | None = None,
        trackers: Trackers | None = None,
    ) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / "metrics.jsonl"
        rows = rows_before(path, keep_before, last) if keep_before else []
        write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
        self.last = rows[-1] if rows else None
        self._path, self._file = path, open(path, "a", encoding="utf-8")  # noqa: SIM115  closed by close()
        self._trackers = trackers

    def write(self, row: dict[str, Any]) -> None:
        """Append one step. Raises ValueError for a name whose meaning is not in DEFINITIONS."""
        unknown = [name for name in row if not defined(name)]
        if unknown:
            raise ValueError(f"row: expected names from DEFINITIONS, got {', '.join(unknown)}")
        # NaN is no JSON; null reads back as missing
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        with writing(self._path):
            self._file.write(json.dumps(clean) + "\n")
            self._file.flush()
        self.last = clean
        if self._trackers is not None:
            self._trackers.write(row)

    def keep(self) -> None:
        """Flush it to disk: a checkpoint is to follow, of which it is the log."""
        with writing(self._path):
            to_disk(self._file)

    def close(self) -> None:
        """Flush and close the file."""
        with writing(self._path):
            self._file.close()


# --- the terminal: what is shown of a row beside a bar of _progress.py ------------------------------------------------


class RunProgress:
    """A run on a board, as :func:`entropy_kernels.trainer.ppo.train` reports it; `announced` is said once it begins."""

    def __init__(self, board: ProgressBoard, announced: str = "") -> None:
        self.board, self._announced = board, announced
        self._validated: Mapping[str, Any] = {}
        #: Whether a step of RL has been reported.
        self.trained = False
        #: The measured peak memory with either head, as a sentence, once it is known.
        self.memory: str | None = None
        #: What is shown of the latest row.
        self.told = ""

    def __call__(self, phase: str, done: int, total: int, row: Mapping[str, Any]) -> None:
        if self._announced:
            self.board.say(self._announced)
            self._announced = ""
        self.trained = self.trained or "entropy" in row
        if "val_pass1" in row:
            self._validated = row
        self.memory = describe_memory(row) or self.memory
        self.told = describe_row(row, self._validated)
        self.board.update(phase, done, total, self.told)


def announced(config: TrainerConfig, remark: str = "") -> str:
    """What a run is about to do, how long about, where it writes, and how to stop it; a task's remark comes last."""
    target = config.target_entropy
    what = METHODS[config.method].label if target is None else f"{TARGET_ROW.label} {target}"
    started = config.warm_start_from is not None or config.resume or not config.warm_steps
    first = "" if started else f" after {config.warm_steps} of a supervised start"
    goes_on = ", from the checkpoint on," if config.resume else ""
    often = f", one every {config.save_every} steps" if config.save_every else ""
    return (
        f"{what} on {config.data or config.task}, model {config.model}: {config.steps} steps{first}{goes_on} into "
        f"{config.out}; {about_time(config, start=None if started else config)}. "
        f"Ctrl-C stops; --resume goes on from the last checkpoint{often}. {remark}"
    ).rstrip()


#: Seconds of the tiny model on the embedded task, on one core of an Intel Xeon 6: of imports, of a demonstration in the
#: supervised start, of a completion in all that a step does with it, and of a completion in a validation.
_SECONDS = {"begin": 5.0, "demonstration": 1.2e-4, "completion": 4.5e-4, "validation": 9e-5}


def about_time(*runs: TrainerConfig, start: TrainerConfig | None = None, workers: int = 1) -> str:
    """How long these runs take, so many at a time, after a supervised start, in words: a guess at the embedded task on
    a CPU. Of other tasks and models the first steps tell."""
    if any(run.model != "tiny" or run.data or not run.task.startswith("walk") or run.device == "cuda" for run in runs):
        return "how long is known after the first steps"
    seconds = 0.0 if start is None else _SECONDS["demonstration"] * (start.warm_steps or 0) * start.warm_batch
    for run in runs:
        validations = 1 + (run.steps // run.eval_every if run.eval_every else 0)
        validated = validations * run.eval_prompts * run.eval_samples + run.final_eval_prompts * run.final_eval_samples
        drawn = run.steps * run.prompts_per_step * run.samples_per_prompt
        spent = _SECONDS["begin"] + _SECONDS["completion"] * drawn + _SECONDS["validation"] * validated
        seconds += spent / min(workers, len(runs))
    cores = min(workers, len(runs))
    return f"about {in_words(seconds)} on {cores} idle core{'s' * (cores > 1)}"


def describe_row(row: Mapping[str, Any], validated: Mapping[str, Any] | None = None) -> str:
    """The numbers of a row that fit beside a bar, what matters most first; of the last row, the larger validation's.

    `validated` is the latest row with a validation, whose step is named if it is another one's.
    """
    if "entropy" not in row:  # the supervised start
        return _numbers(row, ("loss", "loss"))
    final = {f"val_{name[6:]}": value for name, value in row.items() if name.startswith("final_pass")}
    from_row = final or (row if "val_pass1" in row else validated or {})
    passes = sorted((name for name in from_row if name.startswith("val_pass")), key=lambda name: int(name[8:]))
    parts = [
        _numbers(row, ("entropy", "H"), ("target_entropy", "target"), ("reward", "reward")),
        _numbers(from_row, ("val_pass1", "pass@1")),
        f"len {row['length_mean']:.0f}" if "length_mean" in row else "",
        f"cut {row['truncated']:.0%}" if row.get("truncated") else "",  # none is no news
        _numbers(from_row, *((name, f"pass@{name[8:]}") for name in passes[1:])),
        "" if final or not passes or from_row["step"] == row["step"] else f"(step {from_row['step']})",
    ]
    return "  ".join(part for part in parts if part)


def _numbers(row: Mapping[str, Any], *shown: tuple[str, str]) -> str:
    return "  ".join(f"{label} {row[name]:.3f}" for name, label in shown if isinstance(row.get(name), float))


def describe_memory(row: Mapping[str, Any]) -> str | None:
    """The measured peak memory with either head, as a sentence; None for a row without it."""
    shown = [
        f"{head} {f'{peak / 1e6:.1f} MB' if math.isfinite(peak) else 'does not fit'}"
        for head in HEADS
        if (peak := row.get(f"memory/{head}")) is not None
    ]
    start = "Peak memory of a micro-batch's forward, loss and backward, by head: "
    return f"{start}{', '.join(shown)}." if shown else None

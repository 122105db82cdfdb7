"""What methods of holding entropy are worth at equal entropy, and how well a set point is held: many small runs.

    python -m benchmarks.control                # all runs that are missing, then the report; `make control`
    python -m benchmarks.control equal          # one part: equal entropy, or loop, the closed loop
    python -m benchmarks.control --quick        # a rehearsal of ten minutes, in runs/control-quick
    python -m benchmarks.control list           # the table of runs, and which are there
    python -m benchmarks.control report         # report.md and its pictures, from what is there

**Equal entropy.** A method that keeps more entropy keeps more diversity, whatever else it does. So methods are compared
where they end at the same entropy: every one at three strengths, on five seeds with a supervised start each, against
curves of the same seed and start (control_numbers.py says which). **Closed loop.** The same runs under a target.
Read on in control_numbers.py, then control_report.py.

The settings stand in :data:`COMMON`, :data:`EQUAL` and :data:`LOOP`. They were chosen on another seed (100) and then
frozen; benchmarks/README.md says with how many trials. A run's settings make its key: a changed setting is another run,
and results under other keys are left alone, and out of the report. Each run that ends is a line of ``runs.jsonl``,
which is replaced atomically; one that is interrupted begins anew. The order is such that what is there at any time is a
fair comparison, seed by seed: GRPO, Clip-Cov, the middle strength of the others, the targets; then the other strengths,
longer runs, and what breaks.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.control_report import Experiment, write_report
from benchmarks.results import RESULTS, ROOT, describe
from entropy_kernels._console import Call, Parser, print_table
from entropy_kernels._progress import ProgressBoard, in_words
from entropy_kernels.trainer.config import TrainerConfig
from entropy_kernels.trainer.files import locked, write_text
from entropy_kernels.trainer.ppo import train
from entropy_kernels.trainer.probes import Probe, Step
from entropy_kernels.trainer.rollout import evaluate, mean_over
from entropy_kernels.trainer.sweep import supervised_start

OUT = RESULTS / "control"
WORK = ROOT / "runs" / "control"  # supervised starts, and what a run writes while it runs

# --- the settings, frozen ---------------------------------------------------------------------------------------------

SEEDS = (1, 2, 3, 4, 5)  # of start and run; no trial, and no other experiment, has these starts
#: What all runs have in common, the trainer's defaults included: they are part of the key.
COMMON: dict[str, Any] = {
    "task": "walk", "model": "tiny", "hidden_size": 64, "intermediate_size": 172, "num_layers": 2, "num_heads": 4,
    "dtype": "float32", "head": "linear", "threads": 1, "device": "cpu",
    "warm_steps": 800, "warm_batch": 256, "warm_lr": 3e-3, "warm_weight_decay": 0.01, "warm_warmup_steps": 50,
    "warm_wrong_fraction": 0.3,
    "steps": 240, "prompts_per_step": 64, "samples_per_prompt": 8, "temperature": 1.0, "minibatches": 4, "epochs": 1,
    "advantage": "grpo", "normalize_std": True, "lr": 3e-4, "weight_decay": 0.0, "grad_clip": 1.0,
    "clip_low": 0.2, "clip_high": 0.2, "loss_agg_mode": "token-mean", "cov_low": 1.0, "cov_high": 5.0,
    "kl_coef": 2.0, "selection_logprob": "new", "eval_prompts": 512, "eval_samples": 32,
}  # fmt: skip
#: What the trainer would measure beside that: nothing.
_UNMEASURED: dict[str, Any] = {
    "tensorboard": False, "progress": False, "save_every": 0, "measure_entropy_change": False, "first_order_every": 0,
    "measure_memory": False,
}  # fmt: skip


@dataclass(frozen=True)
class Method:
    """A row of the comparison: what stands for its strength, at three of them from weak to strong."""

    label: str
    method: str = "grpo"
    option: str = ""  # a field of the configuration, or "method_options.NAME"
    strengths: tuple[Any, ...] = ("",)
    fixed: Mapping[str, Any] = field(default_factory=dict)  # further method_options

    def settings(self, strength: Any) -> dict[str, Any]:
        """Of the configuration."""
        name, _, inner = self.option.partition(".")
        options = {**self.fixed, **({inner: strength} if inner else {})}
        return {
            "method": self.method,
            **({"method_options": options} if options else {}),
            **({name: strength} if name and not inner else {}),
        }


_ratio = "method_options.ratio"
#: Clip-Cov is a reference beside GRPO: its three strengths come first, too.
REFERENCES = ("grpo", "clip_cov")
EQUAL: dict[str, Method] = {
    "grpo": Method("GRPO"),
    "clip_cov": Method("Clip-Cov", "clip_cov", _ratio, (0.007, 0.02, 0.05)),
    "exact_cov": Method("Exact covariance", "exact_cov", _ratio, (0.005, 0.012, 0.025)),
    "kl_cov": Method("KL-Cov", "kl_cov", _ratio, (0.03, 0.07, 0.15)),
    "bonus": Method("Entropy bonus", option="entropy_coef", strengths=(0.03, 0.05, 0.07)),
    "clip_higher": Method("Clip-higher", option="clip_high", strengths=(0.24, 0.28, 0.35)),
    "top_entropy": Method("Top entropy", "top_entropy", "method_options.rho", (0.5, 0.2, 0.1)),
    "clip_b": Method("Clip-B", "clip_b", "method_options.mu", (2.0, 1.6, 1.3)),
    "clip_v": Method("Clip-V", "clip_v", _ratio, (0.007, 0.015, 0.04), {"mu": 2.0}),
    "steer": Method("STEER", "steer", "method_options.w_min", (0.4, 0.1, 0.01)),
    "random_dropped": Method("Random tokens dropped", "random_dropped", _ratio, (0.007, 0.02, 0.05)),
    "random_penalized": Method("Random tokens penalised", "random_penalized", _ratio, (0.03, 0.07, 0.15)),
    "target": Method("Target", option="target_entropy", strengths=("0.3", "0.45", "0.6")),
}
#: GRPO's own curve: validated on its way, and at its end at other temperatures.
ON_ITS_WAY = (0, 8, 16, 24, 32, 40, 50, 60, 75, 90, 105, 120, 150, 180, 210)
HEATED = (1.25, 1.5, 1.75, 2.0)


@dataclass(frozen=True)
class Spec:
    """One run: a cell of the table at a seed."""

    part: str  # equal, loop
    name: str  # the row
    strength: str
    seed: int
    rank: int  # when it runs
    settings: Mapping[str, Any]  # of the configuration, COMMON included
    validate_at: tuple[int, ...] = ()  # steps, beside the last
    heated: tuple[float, ...] = ()  # temperatures of further validations at the end
    second: Mapping[str, Any] = field(default_factory=dict)  # settings from half-time on

    @property
    def key(self) -> str:
        """Names the settings; a cell of both parts is one run."""
        said = [self.seed, self.settings, self.validate_at, self.heated, *([self.second] if self.second else [])]
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:12]

    @property
    def title(self) -> str:
        """For a line of progress."""
        return " ".join(part for part in (self.part, self.name, self.strength, f"seed {self.seed}") if part)


def equal_specs(seeds: Sequence[int], changes: Mapping[str, Any], *, all_strengths: bool = True) -> Iterator[Spec]:
    """The runs at equal entropy."""
    steps = {**COMMON, **changes}["steps"]
    for seed in seeds:
        for name, method in EQUAL.items():
            middle = method.strengths[len(method.strengths) // 2]
            for strength in method.strengths if all_strengths or name in REFERENCES else (middle,):
                is_grpo = name == REFERENCES[0]
                yield Spec(
                    "equal", name, str(strength), seed,
                    rank=0 if strength == middle or name in REFERENCES else 1,
                    settings={**COMMON, **method.settings(strength), **changes},
                    validate_at=tuple(step * steps // COMMON["steps"] for step in ON_ITS_WAY) if is_grpo else (),
                    heated=HEATED if is_grpo else (),
                )  # fmt: skip


@dataclass(frozen=True)
class Loop:
    """A row of the closed loop."""

    label: str
    target: str | None  # nats, or points STEP:NATS; {half} and {end} are steps; None: without feedback
    settings: Mapping[str, Any] = field(default_factory=dict)
    second: Mapping[str, Any] = field(default_factory=dict)  # from half-time on
    seeds: int = len(SEEDS)  # so many; fewer where it is only to be shown that it breaks
    rank: int = 0
    course: bool = False  # the picture has its entropy, beside H - target
    change: str = ""  # what disturbs it at half-time
    against: tuple[str, str, str] = ("", "", "")  # part, name and strength of the same without that


_FALLING = "0:0.8,{end}:0.3"
_LONG = {"steps": 720}
#: What changes at half-time: label, settings, settings of the second half. The task loses two of its eight moves.
_DISTURBED: dict[str, tuple[str, Mapping[str, Any], Mapping[str, Any]]] = {
    "lr-up": ("lr x 2 at half-time", {"lr_schedule": "0:1,{half}:1,{half}:2"}, {}),
    "lr-down": ("lr x 0.5 at half-time", {"lr_schedule": "0:1,{half}:1,{half}:0.5"}, {}),
    "task": ("task changed at half-time", {}, {"task": "walk?without=x2,x3"}),
}
#: Without feedback: a method and strength that ends near 0.45.
_METHOD, _STRENGTH = "clip_cov", 0.02
WITHOUT_FEEDBACK = f"{EQUAL[_METHOD].label} {_STRENGTH}"


def _free(label: str, settings: Mapping[str, Any], **more: Any) -> Loop:
    given = {**EQUAL[_METHOD].settings(_STRENGTH), **settings}
    return Loop(f"{WITHOUT_FEEDBACK}, {label}", None, given, **more)


LOOP: dict[str, Loop] = {
    "0.3": Loop("0.3", "0.3", course=True),
    "0.45": Loop("0.45", "0.45", course=True),
    "0.6": Loop("0.6", "0.6", course=True),
    "falling": Loop("0.8 to 0.3", _FALLING, course=True),
    **{
        name: Loop(f"0.45, {label}", "0.45", changes, then, change=label, against=("loop", "0.45", ""))
        for name, (label, changes, then) in _DISTURBED.items()
    },
    "weight": Loop("0.45, by weight", "0.45", {"target_method": "weight"}),
    "bonus": Loop("0.45, by bonus", "0.45", {"target_method": "bonus"}),
    "0.3-long": Loop("0.3, 720 steps", "0.3", _LONG, rank=2, course=True),
    "0.45-long": Loop("0.45, 720 steps", "0.45", _LONG, rank=2, course=True),
    "0.6-long": Loop("0.6, 720 steps", "0.6", _LONG, rank=2, course=True),
    "falling-long": Loop("0.8 to 0.3, 720 steps", _FALLING, _LONG, rank=2, course=True),
    "long": _free("720 steps", _LONG, seeds=2, rank=2, course=True),
    **{
        f"{name}-free": _free(
            label, changes, second=then, seeds=3, rank=1, change=label, against=("equal", _METHOD, str(_STRENGTH))
        )
        for name, (label, changes, then) in _DISTURBED.items()
    },
    # what breaks it: above the start, faster than GRPO falls, below where it ends, a rate that damages, few tokens
    "above": Loop("1.2, above the start", "1.2", seeds=2, rank=3),
    "fast": Loop("0.8 to 0.1 in 60 steps", "0:0.8,{quarter}:0.1", seeds=2, rank=3),
    "low": Loop("0.1", "0.1", seeds=2, rank=3),
    "lr": Loop("0.45, lr 6e-4", "0.45", {"lr": 6e-4}, seeds=2, rank=3),
    "few": Loop("0.45, 64 answers a step", "0.45", {"prompts_per_step": 8}, seeds=2, rank=3),
}


def loop_specs(seeds: Sequence[int], changes: Mapping[str, Any], *, all_strengths: bool = True) -> Iterator[Spec]:
    """The runs under a target; without all strengths those of the first rank."""
    for name, loop in LOOP.items():
        if loop.rank and not all_strengths:
            continue
        held = {} if loop.target is None else {"target_entropy": loop.target}
        settings = {**COMMON, "method": "grpo", **held, **loop.settings, **changes}
        end = settings["steps"]
        for key, value in settings.items():
            if isinstance(value, str):
                settings[key] = value.format(quarter=end // 4, half=end // 2, end=end)
        for seed in seeds[: loop.seeds]:
            yield Spec("loop", name, "", seed, loop.rank, settings, second=loop.second)


PARTS = {"equal": equal_specs, "loop": loop_specs}
#: The rehearsal: other seeds, a third of the steps, less validation; no result.
QUICK: dict[str, Any] = {"steps": 80, "eval_prompts": 128, "eval_samples": 32}
QUICK_SEEDS = (200, 201)


def table(parts: Sequence[str], *, quick: bool) -> list[Spec]:
    """All runs of some parts, in the order in which they run."""
    specs: list[Spec] = []
    for part in parts:
        if quick:
            specs += PARTS[part](QUICK_SEEDS, QUICK, all_strengths=False)
        else:
            specs += PARTS[part](SEEDS, {})
    return sorted(specs, key=lambda spec: (spec.rank, spec.seed))


# --- a run ------------------------------------------------------------------------------------------------------------


class Course(Probe):
    """What is kept of a run: numbers of each step, and validations."""

    #: Of the plan of a step, where there is one: what is kept beside the rest.
    PLAN = ("gain", "saturated", "wanted_change", "planned_change")

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.steps: dict[str, list[Any]] = {"entropy": [], "reward": [], "touched": []}
        self.validations: list[dict[str, float]] = []

    def before_step(self, step: Step) -> None:
        if step.last or step.number in self.spec.validate_at:
            for temperature in (step.config.temperature, *(self.spec.heated if step.last else ())):
                self._validate(step, temperature)

    def _validate(self, step: Step, temperature: float) -> None:
        config = dataclasses.replace(step.config, temperature=temperature)
        generator = torch.Generator(step.policy.device).manual_seed(config.seed * 1_000_003 + step.number)
        found = evaluate(
            step.policy, step.task, config,
            prompts=config.eval_prompts, samples=config.eval_samples, generator=generator,
        )  # fmt: skip
        self.validations.append({"step": step.number, "temperature": temperature, **_rounded(found)})

    def after_rollout(self, step: Step) -> None:
        self.steps["entropy"].append(round(mean_over(step.sampled.entropy, step.sampled.mask), 5))
        self.steps["reward"].append(round(float(step.sampled.rewards.mean()), 5))

    def after_step(self, step: Step) -> None:
        controls = [control for update in step.updates for control in update.controls if control is not None]
        touched = [float(control.metrics["touched_frac"]) for control in controls]
        self.steps["touched"].append(round(sum(touched) / max(1, len(touched)), 6))
        if step.plan is not None:
            for name in self.PLAN:
                self.steps.setdefault(name, []).append(round(float(step.plan.metrics[name]), 6))


def _rounded(values: Mapping[str, float]) -> dict[str, float]:
    return {name: round(value, 5) for name, value in values.items()}


def config_of(spec: Spec, out: Path, work: Path) -> TrainerConfig:
    """What the trainer is asked for."""
    return TrainerConfig(
        out=out, seed=spec.seed, warm_seed=spec.seed, warm_start_from=_start_of(spec, work), eval_every=0,
        **_UNMEASURED, **spec.settings,
    )  # fmt: skip


def _start_of(spec: Spec, work: Path) -> Path:
    return work / f"start-{spec.seed}"


def make_start(spec: Spec, work: Path) -> None:
    """The supervised start that all runs of a seed share; one that is there is kept."""
    config = dataclasses.replace(config_of(spec, work / "unused", work), warm_start_from=None)
    while True:
        try:
            supervised_start(config, _start_of(spec, work), ProgressBoard(enabled=False))
            return
        except BlockingIOError:  # another call makes it
            time.sleep(1.0)


def fingerprint(start: Path) -> str:
    """Of its weights: another machine makes other ones from the same seed."""
    return hashlib.sha256((start / "model.safetensors").read_bytes()).hexdigest()[:12]


def perform(spec: Spec, work: Path, machine: Mapping[str, Any], start: str | None = None) -> dict[str, Any]:
    """Train; the record of a run, ready for JSON.

    ``machine``: as :func:`benchmarks.results.describe` has it. ``start``: the fingerprint of the seed's other runs.
    """
    make_start(spec, work)
    mine = fingerprint(_start_of(spec, work))
    if start not in (None, mine):
        raise ValueError(
            f"{_start_of(spec, work)}: expected the start that the runs of seed {spec.seed} have in common, {start}, "
            f"got {mine}, made here: bring back the folder from where they were made, or give another --out"
        )
    began, course = (time.process_time(), time.time()), Course(spec)
    with tempfile.TemporaryDirectory(dir=work, prefix="run-") as folder:
        config = config_of(spec, Path(folder) / "run", work)
        if spec.second:  # up to half-time, and on from there under another configuration
            half = config.steps // 2
            train(dataclasses.replace(config, steps=half), probes=[course])
            course.steps = {name: values[:half] for name, values in course.steps.items()}
            config = dataclasses.replace(config, resume=True, resume_changes=tuple(spec.second), **spec.second)
        train(config, probes=[course])
    return {
        "key": spec.key, "title": spec.title, "seed": spec.seed, "start": mine,
        "settings": {name: value for name, value in spec.settings.items() if COMMON.get(name) != value},
        "machine": machine["machine"], "commit": machine["commit"], "dirty": machine["dirty"],
        "versions": {"python": machine["python"], **machine["versions"]},
        "cpu_seconds": round(time.process_time() - began[0], 1), "seconds": round(time.time() - began[1], 1),
        "validations": course.validations, "steps": course.steps,
    }  # fmt: skip


# --- all runs ---------------------------------------------------------------------------------------------------------


def read(path: Path) -> dict[str, dict[str, Any]]:
    """Records by their keys."""
    if not path.exists():
        return {}
    return {record["key"]: record for record in map(json.loads, path.read_text(encoding="utf-8").splitlines())}


def keep(path: Path, record: dict[str, Any]) -> None:
    """Add a record; a reader, or whoever cuts this off, never sees half a file."""
    records = {**read(path), record["key"]: record}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "".join(json.dumps(value) + "\n" for value in records.values()))


def finished(specs: Sequence[Spec], out: Path) -> dict[str, dict[str, Any]]:
    """Records of these runs, by their keys."""
    found = read(out / "runs.jsonl")
    return {spec.key: found[spec.key] for spec in specs if spec.key in found}


def experiment(specs: Sequence[Spec], out: Path) -> Experiment:
    """These runs, and what is there of them."""
    return Experiment(specs, finished(specs, out), EQUAL, LOOP, WITHOUT_FEEDBACK)


def run_all(specs: Sequence[Spec], *, out: Path, work: Path, workers: int) -> list[str]:
    """Run what is missing; returns what failed, a line each. Interrupted, it ends its processes and raises."""
    unique, there = {spec.key: spec for spec in specs}, finished(specs, out)
    todo = [spec for key, spec in unique.items() if key not in there]
    weight, done = sum(spec.settings["steps"] for spec in todo), 0
    about = f"{len(there)} of {len(unique)} runs are there; {len(todo)} to do, {workers} at a time"
    if not todo:
        print(about)
        return []
    known = [*there.values(), *read(OUT / "runs.jsonl").values()]  # the latter maybe of another machine
    pace = sum(record["seconds"] for record in known) / max(1, sum(len(record["steps"]["reward"]) for record in known))
    left = in_words(weight * pace / min(workers, len(todo))) if known else "not known how long"
    about += f", into {out}; about {left}. Ctrl-C stops; the same call goes on."
    starts = {record["seed"]: record["start"] for record in there.values()}
    machine = describe(torch.device("cpu"))  # before any run, as HEAD may move meanwhile
    failed = []
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that follow
    with (
        locked(work),
        ProgressBoard(interval=0.0) as board,
        ProcessPoolExecutor(
            min(workers, len(todo)),
            multiprocessing.get_context("spawn"),
            initializer=signal.signal,
            initargs=(signal.SIGINT, signal.SIG_IGN),  # Ctrl-C is for this process, which ends them
        ) as pool,
    ):
        for folder in work.glob("run-*"):  # of a call that was cut off
            shutil.rmtree(folder, ignore_errors=True)
        try:
            board.say(about)
            board.update("steps", 0, weight)
            futures = {pool.submit(perform, spec, work, machine, starts.get(spec.seed)): spec for spec in todo}
            for number, future in enumerate(as_completed(futures), start=1):
                spec = futures[future]
                done += spec.settings["steps"]
                if (error := future.exception()) is not None:
                    failed.append(f"{spec.title}: {type(error).__name__}: {error}")
                    said = failed[-1]
                else:
                    record = future.result()
                    keep(out / "runs.jsonl", record)
                    last = next(v for v in record["validations"] if v["step"] == spec.settings["steps"])
                    said = (
                        f"{spec.title}: H {last['entropy']:.3f}, pass@1 {last['pass1']:.3f}, {record['seconds']:.0f} s"
                    )
                board.update("steps", done, weight, f"run {number} of {len(todo)}  {said}")
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.terminate()
            raise
    return failed


def main(argv: Sequence[str] | None = None) -> int:
    prog = "python -m benchmarks.control"
    parser = Parser(prog=prog, description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("what", nargs="*", choices=("all", *PARTS, "list", "report"), default="all")
    parser.add_argument("--quick", action="store_true", help="a rehearsal of about ten minutes")
    parser.add_argument("--methods", nargs="+", choices=(*EQUAL, *LOOP), metavar="NAME", help="only these rows")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="runs at a time; default: %(default)s")
    parser.add_argument("--out", type=Path, help=f"results; default: {OUT.relative_to(ROOT)}")
    parser.add_argument("--work", type=Path, default=WORK, help=f"scratch; default: {WORK.relative_to(ROOT)}")
    given = parser.parse_args(argv)
    given.what = [*PARTS, "report"] if "all" in given.what else given.what
    out = given.out or (WORK.with_name("control-quick") if given.quick else OUT)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # processes end with this one
    specs = table([part for part in PARTS if part in given.what] or [*PARTS], quick=given.quick)
    specs = [spec for spec in specs if given.methods is None or spec.name in given.methods]
    failed: list[str] = []
    if "list" in given.what:
        there = finished(specs, out)
        rows = [(s.part, s.name, s.strength, f"{s.seed}", s.key, "there" if s.key in there else "") for s in specs]
        print_table("Runs", rows, ("part", "method", "strength", "seed", "key", ""))
    elif set(given.what) & set(PARTS):
        given.work.mkdir(parents=True, exist_ok=True)
        try:
            failed = run_all(specs, out=out, work=given.work, workers=given.workers)
        except KeyboardInterrupt:
            kept = f"{len(finished(specs, out))} of {len({spec.key for spec in specs})} runs"
            again = Call(prog, sys.argv[1:] if argv is None else argv).again()
            print(f"stopped; kept in {out}: {kept}. To go on, with those under way anew:\n  {again}", file=sys.stderr)
            return 130
    for line in failed:
        print(f"failed: {line}", file=sys.stderr)
    if "report" in given.what:
        print(write_report(out, experiment(specs, out), quick=given.quick))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

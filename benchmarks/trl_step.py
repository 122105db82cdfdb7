"""A step of TRL's GRPO trainer on SmolLM2-135M-Instruct: TRL's head beside ours, and with a method of control.

    python -m benchmarks.trl_step                  # three seeds of each arm, then the report; `make test-integrations`
    python -m benchmarks.trl_step --seeds 0        # makes the environment, .venv-integrations; quiet cores, please
    python -m benchmarks.trl_step --report         # the report from what is there

Read in this order: ``ARMS`` (what is compared), :func:`one` (a run), :func:`report`. Each run is a process of its own;
arms take turns, and each seed begins with another one. On a machine with a GPU the same command runs there. Written to
``benchmarks/results/<machine>/trl_step``: ``runs.jsonl``, a line a run with the samples of every step, and
``report.md``. Times are of optimizer steps, rollout included, but for the first; peaks are of the whole training.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.results import RESULTS, describe, slug
from benchmarks.seeds import markdown, t_interval
from benchmarks.timing import process_status, resets_high_water
from entropy_kernels.trainer.start import load_smollm2

#: name -> fields of our GRPOConfig; None: TRL's own classes.
ARMS: dict[str, dict[str, Any] | None] = {
    "TRL": None,
    "our head": {"fused_head": True},
    "our head, exact_cov": {"method": "exact_cov", "method_options": {"share": 0.5}},
}
SETTINGS = {"steps": 10, "prompts": 2, "samples": 4, "tokens": 8, "threads": 1, "lr": 1e-5}  # of a run, all flags
LABELS = {
    "seconds": "step, s", "cpu": "CPU time of it, s", "training": "of it without generation, s", "peak": "peak, GB",
}  # fmt: skip


class Meter:
    """Seconds and peak memory of a training, by TRL's callbacks; on a CPU the high-water mark of resident memory."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.samples: dict[str, list[float]] = {"seconds": [], "cpu": [], "training": []}
        self.generation = 0.0

    def now(self) -> tuple[float, float]:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter(), time.process_time()

    def reset_peak(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        else:
            resets_high_water()

    def peak(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated()
        return process_status("VmHWM")

    def generating(self, generate: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **named: Any) -> Any:
            start = self.now()[0]
            found = generate(*args, **named)
            self.generation += self.now()[0] - start
            return found

        return timed

    def callback(self) -> Any:
        from transformers import TrainerCallback

        meter = self

        class Steps(TrainerCallback):
            def on_train_begin(self, *_: Any, **__: Any) -> None:
                meter.reset_peak()

            def on_step_begin(self, *_: Any, **__: Any) -> None:
                self.start, meter.generation = meter.now(), 0.0

            def on_step_end(self, *_: Any, **__: Any) -> None:
                seconds, cpu = (b - a for a, b in zip(self.start, meter.now(), strict=True))
                for name, value in (("seconds", seconds), ("cpu", cpu), ("training", seconds - meter.generation)):
                    meter.samples[name].append(value)

        return Steps()


def even_tokens(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [sum(i % 2 == 0 for i in ids) / len(ids) for ids in completion_ids]


def one(arm: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """A run: samples of every step, curves, peak."""
    import trl
    from datasets import Dataset

    from entropy_kernels.integrations.trl import GRPOConfig, GRPOTrainer
    from entropy_kernels.integrations.trl.head import HEAD

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(args.threads)
    fields = ARMS[arm]
    config, kind = (trl.GRPOConfig, trl.GRPOTrainer) if fields is None else (GRPOConfig, GRPOTrainer)
    model, tokenizer = load_smollm2()
    prompts = [f"Tell me something about the number {i}." for i in range(64)]
    with tempfile.TemporaryDirectory() as folder:
        settings = config(
            output_dir=folder, use_cpu=device.type == "cpu", bf16=device.type == "cuda", report_to="none", seed=seed,
            per_device_train_batch_size=args.prompts * args.samples, num_generations=args.samples, logging_steps=1,
            max_completion_length=args.tokens, max_steps=args.steps, learning_rate=args.lr, save_strategy="no",
            generation_kwargs={"min_new_tokens": args.tokens},  # every step is as long
            lr_scheduler_type="constant", gradient_checkpointing=False, disable_tqdm=True, **(fields or {}),
        )  # fmt: skip
        meter = Meter(device)
        trainer = kind(
            model=model, reward_funcs=even_tokens, args=settings, processing_class=tokenizer,
            train_dataset=Dataset.from_dict({"prompt": prompts}), callbacks=[meter.callback()],
        )  # fmt: skip
        trainer._generate = meter.generating(trainer._generate)
        load = os.getloadavg()[0]
        trainer.train()
    log = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    names = ("entropy", "reward", "loss", "grad_norm", "completions/mean_length", "ek/touched_frac")
    return {
        "arm": arm, "seed": seed, "time": time.strftime("%Y-%m-%d %H:%M:%S"), **meter.samples, "peak": meter.peak(),
        "log": {name: [entry[name] for entry in log] for name in names if name in log[0]}, "calls": HEAD.calls,
        "load": [load, os.getloadavg()[0]],
        "settings": {name: getattr(args, name) for name in SETTINGS}, "machine": machine(device),
    }  # fmt: skip


def machine(device: torch.device) -> dict[str, Any]:
    """What of a machine a reader of the times has to know."""
    found = describe(device)
    kept = {name: found[name] for name in ("machine", "gpu", "commit", "dirty")}
    return kept | {"processor": found["cpu"]["model"], "torch": found["versions"]["torch"]}


def run_all(args: argparse.Namespace, file: Path) -> None:
    """Every arm with every seed, each in a process of its own."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("")
    for i, seed in enumerate(args.seeds):
        for arm in [*ARMS][i % len(ARMS) :] + [*ARMS][: i % len(ARMS)]:
            start = time.perf_counter()
            flags = [f"--{name}={getattr(args, name)}" for name in SETTINGS]
            command = [sys.executable, "-m", "benchmarks.trl_step", "--one", arm, "--seeds", str(seed), *flags]
            environment = os.environ | {
                "OMP_NUM_THREADS": str(args.threads),
                "PYTHONWARNINGS": "ignore",
                "TQDM_DISABLE": "1",
            }
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
            with file.open("a") as out:
                out.write(done.stdout.splitlines()[-1] + "\n")
            print(f"seed {seed}, {arm}: {time.perf_counter() - start:.0f} s", flush=True)


def report(runs: list[dict[str, Any]]) -> str:
    """Means over seeds with 95 % t intervals; ratios to TRL within a seed."""
    settings, machine = runs[0]["settings"], runs[0]["machine"]
    by = {(run["arm"], run["seed"]): run for run in runs}
    seeds = sorted({run["seed"] for run in runs})

    def values(arm: str, name: str) -> list[float]:
        picked = [by[arm, seed][name] for seed in seeds]
        return [x / 1e9 if name == "peak" else statistics.median(x[1:]) for x in picked]

    def shown(sample: list[float]) -> str:
        mean, low, high = t_interval(sample)
        return f"{mean:.3f}" if len(sample) < 2 else f"{mean:.3f} [{low:.3f}, {high:.3f}]"

    rows, ratios, verdicts = [], [], []
    for arm in ARMS:
        found = {name: values(arm, name) for name in LABELS}
        rows.append([arm, *(shown(found[name]) for name in LABELS)])
        if arm != "TRL":
            beside = [[x / y for x, y in zip(found[name], values("TRL", name), strict=True)] for name in LABELS]
            ratios.append([arm, *map(shown, beside)])
            verdicts += [f"{arm}, {label}: {_verdict(x)}" for label, x in zip(LABELS.values(), beside, strict=True)]
    curves = []
    for step in range(settings["steps"]):
        cells = [shown([by[arm, seed]["log"]["entropy"][step] for seed in seeds]) for arm in ARMS]
        curves.append([str(step + 1), *cells])
    loads = [x for run in runs for x in run["load"]]
    return "\n".join(
        [
            "# A step of TRL's GRPO trainer", "",
            f"SmolLM2-135M-Instruct, {settings['prompts']} prompts × {settings['samples']} completions of "
            f"{settings['tokens']} tokens, {settings['steps']} steps, {len(seeds)} seeds an arm, {settings['threads']} "
            f"thread{'s' if settings['threads'] > 1 else ''}. {machine['processor']}, torch {machine['torch']}; load "
            f"average {min(loads):.1f} to {max(loads):.1f} (1.0 is this run alone on one core). {runs[0]['time']} to "
            f"{runs[-1]['time']}. `python -m benchmarks.trl_step`; samples in runs.jsonl.", "",
            "Median of a run's steps but the first; mean over seeds with 95 % t interval:", "",
            markdown(["", *LABELS.values()], rows), "", "The same over TRL's of the same seed:", "",
            markdown(["", *LABELS.values()], ratios), "",
            "A difference is shown where the interval of the ratio excludes 1 (each by itself, not corrected for their "
            "number):", "", *(f"- {line}" for line in verdicts), "",
            "Entropy by step, nats, mean over seeds with 95 % t interval:", "",
            markdown(["step", *ARMS], curves), "",
        ]
    )  # fmt: skip


def _verdict(ratios: list[float]) -> str:
    """Whether the interval of a ratio excludes 1."""
    _, low, high = t_interval(ratios)
    if len(ratios) < 2:
        return "one seed shows nothing"
    return "shown, less" if high < 1 else "shown, more" if low > 1 else "no difference shown"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    for name, default in SETTINGS.items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    parser.add_argument("--one", choices=ARMS, help=argparse.SUPPRESS)
    parser.add_argument("--report", action="store_true", help="write the report again")
    parser.add_argument("--out", type=Path, help="folder; default: benchmarks/results/<machine>/trl_step")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(one(args.one, args.seeds[0], args)))
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    out = args.out or RESULTS / slug(device) / "trl_step"
    if not args.report:
        run_all(args, out / "runs.jsonl")
    text = report([json.loads(line) for line in (out / "runs.jsonl").read_text().splitlines()])
    (out / "report.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()

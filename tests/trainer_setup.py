"""Tiny settings and an easy task for the tests of the trainer."""

from __future__ import annotations

import dataclasses
import io
import shutil
from collections.abc import Callable, Iterable, Mapping
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import IO, Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")
pytest.importorskip("tyro")

from safetensors.torch import load_file

from entropy_kernels.analysis import plots
from entropy_kernels.trainer import causal_lm, checkpoint, ppo, start, sweep
from entropy_kernels.trainer.__main__ import main
from entropy_kernels.trainer.config import TrainerConfig
from entropy_kernels.trainer.log import read_rows
from entropy_kernels.trainer.model import Policy
from entropy_kernels.trainer.rollout import Rollout
from entropy_kernels.trainer.tasks import Prompt, Task, WalkTask

TINY = TrainerConfig(
    steps=3,
    warm_steps=0,
    hidden_size=16,
    intermediate_size=24,
    num_layers=1,
    num_heads=2,
    prompts_per_step=4,
    samples_per_prompt=4,
    minibatches=2,
    eval_every=2,
    eval_prompts=4,
    eval_samples=2,
    final_eval_prompts=4,
    final_eval_samples=4,
    first_order_every=2,
    measure_memory=False,
    save_every=0,
    tensorboard=False,
    progress=False,
    lr=3e-3,
)


class EasyTask(WalkTask):
    """Four words, and a reward that even an untrained policy gets half of the time, so that gradients flow."""

    max_new_tokens = 4

    def verify(self, prompt: Prompt, completion: str) -> float:
        return float(sum(map(ord, completion)) % 2)


#: Kinds of the tiny model that were tried before their training, in this process.
_tried: set[tuple[object, ...]] = set()


def with_task(patch: pytest.MonkeyPatch, make: Callable[[], Task] = EasyTask) -> None:
    """Runs have this task, whatever they name. That a tiny model can be trained is looked at once of each kind."""
    check = causal_lm.check_policy

    def check_once(policy: Policy, *, checkpointing: bool = False) -> None:
        kind = type(policy.model), policy.head_name, policy.mixed, checkpointing, len(policy.tokenizer)
        if kind not in _tried or causal_lm.base_of(policy.model).config.hidden_size != TINY.hidden_size:
            check(policy, checkpointing=checkpointing)
            _tried.add(kind)

    patch.setattr(start, "check_policy", check_once)
    patch.setattr(ppo, "make_task", lambda name, max_new_tokens=None: make())


@pytest.fixture(autouse=True)
def easy(monkeypatch: pytest.MonkeyPatch) -> None:
    with_task(monkeypatch)


def config(out: Path, **changes: object) -> TrainerConfig:
    return dataclasses.replace(TINY, out=out, **changes)  # type: ignore[arg-type]


def whole_rollout(mask: Tensor, stats: Iterable[Tensor], **given: Any) -> Rollout:
    """One of which nothing was cut off and no group replaced, where `given` says nothing else. `stats`: old log-probs,
    entropies, collisions and covariances."""
    names = ("old_logprob", "entropy", "collision", "vocab_covariance")
    usual = {"mask": mask, "completed": mask, "truncated": torch.zeros_like(mask[:, 0]), "longest": mask.shape[1]}
    usual |= {"sampling_gap": 0.0, "sampled_rewards": given["rewards"], **dict(zip(names, stats, strict=True))}
    return Rollout(**{**usual, **given})


def rows_without_times(out: Path) -> list[dict[str, object]]:
    rows = read_rows(out / "metrics.jsonl")
    assert rows, "no rows were logged"
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in rows]


def policy_weights(out: Path) -> dict[str, Tensor]:
    """Of a run's checkpoint."""
    return dict(checkpoint.load_checkpoint(out / checkpoint.CHECKPOINT)["modules"]["policy"])


def assert_same_state(one: Path, other: Path) -> None:
    """Two runs' checkpoints: weights, optimizers, generators and what the method remembers, bit for bit."""
    states = [checkpoint.load_checkpoint(out / checkpoint.CHECKPOINT) for out in (one, other)]
    for part in ("optimizers", "controller"):  # a NaN is none other
        assert repr(states[0][part]) == repr(states[1][part])
    a, b = (load_file(out / checkpoint.CHECKPOINT) for out in (one, other))
    assert a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


def assert_same_run(one: Path, other: Path) -> None:
    """Two runs' rows, but for times, and their checkpoints."""
    assert rows_without_times(one) == rows_without_times(other)
    assert_same_state(one, other)


def assert_near(one: Path, other: Path, *apart: str) -> None:
    """Rows of two runs, but for columns `apart`, up to rounding."""
    for row, beside in zip(rows_without_times(one), rows_without_times(other), strict=True):
        assert row.keys() == beside.keys()
        for name in row.keys() - {"sampling_gap", *apart}:
            least = 1e-9 if name in ("control_dh", "free_dh") else 2e-5  # the learning rate is a factor of these
            assert beside[name] == pytest.approx(row[name], rel=2e-3, abs=least), (other.name, row["step"], name)


def resumed(folder: Path, at: int, **changes: object) -> tuple[Path, Path]:
    """A run, and one that stopped after `at` steps and went on, which are found to be the same; their folders. As it
    was when it had stopped it is in `folder` / stopped."""
    whole, halves = folder / "whole", folder / "halves"
    ppo.train(config(whole, **{**SHORT, **changes}))
    ppo.train(config(halves, **{**SHORT, **changes, "steps": at}))
    shutil.copytree(halves, folder / "stopped")
    ppo.train(config(halves, **{**SHORT, **changes, "resume": True}))
    assert_same_run(whole, halves)
    return whole, halves


class Here:
    """In the place of Popen: the run takes place in this process. Another one imports transformers for five seconds."""

    def __init__(self, command: list[str], *, stdout: IO[bytes], **options: Any) -> None:
        log = io.StringIO()
        with redirect_stdout(log), redirect_stderr(log):
            self.code = main(command[command.index("from-config") :])
        stdout.write(log.getvalue().encode())
        stdout.flush()

    def poll(self) -> int:
        return self.code


def runs_here(patch: pytest.MonkeyPatch, process: type = Here) -> None:
    """Runs of sweeps take place in this process, one after the other."""
    patch.setattr(sweep.subprocess, "Popen", process)
    patch.setattr(sweep, "_POLL", 0.0)


def assert_same_gradients(
    ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], rtol: float, atol: float, where: object = ""
) -> None:
    """Of all parameters, each of which has one; `atol` is a share of its largest entry."""
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        scale = float(theirs[name].abs().max())
        assert scale > 0, name
        torch.testing.assert_close(
            gradient, theirs[name], rtol=rtol, atol=atol * scale,
            msg=lambda text, at=(where, name): f"{at}: {text}",
        )  # fmt: skip


def without_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures of reports are made and not drawn, which takes seconds: for reports that nobody looks at."""
    monkeypatch.setattr(plots, "png", lambda figure, **options: b"a picture")


SHORT = {"steps": 1, "eval_every": 0, "first_order_every": 0, "measure_entropy_change": False}


def trained(folders: pytest.TempPathFactory, **changes: object) -> Path:
    """A run for all tests of a module."""
    with pytest.MonkeyPatch.context() as patch:
        with_task(patch)
        return ppo.train(config(folders.mktemp("trained") / "run", **{**SHORT, **changes}))


@pytest.fixture(scope="module")
def trained_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps with a checkpoint after each; tests work on copies."""
    return trained(tmp_path_factory, steps=3, save_every=1)


@pytest.fixture
def run(trained_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained_run, tmp_path / "run"))


def again(out: Path, **changes: object) -> Path:
    return ppo.train(config(out, **{**SHORT, "steps": 4, "resume": True, **changes}))


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not path.name.startswith(".entropy_kernels")
    }

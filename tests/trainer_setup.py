"""Tiny settings and an easy task for the tests of the trainer."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("tyro")

from entropy_kernels.analysis import plots
from entropy_kernels.trainer import ppo
from entropy_kernels.trainer.config import TrainerConfig
from entropy_kernels.trainer.log import read_rows
from entropy_kernels.trainer.tasks import Prompt, WalkTask

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


@pytest.fixture(autouse=True)
def easy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ppo, "make_task", lambda name, max_new_tokens=None: EasyTask())


def config(out: Path, **changes: object) -> TrainerConfig:
    return dataclasses.replace(TINY, out=out, **changes)  # type: ignore[arg-type]


def rows_without_times(out: Path) -> list[dict[str, object]]:
    rows = read_rows(out / "metrics.jsonl")
    assert rows, "no rows were logged"
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in rows]


def without_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures of reports are made and not drawn, which takes seconds: for reports that nobody looks at."""
    monkeypatch.setattr(plots, "png", lambda figure, **options: b"a picture")


SHORT = {"steps": 1, "eval_every": 0, "first_order_every": 0, "measure_entropy_change": False}


@pytest.fixture(scope="module")
def trained_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps with a checkpoint after each; tests work on copies."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ppo, "make_task", lambda name, max_new_tokens=None: EasyTask())
        return ppo.train(config(tmp_path_factory.mktemp("trained") / "run", **{**SHORT, "steps": 3, "save_every": 1}))


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

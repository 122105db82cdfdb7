"""The trainer's rows in wandb and trackio themselves, without a network, read back from the files that they write."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trackio
from trackio import sqlite_storage
from wandb.proto.wandb_internal_pb2 import Record

from entropy_kernels.trainer import ppo
from entropy_kernels.trainer.config import TrainerConfig
from entropy_kernels.trainer.log import read_rows
from entropy_kernels.trainer.trackers import PROJECT, SERVICES, scalars

TINY = TrainerConfig(
    steps=2, warm_steps=0, hidden_size=16, intermediate_size=24, num_layers=1, num_heads=2, prompts_per_step=4,
    samples_per_prompt=4, minibatches=2, eval_every=0, final_eval_prompts=4, final_eval_samples=4, first_order_every=0,
    save_every=1, tensorboard=False, progress=False, measure_memory=False, trackers=SERVICES,
)  # fmt: skip


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run of two steps, and then of a third."""
    folder = tmp_path_factory.mktemp("trackers")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("WANDB_PROJECT", "TRACKIO_PROJECT"):
            patch.delenv(name, raising=False)
        patch.setenv("WANDB_MODE", "offline")
        for module in (trackio, trackio.utils, sqlite_storage):  # it reads TRACKIO_DIR when it is imported
            patch.setattr(module, "TRACKIO_DIR", folder / "trackio", raising=False)
        out = ppo.train(dataclasses.replace(TINY, out=folder / "mine"))
        yield ppo.train(dataclasses.replace(TINY, out=out, steps=3, resume=True))


def test_wandb_has_every_row_and_one_run(resumed: Path) -> None:
    rows = {row["step"]: row for row in read_rows(resumed / "metrics.jsonl")}
    run_id = json.loads((resumed / "config.json").read_text())["run_id"]
    steps: list[int] = []
    parts = sorted((resumed / "wandb").glob("offline-run-*/*.wandb"))
    assert len(parts) == 2 and all(part.name == f"run-{run_id}.wandb" for part in parts)
    for part in parts:
        for record in records(part):
            if record.HasField("run"):
                assert (record.run.run_id, record.run.project, record.run.display_name) == (run_id, PROJECT, "mine")
            if record.HasField("history"):
                values = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
                step = record.history.step.num
                steps.append(step)
                name = "train/loss" if steps[-2:] == [2, 2] else "train/entropy"
                assert json.loads(values[name]) == rows[step][name.removeprefix("train/")]
    assert steps == [0, 1, 2, 2, 3]  # the row of step 2 as the last one, and what its updates added


def test_trackio_has_every_row_and_one_run(resumed: Path) -> None:
    rows = {row["step"]: row for row in read_rows(resumed / "metrics.jsonl")}
    storage = sqlite_storage.SQLiteStorage
    assert storage.get_runs(PROJECT) == ["mine"]
    logs = storage.get_logs(PROJECT, "mine")
    assert [log["step"] for log in logs] == [0, 1, 2, 2, 3]
    whole = [logs[0], logs[1], {**logs[2], **logs[3]}, logs[-1]]
    assert "train/entropy" not in logs[3]
    for log in whole:
        expected = {name: x for name, x in scalars(rows[log["step"]]).items() if not name.startswith("time/")}
        assert {name: log[name] for name in expected} == pytest.approx(expected)


def records(path: Path) -> Iterator[Record]:
    """Of a .wandb file: after 7 bytes, blocks of 32 KiB in LevelDB's format of a log."""
    data, position, made = path.read_bytes(), 7, b""
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        length, kind = int.from_bytes(data[position + 4 : position + 6], "little"), data[position + 6]
        made += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or its last part
            record: Any = Record()
            record.ParseFromString(made)
            made = b""
            yield record

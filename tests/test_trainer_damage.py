"""What the trainer says of its own files, and of a model's, that are damaged, and that nothing else is lost."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("tyro")

from safetensors.torch import load_file, save_file

import trainer_setup
from entropy_kernels._progress import ProgressBoard
from entropy_kernels.trainer import checkpoint, sweep
from entropy_kernels.trainer.__main__ import main
from entropy_kernels.trainer.config import TrainerConfig, check_resumable
from entropy_kernels.trainer.files import LOCK, OwnFiles
from entropy_kernels.trainer.log import MetricsLog, read_rows
from entropy_kernels.trainer.start import build_policy, check_model, load_policy
from entropy_kernels.trainer.tensorfile import load_tree, save_tree
from trainer_setup import SHORT, TINY, EasyTask, again, config, contents, easy, rows_without_times  # noqa: F401

trained_run, run = trainer_setup.trained_run, trainer_setup.run  # fixtures


def weights(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = state["modules"]["policy"]
    return found


# --- checkpoints -----------------------------------------------------------------------------------------------------


def flip(path: Path, position: int, bits: int = 0x10) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= bits
    path.write_bytes(data)


def test_any_damage_to_a_checkpoint_is_seen(run: Path) -> None:
    path = run / "checkpoint.safetensors"
    good = path.read_bytes()
    header = 8 + int.from_bytes(good[:8], "little")
    assert checkpoint.load_checkpoint(path)["step"] == 3
    assert load_file(path).keys() >= {"modules/policy/lm_head.weight", "optimizers/policy/state/0/exp_avg"}
    draw = random.Random(0)
    places = [*range(12), *range(0, header, header // 60), *range(header - 12, header + 12), len(good) - 1, 64, 65]
    places += [good.index(b"sha256"), *(good.index(b"sha256") + 11 + i for i in range(64))]  # the checksum's own digits
    for on in [*places, *draw.sample(range(len(good)), 60)]:
        flip(path, on, draw.choice([1 << bit for bit in range(8)]))
        with pytest.raises(
            ValueError, match=r"resume: expected a checkpoint at .*checkpoint\.safetensors, got a .*damaged"
        ):
            checkpoint.load_checkpoint(path)
        path.write_bytes(good)
    path.write_bytes(good.replace(b"}   ", b"}\n\t ", 1) if b"}   " in good else good + b" ")  # means the same as JSON
    with pytest.raises(ValueError, match="damaged"):
        checkpoint.load_checkpoint(path)
    for size in (1, 7, 8, 10, header, len(good) // 2, len(good) - 1, *draw.sample(range(len(good)), 9)):
        path.write_bytes(good[:size])
        with pytest.raises(ValueError, match=r"checkpoint\.safetensors, got a file that was cut off") as caught:
            checkpoint.load_checkpoint(path)
        assert "\n" not in str(caught.value) and "checkpoint.previous.safetensors" in str(caught.value)
    path.write_bytes(good + b"\0")
    with pytest.raises(ValueError, match=rf"expected {len(good)} bytes, got {len(good) + 1}"):
        checkpoint.load_checkpoint(path)


def test_a_damaged_checkpoint_is_told_with_the_way_out_and_that_works(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run / "checkpoint.safetensors"
    path.write_bytes(path.read_bytes()[:5000])
    before = contents(run)
    assert main(["from-config", str(run / "config.json"), "--out", str(run), "--resume", "--steps", "4"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith(
        f"python -m entropy_kernels.trainer: error: --resume: expected a checkpoint at {path}, got a file that"
    )
    assert f"mv {path.with_name('checkpoint.previous.safetensors')} {path}" in error
    assert contents(run) == before
    path.with_name("checkpoint.previous.safetensors").replace(path)
    again(run)
    assert [row["step"] for row in read_rows(run / "metrics.jsonl")] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.write_bytes(b""), "got an empty file"),
        (lambda path: path.write_bytes(bytes(4000)), "cut off, is damaged, or is of another program"),
        (lambda path: path.mkdir(), "got a folder"),
        (lambda path: torch.save({"model": {}}, path), "cut off, is damaged, or is of another program"),
        (lambda path: save_file({"a": torch.ones(3)}, path), "damaged or of another program .it has no checksum"),
        (lambda path: save_tree(path, {"a": torch.ones(3)}), "got a file of another program"),
        (lambda path: save_tree(path, {"format": 99, "step": 1, "config": {}}), "from a newer version.*update"),
        (lambda path: path.symlink_to("nowhere"), "got none"),
    ],
)  # fmt: skip
def test_what_is_no_checkpoint_is_told(tmp_path: Path, make: Any, message: str) -> None:
    path = tmp_path / "checkpoint.safetensors"
    make(path)
    with pytest.raises((ValueError, OSError), match=rf"resume: expected a checkpoint at .*{message}"):
        checkpoint.load_checkpoint(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *((lambda state, name=name: state.pop(name), "a file of another program")
          for name in ("step", "config", "modules", "optimizers", "generators", "torch_rng", "cuda_rng",
                       "format", "changes")),
        (lambda state: state.update(config=None), "a file of another program"),
        (lambda state: state.update(step="3"), "a file of another program"),
        (lambda state: state.update(row=[]), "a file of another program"),
        (lambda state: weights(state).popitem(), "one of another model"),
        (lambda state: weights(state).update({k: v[:1] for k, v in weights(state).items()}), "one of another model"),
        (lambda state: state["modules"].update(policy=None), "a file of another program"),
        (lambda state: state["modules"].pop("policy"), "one of another model"),
        (lambda state: state["optimizers"].pop("policy"), "one of another optimizer"),
        (lambda state: state["optimizers"]["policy"].update(param_groups=[]), "one of another optimizer"),
        (lambda state: state["optimizers"]["policy"]["state"][0].update(exp_avg=torch.ones(2, 2)),
         "one of another optimizer"),
        (lambda state: state["generators"].pop("sampler"), "one of another generator"),
        (lambda state: state.update(torch_rng=torch.ones(3)), "one of another generator"),
    ],
)  # fmt: skip
def test_a_checkpoint_that_is_whole_and_not_ours(run: Path, change: Any, message: str) -> None:
    path = run / "checkpoint.safetensors"
    state = checkpoint.load_checkpoint(path)
    change(state)
    save_tree(path, state)
    before = contents(run)
    with pytest.raises(ValueError, match=rf"resume: expected a checkpoint at .*got {message}; the one before is kept"):
        again(run)
    assert contents(run) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is unreadable for root")
def test_a_checkpoint_that_cannot_be_read(run: Path) -> None:
    (run / "checkpoint.safetensors").chmod(0)
    with pytest.raises(OSError, match=r"resume: expected a checkpoint at .*cannot be read \(Permission denied\)"):
        again(run)


def test_tied_weights_and_views_are_saved_once_and_come_back(tmp_path: Path) -> None:
    base, path = torch.arange(12.0).view(3, 4), tmp_path / "x.safetensors"
    tree = {
        "a": base, "tied": base.view(3, 4), "turned": base.T, "row": base[1], "empty": torch.ones(0, 3),
        "kinds": [torch.tensor(True), torch.ones(2, dtype=torch.bfloat16), torch.tensor(7)],
        "exact": 0.1 + 0.2, "x": float("nan"),
        "state": {0: {"step": (1, -0.0, None)}, "$tensor": "a", "1": "\ud800\u00e9"}, "a/b": 2**70, "none": {},
        "/a": torch.zeros(1),
    }  # fmt: skip
    save_tree(path, tree)
    got = load_tree(path)
    assert repr(got) == repr({**tree, "turned": tree["turned"].contiguous()})
    assert got["a"].data_ptr() == got["tied"].data_ptr()
    first = path.read_bytes()
    save_tree(path, tree)
    assert path.read_bytes() == first
    with pytest.raises(TypeError, match=r"/state/x: expected tensors, numbers, texts, or dicts and lists .*, got set"):
        save_tree(path, {"state": {"x": {1}}})
    assert path.read_bytes() == first


def test_modules_that_a_checkpoint_has_not_are_named(run: Path) -> None:
    path = run / "checkpoint.safetensors"
    state = checkpoint.load_checkpoint(path)
    for name, said in (("policy", "model"), ("critic", "critic")):
        with pytest.raises(ValueError, match=f"of this configuration's {said}, got one of another {said}"):
            checkpoint.restore(state, path, modules={name: torch.nn.Linear(2, 1)}, optimizers={}, generators={})


# --- the log ---------------------------------------------------------------------------------------------------------


def steps_after(run: Path) -> list[int]:
    again(run)
    return [row["step"] for row in read_rows(run / "metrics.jsonl")]


@pytest.mark.parametrize(
    "line",
    [
        b'{"step": 1, "ent',
        b"",
        b"\0\0\0\0",
        b"[1]",
        b"7",
        b'{"entropy": 1.0}',
        b'{"step": "1"}',
        b"\xff\xfe",
        b"[" * 100_000,
    ],
)
def test_a_broken_line_takes_no_other_with_it(run: Path, line: bytes) -> None:
    path = run / "metrics.jsonl"
    lines = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([lines[0], line, *lines[2:]]))  # and without an end of the last line
    with pytest.warns(UserWarning, match=r"metrics\.jsonl: no row of step 1 of the 3"):
        MetricsLog(run, keep_before=3).close()
    kept = run / "metrics.broken"
    assert kept.read_bytes() == line + b"\n" if line else not kept.exists()
    assert [json.loads(line)["step"] for line in path.read_bytes().splitlines()] == [0, 2]


def test_a_broken_line_is_told_with_its_number(run: Path) -> None:
    path = run / "metrics.jsonl"
    path.write_bytes(path.read_bytes().replace(b"\n", b"\nhalf a li\n", 1))
    with pytest.warns(UserWarning, match=r"metrics\.jsonl: line 2 is no row and is left out; kept in metrics\.broken"):
        assert steps_after(run) == [0, 1, 2, 3, 4]


def test_a_mark_before_the_first_row(run: Path) -> None:
    path = run / "metrics.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert steps_after(run) == [0, 1, 2, 3, 4]


def test_zeros_before_a_row_and_rows_twice(run: Path) -> None:
    path = run / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[1] + b"\0" * 4096 + lines[0] + lines[1] + lines[2] + b'{"step": 9}\n')
    assert steps_after(run) == [0, 1, 2, 3, 4]


def test_a_log_that_is_gone_or_of_another_run(run: Path) -> None:
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    other = "".join(json.dumps({**json.loads(line), "entropy": 0.123}) + "\n" for line in lines)
    path.write_text(other)
    before = contents(run)
    with pytest.raises(
        ValueError, match=r"resume: expected in .*metrics\.jsonl the log of the run in checkpoint\.safetensors"
    ):
        again(run)
    assert contents(run) == before
    path.unlink()
    with pytest.warns(UserWarning, match=r"metrics\.jsonl: not there; the log begins anew at step 3"):
        assert steps_after(run) == [3, 4]


def test_two_logs_in_a_row_keep_every_line(tmp_path: Path) -> None:
    for first in (0, 2):
        log = MetricsLog(tmp_path, keep_before=first)
        for step in range(first, first + 3):
            log.write({"step": step, "entropy": float(first)})
        log.close()
    assert [row["entropy"] for row in read_rows(tmp_path / "metrics.jsonl")] == [0.0, 0.0, 2.0, 2.0, 2.0]


# --- models ----------------------------------------------------------------------------------------------------------


def remove(name: str) -> Any:
    return lambda folder: [path.unlink() for path in folder.glob(name)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (shutil.rmtree, "which does not exist"),
        (lambda folder: (shutil.rmtree(folder), folder.write_text("x")), "which is a file"),
        (remove("config.json"), "which has no config.json"),
        (remove("*.safetensors"), "which has no weights"),
        (remove("tokenizer*"), "which has no tokenizer"),
        (lambda folder: (folder / "config.json").write_text("{"), "whose config.json cannot be read"),
        (lambda folder: (folder / "config.json").write_text("[]"), "whose config.json cannot be read"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "nosuch"}'), "that transformers can load"),
        (lambda folder: os.truncate(folder / "model.safetensors", 5000), "model.safetensors is damaged: expected"),
        (lambda folder: os.truncate(folder / "model.safetensors", 50), "it ends after 50 bytes, within its header"),
        (lambda folder: os.truncate(folder / "model.safetensors", 0), "which has no weights"),
        (lambda folder: flip(folder / "model.safetensors", 12), "its header cannot be|transformers can load|lacks"),
        (
            lambda folder: (folder / "x.index.json").write_text('{"weight_map": {"a": "b.safetensors"}}'),
            "which has no b.safetensors, one of the files that x.index.json names",
        ),
    ],
)  # fmt: skip
def test_a_folder_that_is_no_model_is_told(run: Path, change: Any, message: str) -> None:
    change(run / "model")
    for raises in (
        lambda: load_policy(run / "model", TINY, EasyTask()),
        lambda: build_policy(dataclasses.replace(TINY, model=str(run / "model")), EasyTask()),
    ):
        with pytest.raises((ValueError, OSError), match=rf"^(model|warm_start_from): expected .*({message})") as caught:
            raises()
        assert "\n" not in str(caught.value) and "repo" not in str(caught.value).lower()


def test_a_model_that_lacks_weights_is_refused(run: Path) -> None:
    path = run / "model" / "model.safetensors"
    weights = load_file(path)
    save_file({k: v for k, v in weights.items() if "lm_head" not in k and "embed" not in k}, path, {"format": "pt"})
    with pytest.raises(
        ValueError, match=r"warm_start_from: expected weights for the whole model, got .*, which lacks \d"
    ):
        load_policy(run / "model", TINY, EasyTask())


def test_names_of_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("./nosuch", "../nosuch", "/nosuch/model", "~/nosuch", "nosuch/", "a/b/c"):
        assert main(["--model", name, "--out", str(tmp_path / "x")]) == 2
        assert capsys.readouterr().err == (
            "python -m entropy_kernels.trainer: error: --model: expected a folder with a model of transformers, got "
            f"{name}, which does not exist\n"
        )
    assert not (tmp_path / "x").exists()
    check_model("Qwen/Qwen3-0.6B")  # of the hub
    for name in ("", "a b c", "-a", "a..b", "a--b", "a/b c", "a" * 99):
        with pytest.raises(ValueError, match=rf"model: expected tiny, smollm2, a folder or a name of .*got '{name}'$"):
            check_model(name)


def test_a_warm_start_that_is_damaged_is_made_anew(tmp_path: Path) -> None:
    settings = dataclasses.replace(TINY, warm_steps=1, warm_batch=4)
    board = ProgressBoard(enabled=False)
    path = sweep.supervised_start(settings, tmp_path, board) / "model.safetensors"
    good = path.read_bytes()
    for damage in (lambda: os.truncate(path, 100), lambda: (tmp_path / "warm_start.json").write_text("{")):
        damage()
        sweep.supervised_start(settings, tmp_path, board)
        assert path.read_bytes() == good


def test_fields_that_came_later_were_at_their_defaults() -> None:
    assert check_resumable({}, TrainerConfig(), finished=0) == {}
    with pytest.raises(ValueError, match=r"lr: expected 0\.0003 \(as saved\), got 1"):
        check_resumable({}, TrainerConfig(lr=1.0), finished=0)


def test_lock_files_are_no_part_of_the_record(run: Path) -> None:
    assert (run / LOCK).exists() and LOCK not in OwnFiles(run, "run").names
    assert rows_without_times(run)[0]["unscored"] == 0

"""The trainer's command line: what flags mean, what does nothing, what is said at the start and after Ctrl-C."""

from __future__ import annotations

import dataclasses
import json
import re
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("tyro")

from entropy_kernels._console import print_text
from entropy_kernels.trainer import ppo, signals, sweep
from entropy_kernels.trainer.__main__ import main
from entropy_kernels.trainer.checks import idle
from entropy_kernels.trainer.config import TrainerConfig
from entropy_kernels.trainer.files import write_json
from entropy_kernels.trainer.flags import as_typed, parse
from entropy_kernels.trainer.log import RunProgress, announced, read_rows
from entropy_kernels.trainer.methods import METHODS
from trainer_setup import SHORT, TINY, Here, config, easy, runs_here  # noqa: F401

PROG = "python -m entropy_kernels.trainer"


def test_flags_are_read_as_their_fields_are_annotated() -> None:
    words = ["--out", "~/x", "--steps=7", "--lr", "1e-3", "--no-tensorboard", "--resume", "--cov_ratio", "none"]
    words += ["--max-new-tokens", "9", "--resume-changes", "lr", "task", "--method-options", "a=1", "b=None", "c=x"]
    config, typed = parse(TrainerConfig(cov_ratio=0.5), words, PROG, "")
    assert config == TrainerConfig(
        out=Path("~/x").expanduser(), steps=7, lr=1e-3, tensorboard=False, resume=True, cov_ratio=None,
        max_new_tokens=9, resume_changes=("lr", "task"), method_options={"a": 1, "b": None, "c": "x"},
    )  # fmt: skip
    assert typed == {"out", "steps", "lr", "tensorboard", "resume", "cov_ratio", "max_new_tokens", "resume_changes",
                     "method_options"}  # fmt: skip
    assert parse(config, [], PROG, "") == (config, set())
    words = ["--cov-low", "-1e-3", "--cov-high=-1E+2", "--kl-coef", "-3"]
    changed = dataclasses.replace(config, cov_low=-1e-3, cov_high=-100.0, kl_coef=-3.0)
    assert parse(config, words, PROG, "") == (changed, {"cov_low", "cov_high", "kl_coef"})
    for word, value in (("False", False), ("true", True), ("none", None)):
        assert parse(config, ["--whiten-advantages", word], PROG, "")[0].whiten_advantages is value


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--steps", "five"], ("--steps: expected an integer, got 'five'", "--steps INT")),
        (["--lr", "fast"], ("--lr: expected a number, got 'fast'", "--lr FLOAT")),
        (["--cov-ratio", "x"], ("--cov-ratio: expected a number or none, got 'x'", "--cov-ratio FLOAT|none")),
        (["--whiten-advantages", "no"], ("--whiten-advantages: expected true, false or none, got 'no'", "true|false|")),
        (["--steps"], ("--steps", "Expected 1 value")),
        (["--method", "KL-Cov"], ("--method", "'KL-Cov'", "did you mean kl_cov?")),
        (["--head", "logit"], ("--head: expected one of linear, logits, torch,", "'logit'", "logits?")),
        (["--no-tensorbord"], ("--no-tensorbord", "--tensorboard, --no-tensorboard")),
        (["--warm", "3"], ("--warm,", "--warm-steps INT")),
        (["--tensorboard", "False"], ("Unrecognized options: False",)),
        (["--method-options", "a"], ("--method-options", "expected OPTION=VALUE, got 'a'")),
    ],
)
def test_slips(words: list[str], said: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse(TrainerConfig(), words, PROG, "")
    error = capsys.readouterr().err
    assert stop.value.code == 2 and all(part in error for part in (*said, f"{PROG} --help")), error


def test_an_error_names_the_flag_that_was_typed() -> None:
    message = "minibatches, micro_batches: expected a product that divides prompts_per_step = 3, got 4"
    assert as_typed(message, {"micro_batches"}).startswith("--micro-batches: expected a product")
    assert as_typed(message, {"minibatches", "prompts_per_step"}) == (
        "--minibatches: expected a product that divides --prompts-per-step = 3, got 4"
    )
    assert as_typed(message, set()) == message
    assert as_typed("no colon, steps", {"steps"}) == "no colon, steps"


def test_from_config_takes_a_run_and_explains_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_json(tmp_path / "config.json", {**config(tmp_path / "run", **SHORT).to_dict(), "lr": -1.0})
    assert main(["from-config", str(tmp_path)]) == 2
    assert "lr: expected a finite number > 0, got -1.0" in capsys.readouterr().err
    assert main(["from-config", str(tmp_path / "x")]) == 2
    assert f"error: from-config: expected a file, got {tmp_path / 'x'}, which" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        main(["from-config", "--help"])
    assert stop.value.code == 0 and f"{PROG} from-config FILE" in capsys.readouterr().out
    assert main(["comparre"]) == 2
    assert "(quickstart, reproduce, compare, from-config, replay)" in capsys.readouterr().err


# --- what does nothing ------------------------------------------------------------------------------------------------


def test_a_flag_that_does_nothing_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, said in (
        (["--target-method", "weight"], "--target-method: does nothing without target_entropy"),
        (["--method", "kl_cov", "--clip-high", "0.3"], "--clip-high: does nothing under kl_cov"),
        (["--kl-coef", "1"], "--kl-coef: does nothing under grpo"),
        (["--target-entropy", "0.4", "--cov-ratio", "0.1"], "--cov-ratio: does nothing under a target entropy"),
        (["--partial-credit"], "--partial-credit: does nothing on walk"),
        (["--resume-changes", "lr"], "--resume-changes: does nothing without --resume"),
        (["--warm-steps", "0", "--warm-lr", "1"], "--warm-lr: does nothing with --warm-steps = 0"),
        (["--model", "smollm2", "--num-layers", "3"], "--num-layers: does nothing with the model smollm2"),
        (["--head", "torch", "--memory-budget", "9"], "--memory-budget: does nothing under head = torch"),
        (["--gae-lambda", "0.9"], "--gae-lambda: does nothing under advantage = grpo"),
        (["--advantage", "gae", "--value-coef", "2"], "--value-coef: does nothing with a separate critic"),
        (["reproduce", "--seed", "5"], "--seed: expected none where seeds names those of the runs (0, 1, 2), got 5"),
    ):
        assert main([*words, "--out", str(tmp_path / "x")]) == 2, words
        assert f"{PROG}: error: {said}" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_a_field_of_a_file_that_does_nothing_is_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What several runs have in common cannot fit each of them."""
    write_json(tmp_path / "c.json", {**config(tmp_path / "run", **SHORT, kl_coef=1.0).to_dict(), "progress": True})
    with pytest.warns(UserWarning, match=r"^kl_coef = 1\.0 does nothing under grpo$"):
        assert main(["from-config", str(tmp_path / "c.json")]) == 0
    capsys.readouterr()
    assert main(["from-config", str(tmp_path / "c.json"), "--no-progress", "--overwrite"]) == 0
    said = capsys.readouterr()
    assert said.err == "" and re.fullmatch(rf"run: {tmp_path / 'run'}  H \d\.\d+ .* pass@1 \S+ .*\n", said.out)


def test_what_is_said_to_do_nothing_does_nothing() -> None:
    """Of the numbers of methods: that the options of the method are the same without them."""
    from entropy_kernels.trainer.methods import options_of

    changes: dict[str, Any] = {"cov_ratio": 0.5, "kl_coef": 7.0, "clip_low": 0.1, "clip_high": 0.9}
    for method in METHODS:
        for name, value in changes.items():
            usual = TrainerConfig(method=method)
            changed = dataclasses.replace(usual, **{name: value})
            same = options_of(changed) == options_of(usual)
            if METHODS[method].decides is not None:
                assert (name in idle(changed)) is same, (method, name)
    assert idle(TrainerConfig()) == {}


def test_every_sweep_and_committed_configuration_is_without_idle_fields(tmp_path: Path) -> None:
    for name in ("quickstart", "reproduce"):
        for run in sweep.planned(name, dataclasses.replace(sweep.SWEEPS[name].flags, out=tmp_path)).runs.values():
            assert idle(run) == {}, run.out


# --- what is said -----------------------------------------------------------------------------------------------------


def test_a_run_says_what_it_does_and_for_how_long(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert re.fullmatch(
        r"GRPO on walk, model tiny: 240 steps after 800 of a supervised start into runs/single; about \d+ \w+ on 1 "
        r"idle core\. Ctrl-C stops; --resume goes on from the last checkpoint, one every 60 steps\.",
        announced(ppo.prepared(TrainerConfig())[0]),
    )
    other = TrainerConfig(model="smollm2", target_entropy="0.4", warm_steps=0, save_every=0, device="cpu")
    assert announced(other) == (
        "Target entropy 0.4 on walk, model smollm2: 240 steps into runs/single; how long is known after the first "
        "steps. Ctrl-C stops; --resume goes on from the last checkpoint."
    )
    plan = sweep.planned("quickstart", dataclasses.replace(sweep.SWEEPS["quickstart"].flags, out=tmp_path))
    assert plan.announced.startswith(
        "GRPO, Clip-Cov, KL-Cov, Target entropy, Random tokens dropped: 5 runs of 240 steps after 800 supervised ones "
        f"that they share, 2 at a time, into {tmp_path}, with report.html at the end; about "
    )
    write_json(tmp_path / "c.json", {**config(tmp_path / "run").to_dict(), "measure_memory": True, "progress": True})
    assert main(["from-config", str(tmp_path / "c.json")]) == 0
    first, begin, *lines, memory, run = capsys.readouterr().out.splitlines()
    assert first.startswith("GRPO on walk, model tiny: 3 steps into") and begin == "train: 0/3"
    assert lines[-1].startswith("train: 3/3  H ") and "pass@1" in lines[-1] and "(step" not in lines[-1]
    assert memory.startswith("Peak memory of a micro-batch") and run == f"run: {tmp_path / 'run'}"


@pytest.mark.parametrize("stop", [KeyboardInterrupt, signal.SIGTERM])
def test_a_run_that_is_stopped_says_what_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, stop: Any
) -> None:
    told, at = RunProgress.__call__, [2]

    def stopped(self: RunProgress, phase: str, done: int, *rest: Any) -> None:
        told(self, phase, done, *rest)
        if done == at[0]:
            at[0] = -1
            if stop is KeyboardInterrupt:
                raise KeyboardInterrupt
            for _ in range(2):  # the first waits for the end of the step (test_trainer_stops.py)
                signal.raise_signal(stop)

    monkeypatch.setattr(RunProgress, "__call__", stopped)
    monkeypatch.setattr(signals, "TOGETHER", 0.0)  # else the second is the first's echo
    write_json(tmp_path / "c.json", {**config(tmp_path / "run").to_dict(), **SHORT, "steps": 4})
    code, start = 130 if stop is KeyboardInterrupt else 143, ["from-config", str(tmp_path / "c.json")]

    def call(*words: str) -> str:
        assert main([*start, *words]) == code
        said, command = capsys.readouterr().err.split("\n  ")
        assert command.startswith(f"{PROG} from-config ")
        return said + "|" + " ".join(command.split()[5:])

    assert call() == f"stopped; kept in {tmp_path / 'run'}: the log alone, as there was no checkpoint yet. To begin " \
        "anew:|--overwrite"  # fmt: skip
    at[0] = 2
    kept = f"stopped; kept in {tmp_path / 'run'}: the log and the last checkpoint. To go on from there:|"
    assert call("--overwrite", "--save-every", "1") == f"{kept}--save-every 1 --resume"
    assert main([*start, "--save-every", "1", "--resume"]) == 0
    assert [row["step"] for row in read_rows(tmp_path / "run" / "metrics.jsonl")] == [0, 1, 2, 3, 4]
    at[0] = 0  # before a step, where the earlier run was to be replaced
    assert call("--overwrite") == "stopped before the first step, and nothing is kept. To begin again:|--overwrite"


def test_a_sweep_that_is_stopped_says_what_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stopped(Here):
        def __init__(self, command: list[str], **options: Any) -> None:
            if "kl_cov" in command[-1]:
                raise KeyboardInterrupt
            super().__init__(command, **options)

    runs_here(monkeypatch, Stopped)
    write_json(tmp_path / "c.json", {**TINY.to_dict(), **SHORT})
    words = ["compare", "--config", str(tmp_path / "c.json"), "--out", str(tmp_path / "out"), "--methods", "grpo"]
    assert main([*words, "kl_cov", "--torch-ops", "none"]) == 130
    captured = capsys.readouterr()
    assert captured.err == (
        f"stopped; kept in {tmp_path / 'out'}: 1 of 2 runs complete. To go on, with what is complete as it is:\n"
        f"  {PROG} {' '.join(words)} kl_cov --torch-ops none --reuse\n"
    )
    assert captured.out.startswith("GRPO, KL-Cov: 2 runs of 1 steps, 1 at a time, into ")
    assert "grpo: 1/1  H" in captured.out and "all runs: 1/2  1 of 2 complete" in captured.out
    assert not json.loads((tmp_path / "out" / "grpo" / "config.json").read_text())["progress"]


def test_on_a_terminal_sentences_are_folded_between_words_and_commands_are_whole(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    sentence, command = "what is kept " * 12, "  " + "--word " * 20
    for terminal in (False, True):
        monkeypatch.setattr(sys.stderr, "isatty", lambda answer=terminal: answer)
        print_text(f"{sentence}\n{command}", sys.stderr)
        *lines, last = capsys.readouterr().err.splitlines()
        assert last == command and " ".join(lines).split() == sentence.split()
        assert len(lines) == (2 if terminal else 1) and max(map(len, lines)) <= (80 if terminal else len(sentence))


def test_train_may_stand_before_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As it does after `entropy-kernels`."""
    assert main(["train", "--temperature", "-1"]) == 2
    assert "error: --temperature: expected a finite number > 0" in capsys.readouterr().err
    assert main(["train", "compare", "--out", str(tmp_path / "x")]) == 2
    assert "--config: expected a JSON FILE" in capsys.readouterr().err

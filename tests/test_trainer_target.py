"""A target entropy in the trainer: planned once per rollout, measured after it, kept in checkpoints; schedules."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

import entropy_kernels as ek
from entropy_kernels.trainer import checkpoint, ppo, probes
from entropy_kernels.trainer.__main__ import main
from entropy_kernels.trainer.config import TrainerConfig
from entropy_kernels.trainer.log import describe_row
from entropy_kernels.trainer.methods import TARGETS, target_of
from entropy_kernels.trainer.probes import Probe, Step
from entropy_kernels.trainer.rollout import all_tokens
from entropy_kernels.trainer.schedule import Schedule
from test_trainer_methods import rollout_of
from trainer_setup import (  # noqa: F401
    SHORT,
    TINY,
    assert_same_run,
    assert_same_state,
    config,
    easy,
    policy_weights,
    resumed,
    rows_without_times,
)

#: About where the untrained policy is, so that the loop has something to do both ways.
START = "4.58"
TARGET = {**SHORT, "steps": 4, "target_entropy": START}


# --- schedules -------------------------------------------------------------------------------------------------------


def test_schedule_by_hand() -> None:
    assert [Schedule.parse("x", "0.4")(step) for step in (0, 7)] == [0.4, 0.4]
    falling = Schedule.parse("x", "10:0.8,20:0.3")
    assert [falling(step) for step in (0, 10, 15, 20, 99)] == pytest.approx([0.8, 0.8, 0.55, 0.3, 0.3])
    jump = Schedule.parse("x", "0:1,120:1,120:2")
    assert [jump(step) for step in (0, 119, 120, 121)] == [1, 1, 2, 2]


def test_the_learning_rate_follows_its_schedule(tmp_path: Path) -> None:
    seen: list[float] = []

    class Watch(Probe):
        def after_update(self, step: Step) -> None:
            now = [p.detach() for p in step.policy.model.parameters()]
            seen.append(max(float((p - q).abs().max()) for p, q in zip(now, before, strict=True)))

        def after_rollout(self, step: Step) -> None:
            before[:] = [p.detach().clone() for p in step.policy.model.parameters()]

    before: list[torch.Tensor] = []
    settings = {**SHORT, "steps": 3, "minibatches": 1, "grad_clip": 0.0}
    ppo.train(config(tmp_path / "run", **settings, lr_schedule="0:1,1:0,2:2"), probes=[Watch(), probes.UpdateMetrics()])
    # Adam's first step is the learning rate, in each weight that has a gradient
    assert seen[0] == pytest.approx(TINY.lr, rel=1e-3) and seen[1] == 0 and seen[2] > TINY.lr
    assert [row.get("lr") for row in rows_without_times(tmp_path / "run")] == [TINY.lr, 0, 2 * TINY.lr, None]


def test_a_factor_of_one_changes_nothing(tmp_path: Path) -> None:
    ppo.train(config(tmp_path / "none", steps=2))
    ppo.train(config(tmp_path / "one", steps=2, lr_schedule="1"))
    assert_same_state(tmp_path / "none", tmp_path / "one")
    rows, scheduled = (rows_without_times(tmp_path / name) for name in ("none", "one"))
    assert scheduled == rows


# --- the plan --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum-norm", "token-sum"])
def test_a_coefficient_is_the_loss_s(mode: str) -> None:
    """By the gradient of the losses themselves, over two epochs of three unequal minibatches."""
    rollout, settings = rollout_of(), dataclasses.replace(TINY, loss_agg_mode=mode, epochs=2)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(5)
    order = [rows for _ in range(2) for rows in torch.randperm(16, generator=generator).chunk(3)]
    expected = torch.zeros(rollout.mask.shape, dtype=torch.float64)
    for rows in order:
        values = torch.zeros(rollout.mask[rows].shape, dtype=torch.float64, requires_grad=True)
        ek.aggregate(values, rollout.mask[rows], loss_agg_mode=mode).backward()
        assert values.grad is not None
        expected[rows] += values.grad / 2
    found = all_tokens(rollout, order, settings).coefficient
    assert isinstance(found, torch.Tensor)
    torch.testing.assert_close(found * rollout.mask, expected, rtol=1e-6, atol=0)


class Watch(Probe):
    """Keeps each step, with what its updates did to the tokens of the rollout."""

    def __init__(self) -> None:
        self.steps: list[Step] = []

    def after_step(self, step: Step) -> None:
        self.steps.append(step)


@pytest.mark.parametrize("method", TARGETS)
def test_all_updates_of_a_rollout_follow_one_plan(tmp_path: Path, method: str) -> None:
    watch = Watch()
    settings = config(tmp_path / "run", **TARGET, target_method=method, epochs=2, micro_batches=2)
    ppo.train(settings, probes=[watch, probes.UpdateMetrics()])
    assert len(watch.steps) == 4
    touched = 0
    for step, row in zip(watch.steps, rows_without_times(tmp_path / "run"), strict=False):
        plan = step.plan
        assert plan is not None and len(step.updates) == 4
        for update in step.updates:
            for rows, control in zip(update.rows, update.controls, strict=True):
                assert control is not None
                for name, value in plan._asdict().items():
                    if isinstance(value, torch.Tensor):
                        own = getattr(control, name)
                        assert torch.equal(own, value[rows] if value.dim() else value), name
        mask = step.sampled.mask
        treated = torch.zeros_like(mask) if plan.dropped is None else plan.dropped
        treated = treated if plan.token_weight is None else plan.token_weight != 1
        assert row["tokens_touched"] == 2 * int(treated.sum()) and not (treated & ~mask).any()
        kept = ~treated if plan.token_weight is None else plan.token_weight
        change = -(step.sampled.advantages * kept * step.sampled.vocab_covariance)  # not once more for each epoch
        assert probes.predicted_change(step) == pytest.approx(probes.mean_over(change, mask), rel=1e-5, abs=1e-12)
        touched += int(treated.sum())
    assert (touched > 0) == (method != "bonus")
    before, after = (probes.mean_over(x, step.sampled.mask) for x in (step.sampled.entropy, step.entropy_after()))
    state = checkpoint.load_checkpoint(tmp_path / "run" / "checkpoint.safetensors")["controller"]
    assert state["calls"] == 4 and state["memory"]["measured_change"] == pytest.approx(after - before, rel=1e-9)
    assert ("entropy_coef" in watch.steps[0].row) == (method == "bonus")


@pytest.mark.parametrize(
    "changes",
    [
        {"loss_agg_mode": "token-mean"},
        {"loss_agg_mode": "seq-mean-token-mean", "advantage": "rloo"},
        {"loss_agg_mode": "seq-mean-token-sum-norm", "head": "logits", "epochs": 2},
        {"target_method": "weight", "head": "torch", "selection_logprob": "old"},
        {"target_method": "bonus"},
    ],
)
def test_micro_batches_share_a_trajectory_under_a_target(tmp_path: Path, changes: dict[str, object]) -> None:
    for micro_batches in (1, 4):
        ppo.train(
            config(tmp_path / str(micro_batches), **{**TARGET, "steps": 2, **changes}, micro_batches=micro_batches)
        )
    one, four = (policy_weights(tmp_path / n) for n in ("1", "4"))
    for name, value in one.items():
        torch.testing.assert_close(four[name], value, rtol=0, atol=2e-5)
    rows = [rows_without_times(tmp_path / n) for n in ("1", "4")]
    assert [row.get("tokens_touched") for row in rows[0]] == [row.get("tokens_touched") for row in rows[1]]


def test_a_target_that_cannot_bind_leaves_the_run_as_it_is(tmp_path: Path) -> None:
    """Far below the entropy no token is touched: the same weights as without a target, bit for bit."""
    ppo.train(config(tmp_path / "none", steps=2, epochs=2))
    ppo.train(config(tmp_path / "low", steps=2, epochs=2, target_entropy="0.1"))
    one, other = (policy_weights(tmp_path / n) for n in ("none", "low"))
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    free, held = (rows_without_times(tmp_path / name) for name in ("none", "low"))
    for without, row in zip(free, held, strict=True):
        added = {"target_entropy", "wanted_dh", "planned_dh", "target_gain", "target_saturated"} & row.keys()
        added |= {name for name in row if name.startswith("method/")}  # what the target remembers
        # the predicted change is summed in another order, over the rollout in place of its minibatches
        assert {k: v for k, v in row.items() if k not in added} == pytest.approx(without, rel=1e-6)


def test_one_more_forward_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = []
    made = probes.entropy_now
    monkeypatch.setattr(probes, "entropy_now", lambda step: counts.append(step.number) or made(step))
    for measured in (True, False):
        settings = {**TARGET, "measure_entropy_change": measured}
        ppo.train(config(tmp_path / str(measured), **settings))
        assert counts == [0, 1, 2, 3]
        counts.clear()
    rows = [rows_without_times(tmp_path / name) for name in ("True", "False")]
    assert rows[0] == rows[1] and "measured_dh" in rows[0][0]


# --- over a run ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", TARGETS)
def test_a_run_with_a_target_resumes_bit_for_bit(tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {**TARGET, "target_entropy": "0:4.6,4:4.57", "target_method": method}
    whole, _ = resumed(tmp_path, 2, **settings)
    # the test sees the state: without it the second half is another one
    monkeypatch.setattr(ek.TargetEntropy, "load_state_dict", lambda self, state: None)
    ppo.train(config(tmp_path / "stopped", **settings, resume=True))
    assert rows_without_times(tmp_path / "stopped") != rows_without_times(whole)


def test_a_run_that_is_killed_goes_on(tmp_path: Path) -> None:
    class Killed(Probe):
        def after_update(self, step: Step) -> None:  # planned, and not yet observed
            if step.number == 3:
                raise KeyboardInterrupt

    ppo.train(config(tmp_path / "whole", **TARGET, save_every=1))
    settings = config(tmp_path / "killed", **TARGET, save_every=1)
    with pytest.raises(KeyboardInterrupt):
        ppo.train(settings, probes=[*probes.default_probes(settings, ppo.backward), Killed()])
    ppo.train(dataclasses.replace(settings, resume=True))
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


def test_a_resumed_run_keeps_its_target(tmp_path: Path) -> None:
    ppo.train(config(tmp_path / "run", **TARGET))
    for changes in ({"target_entropy": "4.5"}, {"target_method": "weight"}, {"lr_schedule": "2"}):
        name = next(iter(changes))
        with pytest.raises(ValueError, match=rf"resume: .*{name}: expected .* \(as saved\), got "):
            ppo.train(config(tmp_path / "run", **{**TARGET, "steps": 6, **changes}, resume=True))


def test_a_run_goes_on_as_another_experiment_where_that_is_said(tmp_path: Path) -> None:
    ppo.train(config(tmp_path / "run", **{**TARGET, "target_entropy": None, "steps": 2, "weight_decay": 0.1}))
    changes = {"lr": 1e-3, "target_entropy": "0:9,2:4.58,6:4.5", "weight_decay": 0.0, "task": "walk?goals=0-49"}
    changed = config(tmp_path / "run", **{**TARGET, **changes}, resume=True)
    with pytest.raises(ValueError, match=r"resume: .*target_entropy: expected None \(as saved\), got '0:9"):
        ppo.train(dataclasses.replace(changed, resume_changes=("lr", "task", "weight_decay")))
    with pytest.raises(ValueError, match=r"target_entropy.*at most log\(vocab_size\).* got 9"):
        ppo.train(dataclasses.replace(changed, resume_changes=tuple(changes)))
    changed.target_entropy = "0:4.0,2:4.58,6:4.5"
    ppo.train(dataclasses.replace(changed, resume_changes=tuple(changes), save_every=1))
    rows = rows_without_times(tmp_path / "run")
    # the course is over the steps of the run, not from where the target came in
    assert [row.get("target_entropy") for row in rows] == [None, None, 4.58, pytest.approx(4.56), pytest.approx(4.54)]
    state = checkpoint.load_checkpoint(tmp_path / "run" / "checkpoint.safetensors")
    group = state["optimizers"]["policy"]["param_groups"][0]
    assert (group["lr"], group["weight_decay"], state["controller"]["calls"]) == (1e-3, 0.0, 4)
    # once changed it is resumed as ever, and remembers what it was
    ppo.train(dataclasses.replace(changed, steps=5))
    about = json.loads((tmp_path / "run" / "config.json").read_text())
    expected = {"lr": [3e-3, 1e-3], "target_entropy": [None, changed.target_entropy], "weight_decay": [0.1, 0.0]}
    assert about["changes"] == [{"step": 2, "task": ["walk", "walk?goals=0-49"], **expected}]
    assert TrainerConfig.from_json(tmp_path / "run" / "config.json").resume_changes == ()
    # another method of holding begins anew
    ppo.train(dataclasses.replace(changed, steps=6, target_method="bonus", resume_changes=("target_method",)))
    about = json.loads((tmp_path / "run" / "config.json").read_text())
    assert [change["step"] for change in about["changes"]] == [2, 5]


def test_a_change_that_nobody_made_changes_nothing(tmp_path: Path) -> None:
    ppo.train(config(tmp_path / "whole", **TARGET))
    ppo.train(config(tmp_path / "halves", **{**TARGET, "steps": 2}))
    ppo.train(config(tmp_path / "halves", **TARGET, resume=True, resume_changes=("lr", "task")))
    assert_same_run(tmp_path / "whole", tmp_path / "halves")
    assert "changes" not in json.loads((tmp_path / "halves" / "config.json").read_text())


def test_what_is_logged(tmp_path: Path) -> None:
    ppo.train(config(tmp_path / "run", **{**TARGET, "target_entropy": "0:4.6,4:4.56", "eval_every": 0}))
    rows = rows_without_times(tmp_path / "run")
    assert [row["target_entropy"] for row in rows] == pytest.approx([4.6, 4.59, 4.58, 4.57, 4.56])
    for row in rows[:-1]:
        assert all(math.isfinite(row[name]) for name in ("wanted_dh", "planned_dh", "measured_dh"))  # type: ignore
        assert row["target_saturated"] in (-1, 0, 1) and row["target_gain"] > 0  # type: ignore[operator]
        assert abs(row["wanted_dh"]) <= 0.03  # type: ignore[arg-type]
        assert row["tokens_touched"] == row["tokens_dropped"] <= row["tokens"]  # type: ignore[operator]
    assert not {"wanted_dh", "planned_dh", "target_gain"} & rows[-1].keys()
    assert f"H {rows[2]['entropy']:.3f}  target 4.580" in describe_row(rows[2])


# --- errors ----------------------------------------------------------------------------------------------------------


def test_more_than_the_vocabulary_has_is_said_before_any_training(tmp_path: Path) -> None:
    told: list[str] = []
    settings = config(tmp_path / "run", target_entropy="0:1,9:4.8", warm_steps=2)
    with pytest.raises(ValueError, match=r"target_entropy.*expected at most log\(vocab_size\) = 4\.7\d*.*got 4\.8"):
        ppo.train(settings, report=lambda phase, done, total, row: told.append(phase))
    assert not told and not (tmp_path / "run" / "metrics.jsonl").exists()


def test_options_and_numbers_from_files(tmp_path: Path) -> None:
    values = {**TINY.to_dict(), **SHORT, "out": str(tmp_path / "run"), "target_entropy": 4.58, "lr_schedule": 2}
    (tmp_path / "c.json").write_text(json.dumps({**values, "method_options": {"kp": 0.5, "max_change": 0.01}}))
    assert main(["from-config", str(tmp_path / "c.json")]) == 0
    saved = TrainerConfig.from_json(tmp_path / "run" / "config.json")
    assert (saved.target_entropy, saved.lr_schedule) == ("4.58", "2")
    target = target_of(saved)
    assert target is not None and "kp=0.5" in repr(target) and "max_change=0.01" in repr(target)
    again = ["--out", str(tmp_path / "again"), "--target-entropy", "0:4.6,9:4.5", "--target-method", "weight"]
    assert main(["from-config", str(tmp_path / "run" / "config.json"), *again]) == 0
    assert rows_without_times(tmp_path / "again")[0]["target_entropy"] == 4.6


def test_numbers_are_courses_too() -> None:
    settings = dataclasses.replace(TINY, target_entropy=0.4, lr_schedule=2)  # type: ignore[arg-type]
    settings.validate()
    assert (settings.target_entropy, settings.target_at(3), settings.lr_at(3)) == ("0.4", 0.4, 2 * TINY.lr)


@pytest.mark.filterwarnings("error")
def test_the_clip_of_a_target_is_that_of_its_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Given as options of the method, as other methods have them; and the head without our kernels selects without."""
    seen, made = [], ppo.backward
    monkeypatch.setattr(ppo, "backward", lambda *args, **more: seen.append(args[5]) or made(*args, **more))
    options = {"clip_low": 0.05, "dual_clip": 3.0}
    settings = config(tmp_path, **{**SHORT, "steps": 1}, target_entropy="0.1", head="torch", method_options=options)
    ppo.train(settings, probes=[])
    assert seen and all(given == {"surrogate": "ppo", "clip_high": 0.2, **options} for given in seen)
    target = target_of(settings, backend="torch")
    assert target is not None and target._backend == "torch"


def test_a_target_stays_with_its_run() -> None:
    base = dataclasses.replace(TINY, target_entropy="0.4", method_options={"kp": 0.3})
    other = base.under("clip_cov")
    other.validate()
    assert other.target_entropy is None and other.method_options == {} and base.under("grpo").method_options == {}

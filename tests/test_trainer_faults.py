"""What is not finite stops before a weight changes, and the batch that is kept is replayed."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("tyro")

from entropy_kernels.trainer import faults, ppo
from entropy_kernels.trainer.__main__ import main
from entropy_kernels.trainer.critic import Critic
from entropy_kernels.trainer.faults import NonFinite
from entropy_kernels.trainer.log import read_rows
from entropy_kernels.trainer.probes import Probe, Step
from entropy_kernels.trainer.start import build_policy, warm_start
from entropy_kernels.trainer.tensorfile import load_tree, save_tree
from trainer_setup import SHORT, TINY, EasyTask, config, contents, easy, rows_without_times  # noqa: F401


class Break(Probe):
    """Sets an entry of a weight at a moment of step 1, and looks at the weights then."""

    def __init__(self, weight: str, value: float, moment: str = "after_rollout") -> None:
        self.weight, self.value, self.policy, self.before = weight, value, None, {}
        setattr(self, moment, self._break)

    def _break(self, step: Step) -> None:
        self.policy = step.policy
        if step.number == 1 and not step.updates:
            dict(step.policy.model.named_parameters())[self.weight].data.view(-1)[3] = self.value
        self.before = {name: x.clone() for name, x in step.policy.model.state_dict().items()}

    def unchanged(self) -> bool:
        return all(
            torch.equal(x.view(torch.int32), self.before[name].view(torch.int32))
            for name, x in self.policy.model.state_dict().items()  # type: ignore[attr-defined]
        )


NORM = "model.norm.weight"
SETTINGS = {**SHORT, "steps": 3, "save_every": 1}


def broken(out: Path, probe: Break, **changes: Any) -> str:
    """The error of a run whose weight is broken at step 1; its weights are as they were."""
    with pytest.raises(NonFinite) as caught:
        ppo.train(config(out, **{**SETTINGS, **changes}), probes=[probe])
    assert probe.unchanged() and "\n" not in str(caught.value)
    assert [row["step"] for row in read_rows(out / "metrics.jsonl")] == [0]
    return str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"dtype": "mixed", "micro_batches": 2, "grad_clip": 0.0},
        {"method": "adaptive_entropy", "head": "logits"},
        {"method": "clip_cov", "micro_batches": 2, "cov_low": -9.0, "cov_high": 9.0, "cov_ratio": 0.1},
        {"target_entropy": "4.5", "head": "torch"},
    ],
)
def test_a_loss_that_is_not_finite_stops_before_the_weights_change(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any]
) -> None:
    out = tmp_path / "run"
    error = broken(out, Break(NORM, float("nan")), **changes)
    path, parts = out / "nonfinite.safetensors", changes.get("micro_batches", 1)
    assert re.fullmatch(
        rf"step 1, update 1: the loss of micro-batch 1 of {parts} is nan, and the gradient of \S+( and of \d+ more)? "
        rf"is not finite; no weight was changed; the batch is kept, and this replays it: python -m "
        rf"entropy_kernels\.trainer replay {path}; --resume goes on from the last checkpoint",
        error,
    )
    kept = load_tree(path)
    assert (
        kept["step"] == 1 and kept["rows"].shape == (8,) and kept["config"]["method"] == config(out, **changes).method
    )
    assert main(["replay", str(out)]) == 1
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("step 1, update 1: the loss of micro-batch 1")
    assert said[1] == f"weights that are not finite: 1: {NORM}"
    assert said[2].startswith("tokens that are not finite, of 32: 32: row ") and "log-prob nan" in said[2]
    assert f"loss of micro-batch 1 of {parts}: nan (was nan, the same bits)" in said
    assert said[-2].startswith("parameters whose gradient is not finite: ") and said[-1] == "not finite again"
    ppo.train(config(out, **{**SETTINGS, **changes, "resume": True}))
    assert [row["step"] for row in read_rows(out / "metrics.jsonl")] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": "mixed"},
        {"method": "adaptive_entropy", "method_options": {"target": 9.0, "coef": 0.1}, "advantage": "rloo"},
        {"target_entropy": "4.5", "head": "torch"},
        {"advantage": "gae", "critic": "separate", "ref_kl_coef": 0.1},
    ],
)
def test_a_gradient_alone_that_is_not_finite(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any]
) -> None:
    """The loss is finite, its gradient in one layer is not; nothing is there once the layer is whole."""
    out = tmp_path / "run"
    weight = "model.layers.0.self_attn.v_proj.weight"

    class Poison(Break):
        def _break(self, step: Step) -> None:
            super()._break(step)
            if step.number == 1 and not step.updates:
                p = dict(step.policy.model.named_parameters())[weight]
                self.hook = p.register_hook(lambda grad: grad * float("inf"))

    probe = Poison(NORM, 1.0)
    error = broken(out, probe, micro_batches=2, **changes)
    assert error.startswith(f"step 1, update 1: the gradient of {weight} is not finite; no weight was changed; ")
    assert main(["replay", str(out / "nonfinite.safetensors")]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[1] == "weights that are not finite: none" and said[2] == "tokens that are not finite, of 32: none"
    assert said[3] == "log-ratio of the others: 0 to 0" or said[3].startswith("log-ratio of the others: ")
    assert all(line.endswith(", the same bits)") for line in said[4:6]) and "nan" not in said[4]
    assert said[6:] == ["parameters whose gradient is not finite: none", "finite: no step was made"]
    assert main(["replay", str(out), "--head", "logits", "--dtype", "float32"]) == 0
    assert "same bits" not in capsys.readouterr().out


def test_a_critics_gradient_is_watched_as_the_policys_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Neither learns from an update in which one could not; also where the critic learns alone."""
    values = Critic.values
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Critic, "values", lambda *args: values(*args) * (float("inf") if torch.is_grad_enabled() else 1))
        for warmup in (0, 2):
            out, probe = tmp_path / str(warmup), Break(NORM, 1.0)
            settings = {"advantage": "gae", "critic": "separate", "critic_warmup": warmup, "steps": 4}
            with pytest.raises(
                NonFinite, match=r"step 0, update 1: .*the gradient of critic's \S+ and of \d+ more is not"
            ):
                ppo.train(config(out, **{**SHORT, **settings}), probes=[probe])
            assert probe.unchanged()
            assert main(["replay", str(out)]) == 1
            assert "parameters whose gradient is not finite: 1" in capsys.readouterr().out
    assert main(["replay", str(out)]) == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("head", ["linear", "torch"])
def test_log_probs_that_are_not_finite_end_a_rollout(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], value: float, head: str
) -> None:
    error = broken(tmp_path / "run", Break(NORM, value, "before_step"), head=head)
    assert re.match(
        r"step 1: log-probs of 64 tokens while sampling are not finite, first nan in row 0, position 0; no weight was",
        error,
    )
    assert main(["replay", str(tmp_path / "run")]) == 1
    said = capsys.readouterr().out.splitlines()
    assert said[2].startswith(
        "tokens that are not finite, of 64: 64: row 0, position 0 (log-prob nan, while sampling nan)"
    )
    assert said[-1] == "not finite again"


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    class Late(Break):
        def after_step(self, step: Step) -> None:
            if step.number == 1:
                dict(step.policy.model.named_parameters())[NORM].data[0] = float("inf")

    ppo.train(config(tmp_path, **{**SETTINGS, "steps": 1}))
    saved = contents(tmp_path)["checkpoint.safetensors"]
    with pytest.raises(NonFinite, match=rf"after 2 steps: expected finite weights, got {NORM} that are not"):
        ppo.train(
            config(tmp_path, **{**SETTINGS, "steps": 2, "save_every": 0, "resume": True}), probes=[Late(NORM, 1.0)]
        )
    assert contents(tmp_path)["checkpoint.safetensors"] == saved


def test_a_supervised_start_that_is_not_finite_ends(tmp_path: Path) -> None:
    policy, settings = build_policy(TINY, EasyTask()), dataclasses.replace(TINY, warm_steps=3, warm_batch=4)
    dict(policy.model.named_parameters())[NORM].data[0] = float("nan")
    with pytest.raises(
        FloatingPointError, match=r"^warm_lr: .* with finite losses, got nan after 3 steps at 0\.003; take"
    ):
        warm_start(policy, EasyTask(), settings)


def test_the_norm_and_the_clip_are_torchs() -> None:
    model = build_policy(TINY, EasyTask()).model
    loss = faults.ek.PolicyLoss(torch.zeros(()), {})
    for clip in (0.0, 0.5, 1e9):
        for grads in ([], [1e-3, -2.0, 3.0]):
            for i, p in enumerate(model.parameters()):
                p.grad = torch.full_like(p, grads[i % 3]) if grads else None
            kept = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
            (norm,) = faults.clip_gradients({"policy": model}, [loss], clip)
            ours = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
            for p, grad in zip(model.parameters(), kept, strict=True):
                p.grad = grad
            assert norm == float(torch.nn.utils.clip_grad_norm_(model.parameters(), clip or float("inf")))
            assert all(a is None or torch.equal(a, p.grad) for a, p in zip(ours, model.parameters(), strict=True))


def test_what_is_not_finite_is_named() -> None:
    model, other = torch.nn.Linear(2, 2), torch.nn.Linear(2, 1)
    losses = [faults.ek.PolicyLoss(torch.tensor(x), {}) for x in (1.0, float("-inf"), float("nan"))]

    def said(grads: dict[torch.nn.Parameter, float], losses: Any) -> str:
        for p in (*model.parameters(), *other.parameters()):
            p.grad = torch.full_like(p, grads.get(p, 1.0))
        before = [p.grad.clone() for p in model.parameters()]
        with pytest.raises(NonFinite) as caught:
            faults.clip_gradients({"policy": model, "critic": other}, losses, 1.0)
        for p, grad in zip(model.parameters(), before, strict=True):  # nor are gradients clipped by what is none
            torch.testing.assert_close(p.grad, grad, rtol=0, atol=0, equal_nan=True)
        return str(caught.value)

    assert said({}, losses) == "the loss of micro-batch 2 of 3 is -inf"
    assert said({other.bias: float("nan")}, losses[:1]) == "the gradient of critic's bias is not finite"
    assert said({model.bias: float("inf"), other.weight: float("nan")}, losses[:1]) == (
        "the gradient of bias and of 1 more is not finite"
    )
    assert said({model.weight: 3e38}, losses[:1]) == "the gradient's norm is inf, though each of its entries is finite"


def test_what_cannot_be_replayed_is_told_in_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken(tmp_path / "run", Break(NORM, float("nan")))
    path = tmp_path / "run" / "nonfinite.safetensors"
    good = path.read_bytes()

    def told(*words: str) -> str:
        assert main(["replay", *words]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return error

    assert "replay: expected a FILE (nonfinite.safetensors), then flags, got no file" in told()
    assert f"got {tmp_path / 'x'}, which does not exist" in told(str(tmp_path / "x"))
    assert f"got {tmp_path / 'nonfinite.safetensors'}, which does not exist" in told(str(tmp_path))
    for damaged, reason in (
        (good[:-1], "a file that was cut off"),
        (good[:-9] + b"\1" + good[-8:], "a damaged file (its checksum does not match)"),
        (b"", "an empty file"),
    ):
        path.write_bytes(damaged)
        assert f"got {path}, {reason}" in told(str(path))
    assert "which holds something else" in told(str(tmp_path / "run" / "checkpoint.safetensors"))
    save_tree(path, {"kind": "batch", "format": 99})
    assert "which is of a newer version" in told(str(path))
    path.write_bytes(good)
    assert "--head: expected one of linear, logits, torch, got 'x'" in told(str(path), "--head", "x")


def test_a_batch_that_cannot_be_kept_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(faults, "save_tree", full)
    error = broken(tmp_path / "run", Break(NORM, float("nan")))
    assert "no weight was changed; the batch could not be kept (No space left on device)" in error


def test_a_command_that_meets_it_ends_with_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ppo, "default_probes", lambda *_: [Break(NORM, float("nan"))])
    settings = dataclasses.replace(config(tmp_path / "run", **SETTINGS))
    words = ["--out", str(settings.out), "--steps", "2", "--warm-steps", "0", "--no-tensorboard", "--no-progress"]
    assert main([*words, "--prompts-per-step", "4", "--samples-per-prompt", "2", "--num-layers", "1"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith(
        "python -m entropy_kernels.trainer: error: step 1, update 1: the"
    )

"""The trainer's methods: every one of ek.methods() trains, its options, what is logged of it, and memory over a run."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

import entropy_kernels as ek
from entropy_kernels.trainer import checkpoint, ppo
from entropy_kernels.trainer.__main__ import main
from entropy_kernels.trainer.config import TrainerConfig
from entropy_kernels.trainer.methods import METHODS, PAPER, controller_of, options_of, surrogate_of
from entropy_kernels.trainer.model import Encoded
from entropy_kernels.trainer.probes import Probe, RolloutMetrics, Step, UpdateMetrics
from entropy_kernels.trainer.rollout import Rollout, known_tokens
from entropy_kernels.trainer.tensorfile import save_tree
from trainer_setup import SHORT, TINY, config, easy, resumed, rows_without_times, whole_rollout  # noqa: F401


def under(method: str, **changes: object) -> TrainerConfig:
    return dataclasses.replace(TINY, method=method, **changes)  # type: ignore[arg-type]


def rollout_of() -> Rollout:
    generator = torch.Generator().manual_seed(0)
    shape = (16, 50)

    def noise(*size: int) -> Tensor:
        return torch.randn(size or shape, generator=generator)

    mask = torch.rand(shape, generator=generator) < 0.9
    logprob = -3 * torch.rand(shape, generator=generator)
    advantages, stats = (2 * noise(16, 1)).expand(shape), (logprob, noise().abs(), noise().abs(), 0.1 * noise())
    return whole_rollout(
        mask, stats, prompts=Encoded(torch.zeros(16, 1), torch.ones(16, 1)), ids=torch.zeros(shape, dtype=torch.int64),
        rewards=torch.zeros(4, 4), advantages=advantages,
    )  # fmt: skip


def fresh_of(rollout: Rollout, rows: Tensor) -> ek.LogprobEntropy:
    moved = 0.3 * torch.randn(rollout.mask.shape, generator=torch.Generator().manual_seed(1))
    return ek.LogprobEntropy((rollout.old_logprob + moved)[rows], rollout.entropy[rows] + 0.1)


def decided(settings: TrainerConfig, seed: int = 3, parts: int = 1) -> list[ek.Control]:
    """What is done to the tokens of a whole rollout as one minibatch."""
    rollout, rows = rollout_of(), list(torch.arange(16).chunk(parts))
    controller = controller_of(settings)
    assert controller is not None
    fresh = [fresh_of(rollout, part) for part in rows]
    found: list[ek.Control] = controller.step(known_tokens(rollout, rows, settings, fresh=fresh), seed=seed)
    return found


def treated(control: ek.Control) -> Tensor:
    found = control.dropped if control.penalized is None else control.penalized
    assert found is not None
    return found


# --- which tokens ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [name for name in METHODS if METHODS[name].control is not None])
def test_control_is_that_of_the_whole_minibatch(method: str) -> None:
    whole, split = decided(under(method))[0], decided(under(method), parts=4)
    for name, value in whole._asdict().items():
        if isinstance(value, Tensor) and value.dim():
            assert torch.equal(torch.cat([getattr(part, name) for part in split]), value), name
            if value.dtype == torch.bool:
                assert not (value & ~rollout_of().mask).any()
    assert all(torch.equal(split[0].metrics[name], value) for name, value in whole.metrics.items())


@pytest.mark.parametrize("method", [name for name in PAPER if METHODS[name].control is not None])
def test_as_many_tokens_as_the_ratio_says(method: str) -> None:
    expected = int(under(method).selection_ratio * int(rollout_of().mask.sum()))
    assert int(treated(decided(under(method))[0]).sum()) == expected > 0


def test_controls_draw_as_many_tokens_elsewhere() -> None:
    chosen, control, other_seed = (
        treated(decided(under(method, cov_ratio=0.05), seed=seed)[0])
        for method, seed in (("clip_cov", 3), ("random_dropped", 3), ("random_dropped", 5))
    )
    assert chosen.sum() == control.sum() == other_seed.sum()
    assert not torch.equal(control, other_seed)
    rollout = rollout_of()
    logprob = fresh_of(rollout, torch.arange(16)).logprob
    mask, advantages = rollout.mask, rollout.advantages
    covariance = (logprob - logprob[mask].mean()) * (advantages - advantages[mask].mean())
    assert (covariance[chosen] > 1).all()
    assert (covariance[control] < 1).any(), "the control kept to the range"
    ratio = (logprob - rollout.old_logprob).exp()
    clipped = -advantages * ratio.clamp(0.8, 1.2) > -advantages * ratio
    assert clipped.any() and not (chosen & clipped).any()


# --- options ---------------------------------------------------------------------------------------------------------


def test_fields_of_the_configuration_are_options() -> None:
    settings = under("clip_cov", clip_high=0.28, cov_low=-1.0, cov_high=2.0, cov_band="absolute", kl_coef=9.0)
    given = {"clip_low": 0.2, "clip_high": 0.28, "dual_clip": None}
    given |= {"ratio": 0.03, "low": -1.0, "high": 2.0, "band": "absolute"}
    assert options_of(settings) == given
    # KL-Cov has no clip, whatever the fields say; nor has the paper's Clip-Cov
    assert options_of(dataclasses.replace(settings, method="kl_cov")) == {"ratio": 0.07, "kl_coef": 9.0}
    paper = dataclasses.replace(settings, method_options={"preset": "paper"})
    assert not {"clip_low", "clip_high"} & options_of(paper).keys()
    assert options_of(dataclasses.replace(settings, method_options={"k": 5, "high": 1.5})) == {
        **{name: value for name, value in given.items() if name != "ratio"}, "k": 5, "high": 1.5,
    }  # fmt: skip
    assert options_of(under("erc", cov_low=-1.0)) == {"clip_low": 0.2, "clip_high": 0.2, "dual_clip": None}
    assert options_of(under("exact_cov", cov_ratio=0.1))["ratio"] == 0.1
    assert options_of(under("grpo")) == {}


@pytest.mark.parametrize(
    ("method", "options", "clips"),
    [
        ("grpo", {}, (0.2, 0.3, None)),
        ("clip_cov", {}, (0.2, 0.3, None)),
        ("clip_cov", {"preset": "paper"}, (None, None, None)),
        ("kl_cov", {}, (None, None, None)),
        ("kl_cov", {"clip_high": 0.4}, (None, 0.4, None)),
        ("exact_cov", {"dual_clip": 3.0}, (0.2, 0.3, 3.0)),
    ],
)
def test_the_loss_clips_as_the_method_counts(method: str, options: dict[str, object], clips: tuple[object]) -> None:
    settings = under(method, clip_high=0.3, method_options=options)
    found = surrogate_of(settings, controller_of(settings))
    assert (found["clip_low"], found["clip_high"], found["dual_clip"]) == clips


def test_options_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = {name: value for name, value in TINY.to_dict().items() if name not in ("out", "method", "method_options")}
    (tmp_path / "tiny.json").write_text(json.dumps({**values, **SHORT}))
    start = ["from-config", str(tmp_path / "tiny.json"), "--method", "clip_cov", "--method-options"]
    words = ["k=3", "low=-inf", "high=None", "band=absolute", "closed=True", "dual_clip=3.5"]
    assert main([*start, *words, "--out", str(tmp_path / "bad")]) == 2
    assert "high: expected a number" in capsys.readouterr().err
    words[2] = "high=2"
    assert main([*start, *words, "--out", str(tmp_path / "run")]) == 0
    saved = TrainerConfig.from_json(tmp_path / "run" / "config.json")
    expected = {"k": 3, "low": -math.inf, "high": 2, "band": "absolute", "closed": True, "dual_clip": 3.5}
    assert saved.method_options == expected
    assert rows_without_times(tmp_path / "run")[0]["tokens_touched"] <= 6  # type: ignore[operator]
    # a run from that configuration, with other flags, keeps them
    again = ["from-config", str(tmp_path / "run" / "config.json"), "--out", str(tmp_path / "again"), "--seed", "1"]
    assert main(again) == 0
    assert TrainerConfig.from_json(tmp_path / "again" / "config.json").method_options == expected
    with pytest.raises(SystemExit):
        main([*start, "k", "3", "--out", str(tmp_path / "bad")])
    assert "expected OPTION=VALUE, got 'k'" in capsys.readouterr().err


def test_options_stay_with_their_method() -> None:
    base = under("clip_cov", method_options={"low": 0.5})
    kept = {name: base.under(name).method_options for name in ("grpo", "clip_cov", "random_dropped", "kl_cov")}
    assert kept == {"grpo": {}, "clip_cov": {"low": 0.5}, "random_dropped": {"low": 0.5}, "kl_cov": {}}


# --- runs ------------------------------------------------------------------------------------------------------------


#: Options under which what the method remembers shows in a run of a few steps.
REMEMBERING = {
    "adaptive_entropy": {"target": 9.0, "delta": 0.05, "coef": 0.1},
    "repo": {"target": "initial", "zeta": 0.01},
    "entrocraft": {"low": 0.1, "high": 0.2, "low_end": 9.0, "high_end": 9.5, "total_steps": 6},
}


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("method", list(ek.methods()))
def test_every_method_trains(tmp_path: Path, method: str, micro_batches: int) -> None:
    how = {"selection_logprob": "old"} if micro_batches == 2 else {"steps": 1 + (method in REMEMBERING)}
    settings = config(tmp_path / "run", **{**SHORT, "method": method, "micro_batches": micro_batches, **how})
    ppo.train(settings, probes=[RolloutMetrics(), UpdateMetrics()])
    rows = rows_without_times(tmp_path / "run")
    assert METHODS[method].label and [row["step"] for row in rows] == list(range(settings.steps + 1))
    for row in rows[:-1]:
        tokens, share = row["tokens_touched"], row["decrease_share"]
        assert 0 <= tokens <= row["tokens"] and 0 <= share <= 1  # type: ignore[operator]
        assert all(math.isfinite(row[name]) for name in ("control_dh", "free_dh", "loss", "grad_norm"))  # type: ignore
        assert row["tokens_dropped"] in (0, tokens) and row["tokens_penalized"] in (0, tokens)
        assert ("entropy_coef" in row) == (METHODS[method].effect == "entropy_coef")


@pytest.mark.parametrize("method", list(REMEMBERING))
def test_a_method_with_memory_resumes_bit_for_bit(tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {**SHORT, "method": method, "method_options": REMEMBERING[method]}
    whole, _ = resumed(tmp_path, 1, **{**settings, "steps": 3})
    # the test sees the memory: without it the second half is another one
    monkeypatch.setattr(ek.Controller, "load_state_dict", lambda self, state: None)
    ppo.train(config(tmp_path / "stopped", **{**settings, "steps": 3, "resume": True}))
    assert rows_without_times(tmp_path / "stopped") != rows_without_times(whole)


def test_a_checkpoint_with_the_state_of_another_program_is_refused(tmp_path: Path) -> None:
    settings = {**SHORT, "method": "adaptive_entropy"}
    ppo.train(config(tmp_path / "run", **settings))
    path = tmp_path / "run" / "checkpoint.safetensors"
    state = checkpoint.load_checkpoint(path)
    state["controller"] = {"calls": 1}
    save_tree(path, state)
    with pytest.raises(ValueError, match=r"of this configuration's method, got one of another method"):
        ppo.train(config(tmp_path / "run", **{**settings, "steps": 2, "resume": True}))


# --- what is logged --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum-norm", "token-sum"])
def test_share_and_prediction_by_hand(tmp_path: Path, mode: str) -> None:
    """The first update's tokens, whose ratio is 1, by their definition and in float64."""
    seen: list[tuple[float, ...]] = []

    class Watch(Probe):
        def after_update(self, step: Step) -> None:
            if len(step.updates) > 1:
                return
            rollout, rows = step.sampled, step.updates[0].rows[0]
            mask, advantages, c = rollout.mask[rows], rollout.advantages[rows].double(), torch.ones(())
            lengths = mask.sum(-1, keepdim=True)
            if mode == "token-mean":
                c = 1 / mask.sum()
            elif mode != "token-sum":
                c = 1 / (len(rows) * (lengths if mode == "seq-mean-token-mean" else torch.tensor(mask.shape[1])))
            decrease = c * advantages * rollout.vocab_covariance[rows].double() / 0.8**2 * mask
            control = step.updates[0].controls[0]
            assert control is not None and control.dropped is not None
            positive = decrease.clamp(min=0)
            expected = torch.zeros_like(mask)
            expected.view(-1)[decrease.flatten().topk(int(0.1 * mask.sum())).indices] = True
            assert torch.equal(control.dropped, expected)
            seen.append(
                (
                    float(positive[expected].sum() / positive.sum()),
                    float(-(decrease * ~expected).sum() / mask.sum()),
                    float(-decrease.sum() / mask.sum()),
                )
            )
            names = ("decrease_share", "predicted_change", "predicted_change_free")
            assert seen[0] == pytest.approx([float(control.metrics[name]) for name in names], rel=1e-5)

    settings = {**SHORT, "method": "exact_cov", "cov_ratio": 0.1, "selection_logprob": "old", "temperature": 0.8}
    ppo.train(config(tmp_path / "run", **settings, loss_agg_mode=mode), probes=[Watch()])
    assert seen


def test_the_row_is_the_mean_over_updates_times_lr(tmp_path: Path) -> None:
    seen: list[ek.Control] = []

    class Watch(Probe):
        def after_update(self, step: Step) -> None:
            control = step.updates[-1].controls[0]
            assert control is not None
            seen.append(control)

    ppo.train(config(tmp_path / "run", **SHORT, method="exact_cov", epochs=2), probes=[Watch(), UpdateMetrics()])
    (row, _) = rows_without_times(tmp_path / "run")
    assert len(seen) == 4
    assert row["tokens_touched"] == sum(int(control.metrics["touched"]) for control in seen)
    share = sum(float(control.metrics["decrease_share"]) for control in seen) / 4
    assert row["decrease_share"] == pytest.approx(share, rel=1e-12)
    for name, of in (("control_dh", "predicted_change"), ("free_dh", "predicted_change_free")):
        mean = sum(float(control.metrics[of]) for control in seen) / 4
        assert row[name] == pytest.approx(TINY.lr * 2 * mean, rel=1e-12)


def test_a_share_of_the_decrease_is_what_is_asked_for(tmp_path: Path) -> None:
    settings = {**SHORT, "method": "exact_cov", "method_options": {"share": 0.4, "effect": "detached"}}
    ppo.train(config(tmp_path / "run", **settings), probes=[UpdateMetrics()])
    (row, _) = rows_without_times(tmp_path / "run")
    assert 0.4 <= row["decrease_share"] < 0.6  # type: ignore[operator]
    assert 0 < row["tokens_touched"] == row["tokens_dropped"]  # type: ignore[operator]

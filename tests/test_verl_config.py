"""What a user may write for a loss_mode ek_* of verl; without verl, whose configs are stubs here."""

from __future__ import annotations

import copy
import pickle
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import entropy_kernels as ek
from entropy_kernels.integrations.verl import losses, worker
from entropy_kernels.integrations.verl.config import MODES, Settings, settings_of

ACTOR = {
    "clip_ratio": 0.2, "clip_ratio_low": 0.2, "clip_ratio_high": 0.28, "clip_ratio_c": 3.0, "tau_pos": 1.0,
    "tau_neg": 1.05, "entropy_coeff": 0, "data_loader_seed": 42, "loss_scale_factor": None, "global_batch_info": {},
}  # fmt: skip
POLICY = {
    "clip_cov_ratio": 2e-4, "clip_cov_lb": 1.0, "clip_cov_ub": 5.0, "kl_cov_ratio": 2e-4, "ppo_kl_coef": 0.1,
    "dro_beta": None,
}  # fmt: skip


def config(mode: str, own: dict[str, Any] | None = None, **changed: Any) -> SimpleNamespace:
    actor = {**ACTOR, **{key: value for key, value in changed.items() if key in ACTOR}}
    policy = {**POLICY, **{key: value for key, value in changed.items() if key in POLICY}}
    return SimpleNamespace(**actor, policy_loss=SimpleNamespace(loss_mode=mode, ek=own or {}, **policy))


def read(mode: str, own: dict[str, Any] | None = None, **changed: Any) -> Settings:
    settings = settings_of(config(mode, own, **changed))
    assert settings is not None
    return settings


NEEDED: dict[str, dict[str, Any]] = {"ek_dro": {"dro_beta": 0.1}}
OWN = {"ek_cispo_trl": {"clip_high": 5.0}}


def test_there_is_a_mode_for_every_row_of_the_tables() -> None:
    names = [*ek.surrogates(), *ek.methods()]
    assert [f"ek_{name}" for name in names] == list(MODES) and len(set(names)) == len(names)


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_is_read(mode: str) -> None:
    settings = read(mode, OWN.get(mode), **NEEDED.get(mode, {}))
    assert settings.mode == mode and mode in (f"ek_{settings.surrogate}", f"ek_{settings.method}")
    assert settings.statistics and read(mode, OWN.get(mode), **NEEDED.get(mode, {})) == settings
    assert pickle.loads(pickle.dumps(settings)) == settings
    if settings.decides:
        assert isinstance(settings.controller(), ek.Controller)


def test_verls_numbers_are_those_of_its_function_of_the_same_name() -> None:
    ppo = {"clip_low": 0.2, "clip_high": 0.28, "dual_clip": 3.0}
    assert read("ek_ppo").loss == read("ek_exact_cov").loss == ppo
    assert read("ek_ppo", clip_ratio_low=None, clip_ratio=0.1).loss == {**ppo, "clip_low": 0.1}
    assert read("ek_gspo_token").loss == {**ppo, "dual_clip": None}
    assert read("ek_dppo_tv").loss["ratio_cap"] == 3.0 and read("ek_sapo").loss["tau_neg"] == 1.05
    clip_cov = read("ek_clip_cov", clip_cov_lb=0.5)
    assert clip_cov.loss == {**ppo, "dual_clip": None}
    assert clip_cov.options == {"ratio": 2e-4, "low": 0.5, "high": 5.0, **clip_cov.loss}
    kl_cov = read("ek_kl_cov")
    assert kl_cov.options == {"ratio": 2e-4, "kl_coef": 0.1, **kl_cov.loss} and set(kl_cov.loss.values()) == {None}


def test_own_keys_take_their_place() -> None:
    assert read("ek_clip_cov", {"ratio": 0.01, "clip_high": None}).options["ratio"] == 0.01
    assert read("ek_clip_cov", {"clip_high": None}).loss["clip_high"] is None
    assert "ratio" not in read("ek_clip_cov", {"k": 3}).options
    paper = read("ek_kl_cov", {"preset": "paper"})
    assert paper.options == {"preset": "paper", **paper.loss}  # the paper's numbers, not verl's
    assert set(read("ek_clip_cov", {"preset": "paper"}).loss.values()) == {None}
    assert read("ek_exact_cov", {"surrogate": "gspo"}).surrogate == "gspo"
    assert read("ek_gspo", {"method": "steer"}).method == "steer"
    assert read("ek_gspo", {"method": None}) == read("ek_gspo")
    assert read("ek_dro", {"dro_beta": 0.1}).loss["dro_beta"] == 0.1  # and verl's own, None, is not asked
    ours = read("ek_clip_cov", {"low": 0.5, "ratio": 0.1}, clip_cov_lb=None, clip_cov_ratio=None).options
    assert (ours["low"], ours["ratio"]) == (0.5, 0.1)
    assert read("ek_clip_cov", {"seed": 7}).seed == 7 and read("ek_clip_cov").seed == 42
    assert read("ek_adaptive_entropy", {"delta": 1e-4}).options["delta"] == 1e-4  # not TRL's delta of ppo
    held = read("ek_ppo", {"target_entropy": [[0, 0.8], [200, 0.3]], "kp": 0.1, "observe": False})
    assert held.needs == ("entropy", "vocab_covariance") and held.statistics and not held.observe
    assert read("ek_ppo", {"target_entropy": 0.4, "target_method": "bonus"}).entropy_now


@pytest.mark.parametrize(
    ("mode", "own", "message"),
    [
        ("ek_clipcov", {}, r"policy_loss.loss_mode: expected one of ek_ppo, .*; did you mean ek_clip_cov\?$"),
        ("ek_clip_cov", {"ratoi": 1}, r"^policy_loss.ek.ratoi: expected one of .*; did you mean ratio\?$"),
        ("vanilla", {"ratio": 1}, r"^policy_loss.ek.ratio: expected beside a loss_mode ek_\*, got loss_mode='vanilla'"),
        ("ek_clip_cov", {"ratio": 2}, r"^policy_loss of loss_mode=ek_clip_cov: ratio: expected a fraction"),
        ("ek_steer", {"map": "square"}, r"map: expected one of 'exponential', 'linear', got 'square'"),
        ("ek_clip_cov", {"method": "steer"}, r"ek.method: expected none, as loss_mode=ek_clip_cov names it"),
        ("ek_ppo", {"method": "exactcov"}, r"ek.method: expected one of .*did you mean exact_cov\?"),
        ("ek_ppo", {"target_entropy": -1}, r"target: expected an entropy >= 0 in nats, got -1"),
        ("ek_ppo", {"target_entropy": 0.4, "target_method": "weigth"}, r"target_method: expected one of exact_cov"),
        ("ek_ppo", {"target_entropy": 0.4, "rho": 0.4}, r"ek.rho: expected one of kp, .* ratio, .* loss_mode=ek_ppo"),
        ("ek_ppo", {"target_method": "bonus"}, r"target_method: expected beside target_entropy, got 'bonus' alone"),
        ("ek_exact_cov", {"target_entropy": 0.4}, r"target_entropy: expected with a loss_mode that names a surrogate"),
        ("ek_ppo", {"ratio": 0.1}, r"ek.ratio: expected one of delta, clip_low"),
        ("ek_ppo", {"seed": 0.5}, r"ek.seed: expected an integer, got 0.5"),
        ("ek_ppo", {"target_entropy": 0.4, "observe": 1}, r"ek.observe: expected true or false, got 1"),
        ("ek_ppo", {"observe": True}, r"ek.observe: expected beside target_entropy, got True alone"),
        ("ek_exact_cov", {"statistics": False}, r"ek.statistics: expected true .*reads vocab_covariance"),
        ("ek_cispo_trl", {}, r"ek.clip_high: expected with surrogate cispo_trl, where it is the bound"),
        ("ek_dro", {}, r"dro_beta: expected a number in the config, got None"),
        ("ek_ppo", {"target_entropy": "0.4"}, r"^policy_loss.ek.target_entropy='0.4': target: expected a number"),
        ("ek_ppo", {"target_entropy": 9.0, "vocab_size": 61}, r"ek.target_entropy=9.0: target: .* log\(vocab_size\)"),
        ("ek_exact_cov", {"seed": 7}, r"ek.seed: expected with a method that draws \(.*clip_cov.*\), got 7 with "),
        ("ek_ppo", {"seed": 7}, r"ek.seed: expected with a method that draws"),
        ("ek_exact_cov", {"shere": 7}, r"ek.shere: expected one of (?!.*seed)"),
        ("vanilla", {"statistics": "false"}, r"ek.statistics: expected true or false, got 'false'"),
        ("vanilla", {"statistics": 1}, r"ek.statistics: expected true or false, got 1"),
        ("ek_ppo", {"method": ["steer"]}, r"ek.method: expected a name, got \['steer'\]"),
        ("ek_steer", {"surrogate": {}}, r"ek.surrogate: expected a name, got \{\}"),
        ("ek_ppo", {"target_entropy": 1, "target_method": []}, r"ek.target_method: expected a name, got \[\]"),
        ("ek_clip_cov", {"preset": ["paper"]}, r"ek.preset: expected a name, got \['paper'\]"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(mode: str, own: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        settings_of(config(mode, own))


def test_presets() -> None:
    """verl's is what is read without one; the paper's has numbers of its own, beside which verl's may not be set."""
    for mode in ("ek_clip_cov", "ek_kl_cov"):
        plain, verl = read(mode), read(mode, {"preset": "verl"})
        assert {**plain.options, "preset": "verl"} == verl.options and plain.loss == verl.loss
    assert read("ek_kl_cov", {"preset": "verl"}, ppo_kl_coef=0.3).options["kl_coef"] == 0.3
    assert read("ek_kl_cov", {"preset": "paper"}).controller().options["ratio"] == 2e-3
    message = r"policy_loss.kl_cov_ratio: expected verl's default, 0.0002, beside ek.preset=paper.* got 0.01"
    with pytest.raises(ValueError, match=message):
        read("ek_kl_cov", {"preset": "paper"}, kl_cov_ratio=0.01)


def test_two_coefficients_of_one_bonus_are_refused() -> None:
    with pytest.raises(ValueError, match=r"entropy_coeff: expected 0 beside adaptive_entropy, .* got 0.01"):
        read("ek_adaptive_entropy", entropy_coeff=0.01)


def test_other_modes_are_left_alone() -> None:
    assert settings_of(config("vanilla")) is None and settings_of(config("vanilla", {"statistics": True})) is None
    assert settings_of(SimpleNamespace()) is None  # the config of a critic


# ---- the registered function, in a call of its own -------------------------------------------------------------------


def tokens(seed: int = 0, shape: tuple[int, int] = (6, 20)) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    old = -torch.rand(shape, generator=generator) * 3
    return {
        "old_log_prob": old,
        "log_prob": (old + 0.1 * torch.randn(shape, generator=generator)).requires_grad_(),
        "advantages": torch.randn(shape, generator=generator),
        "response_mask": torch.rand(shape, generator=generator) < 0.8,
    }


def test_a_call_without_a_plan_selects_among_its_tokens() -> None:
    made, known = config("ek_clip_cov", {"ratio": 0.05, "low": -9.0, "high": 9.0}), tokens()
    loss, metrics = losses.registered("ek_clip_cov")(**known, config=made)
    loss.backward()
    given = (known["log_prob"], known["old_log_prob"], known["advantages"], known["response_mask"])
    options = {"ratio": 0.05, "low": -9.0, "high": 9.0, "clip_high": 0.28}
    same = ek.clip_cov_loss(*given, seed=42, **options)
    assert loss == same.loss and metrics["actor/pg_clipfrac"] == same.metrics["selected_frac"] > 0
    assert metrics["actor/ek_touched"] == 4 and type(metrics["actor/ppo_kl"]) is float
    again, _ = losses.registered("ek_clip_cov")(**known, config=made)
    assert again == ek.clip_cov_loss(*given, seed=43, **options).loss  # seeds are counted


def test_weights_and_counts_of_the_whole_batch_are_handed_on() -> None:
    made, known, weight = config("ek_ppo"), tokens(), torch.rand(6, 20)
    whole = {"dp_size": 2, "batch_num_tokens": 500, "global_batch_size": 12, "loss_scale_factor": None}
    made.global_batch_info = whole
    loss, _ = losses.registered("ek_ppo")(**known, config=made, rollout_is_weights=weight)
    given = (known["log_prob"], known["old_log_prob"], known["advantages"], known["response_mask"])
    assert loss == ek.policy_loss(*given, clip_high=0.28, dual_clip=3.0, token_weight=weight, **whole).loss


@pytest.mark.parametrize(
    ("mode", "own", "message"),
    [
        ("ek_exact_cov", {}, "exact_cov: expected vocab_covariance of the tokens, got a call of the loss without"),
        ("ek_erc", {}, "erc: expected entropy and old_entropy of the tokens"),
        ("ek_ppo", {"target_entropy": 0.4}, "expected a plan of the whole rollout, which is made in TrainingWorker"),
    ],
)
def test_what_a_single_call_cannot_know_is_said(mode: str, own: dict[str, Any], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        losses.registered(mode)(**tokens(), config=config(mode, own))


def test_keys_that_arrive_in_a_pickle_put_the_patches_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []
    monkeypatch.setattr(worker, "install", lambda: called.append("install"))
    monkeypatch.setattr(worker.statistics, "enable", lambda: called.append("enable"))
    keys = worker.OwnKeys(ratio=0.1, statistics=True)
    assert pickle.loads(pickle.dumps(keys)) == keys and called == ["install", "enable"]
    for copied in (copy.copy(keys), copy.deepcopy(keys)):  # in this process, where another config may rule by now
        assert copied == keys and type(copied) is worker.OwnKeys and len(called) == 2
    keys = worker.OwnKeys(points=[[0, 0.8]])
    assert copy.deepcopy(keys)["points"] is not keys["points"]


def test_a_line_says_what_is_on() -> None:
    assert read("ek_clip_cov", {"ratio": 0.01}).described == (
        "entropy_kernels: loss_mode=ek_clip_cov: surrogate ppo, method clip_cov, clip_low=0.2, clip_high=0.28, "
        "dual_clip=None, low=1.0, high=5.0, ratio=0.01, seed 42, statistics ours"
    )
    held = read("ek_gspo", {"target_entropy": 0.4, "kp": 0.1, "observe": False}).described
    assert "surrogate gspo, target_entropy 0.4 by exact_cov, observe False" in held and "kp=0.1" in held
    assert "seed" not in held and read("ek_ppo", {"statistics": False}).described.endswith("statistics of verl")

"""What a user writes on verl's command line, composed by hydra from verl's own files and built by verl."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra.errors import ConfigCompositionException
from verl.trainer.main_ppo import need_critic, need_reference_policy
from verl.utils.config import omega_conf_to_dataclass, validate_config
from verl_command import POLICY, ROOT, composed, of_script, with_loss

from entropy_kernels.integrations.verl import statistics, worker
from entropy_kernels.integrations.verl.config import MODES

NEEDED: dict[str, list[str]] = {
    "ek_dro": ["actor_rollout_ref.actor.policy_loss.dro_beta=0.1"],
    "ek_cispo_trl": ["+actor_rollout_ref.actor.policy_loss.ek.clip_high=5"],
}


@pytest.fixture(autouse=True)
def off() -> Iterator[None]:
    yield
    statistics.enable(False)  # of this process, where other tests compare with verl's


def built(*overrides: str) -> Any:
    """verl's ActorConfig, as its driver and its workers build it."""
    return omega_conf_to_dataclass(composed(*overrides).actor_rollout_ref.actor)


@pytest.mark.parametrize("mode", MODES)
def test_every_mode(mode: str) -> None:
    actor = built(*with_loss(mode), *NEEDED.get(mode, []))
    assert actor.ek_settings.mode == actor.policy_loss.loss_mode == mode
    assert all(patch.active for patch in worker.PATCHES)


def test_keys_of_our_own() -> None:
    actor = built(*with_loss("ek_exact_cov", "share=0.4", "surrogate=gspo_token", "clip_high=null"))
    settings = actor.ek_settings
    assert settings.surrogate == "gspo_token"
    assert settings.options == {"share": 0.4, "clip_low": 0.2, "clip_high": None, "dual_clip": None}
    schedule = "target_entropy=[[0,0.8],[200,0.3]]"
    held = built(*with_loss("ek_ppo", schedule, "target_method=weight", "observe=false")).ek_settings
    assert held.target == [[0, 0.8], [200, 0.3]] and held.target_method == "weight" and not held.observe
    assert built(*with_loss("ek_clip_cov")).ek_settings.options["ratio"] == 0.0002  # verl's own key
    assert built(*with_loss("ek_clip_cov", "seed=7")).ek_settings.seed == 7


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (with_loss("ek_clip_cov", "ratoi=0.1"), r"policy_loss.ek.ratoi: expected one of .*; did you mean ratio\?"),
        (with_loss("ek_clip_cov", "ratio=2"), r"ratio: expected a fraction in \(0, 1\], got 2"),
        (with_loss("ek_clipcov"), r"loss_mode: expected one of ek_ppo, .*; did you mean ek_clip_cov\?"),
        (with_loss("vanilla", "ratio=0.1"), r"ek.ratio: expected beside a loss_mode ek_\*, got loss_mode='vanilla'"),
        (with_loss("ek_ppo", "target_entropy=[0.4]"), r"target: expected points \(step, nats\), got 0.4"),
        (with_loss("ek_dro"), r"dro_beta: expected a number in the config, got None"),
    ],
)
def test_what_is_wrong_is_told_before_training(overrides: list[str], message: str) -> None:
    """By ``validate_config``, which verl's main calls before Ray is there."""
    config = composed(*overrides)
    with pytest.raises(Exception, match=message):
        validate_config(config, need_reference_policy(config), need_critic(config))


def test_the_driver_says_once_what_is_on(capfd: pytest.CaptureFixture[str]) -> None:
    """As a user sees it, whose verl shows its own lines of this level."""
    code = (
        "from test_verl_loss_config import built, with_loss\n"
        "for mode in ('ek_clip_cov', 'ek_clip_cov', 'vanilla'): built(*with_loss(mode))"
    )
    for rank, times in (({}, 1), ({"RANK": "0"}, 1), ({"RANK": "1"}, 0)):
        environment = {**os.environ, **rank, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
        subprocess.run([sys.executable, "-c", code], check=True, env=environment)
        lines = [line for line in "".join(capfd.readouterr()).splitlines() if "entropy_kernels: loss_mode=" in line]
        assert len(lines) == times and all("ek_clip_cov: surrogate ppo, method clip_cov" in line for line in lines)


@pytest.mark.parametrize("mode", ["clip_cov", "kl_cov"])
def test_a_ratio_that_is_a_percentage_is_told(mode: str) -> None:
    for ratio in (f"+{POLICY}ek.ratio=0.2", f"{POLICY}{mode}_ratio=0.2"):
        with pytest.warns(UserWarning, match=r"ratio=0.2 is 20 % of the tokens"):
            built(*with_loss(f"ek_{mode}"), ratio)


def test_verl_itself_refuses_a_key_without_plus() -> None:
    """What hydra says then names the way out."""
    with pytest.raises(ConfigCompositionException, match=r"use \+actor_rollout_ref.actor.policy_loss.ek.ratio=0.1"):
        composed("actor_rollout_ref.actor.policy_loss.ek.ratio=0.1")


def test_the_example_is_what_verl_takes() -> None:
    config = composed(*of_script(ROOT / "examples" / "verl_clip_cov.sh"))
    validate_config(config, need_reference_policy(config), need_critic(config))
    settings = omega_conf_to_dataclass(config.actor_rollout_ref.actor).ek_settings
    assert settings.mode == "ek_clip_cov" and settings.seed == 1 and settings.statistics
    assert config.actor_rollout_ref.rollout.n == 8


def test_other_losses_are_untouched() -> None:
    actor = built(*with_loss("vanilla"))
    assert not hasattr(actor, "ek_settings") and actor.policy_loss.ek == {}


def test_our_statistics_with_our_losses_or_where_they_are_asked_for() -> None:
    for overrides, on in (
        (with_loss("vanilla"), False),
        (with_loss("ek_clip_cov"), True),
        (with_loss("ek_clip_cov", "statistics=false"), False),
        (with_loss("ek_exact_cov"), True),
        (with_loss("vanilla", "statistics=true"), True),
        (with_loss("ek_ppo", "target_entropy=0.4"), True),
    ):
        statistics.enable(False)
        built(*overrides)
        assert statistics.enabled() == on, overrides

"""The trainer's loop: probes change nothing, methods are rows of one table, the header's numbers are the defaults."""

from __future__ import annotations

import ast
import math
import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")


import entropy_kernels as ek
from entropy_kernels.trainer import ppo
from entropy_kernels.trainer.config import TrainerConfig
from entropy_kernels.trainer.methods import METHODS, PAPER, Method
from entropy_kernels.trainer.probes import Probe, Step, default_probes
from entropy_kernels.trainer.start import WARM_STEPS, build_policy
from entropy_kernels.trainer.tasks import WalkTask
from trainer_setup import SHORT, EasyTask, assert_same_state, config, easy, policy_weights, rows_without_times  # noqa: F401

TRAINER = Path(ppo.__file__).parent


# --- probes ----------------------------------------------------------------------------------------------------------


#: Every probe measures; what it leaves behind is in the checkpoint after the step.
MEASURED = {"steps": 1, "eval_every": 1, "first_order_every": 1, "measure_memory": True}
PARTS = {"micro_batches": 2, "epochs": 2, "head": "logits"}


@pytest.mark.parametrize(("method", "changes"), [("grpo", PARTS), ("clip_cov", {}), ("kl_cov", PARTS)])
def test_a_run_without_probes_has_the_same_weights(tmp_path: Path, method: str, changes: dict[str, object]) -> None:
    settings = {**MEASURED, "method": method, "cov_low": -9.0, "cov_high": 9.0, "cov_ratio": 0.1, **changes}
    ppo.train(config(tmp_path / "measured", **settings))
    ppo.train(config(tmp_path / "bare", **settings), probes=())
    assert_same_state(tmp_path / "measured", tmp_path / "bare")
    assert rows_without_times(tmp_path / "bare") == [{"step": step} for step in range(2)]
    assert len(rows_without_times(tmp_path / "measured")[0]) > 30


def test_each_probe_alone_leaves_the_run_as_it_is(tmp_path: Path) -> None:
    """None needs another one, and what it logs it logs in their company too."""
    settings = {**MEASURED, "method": "clip_cov"}
    whole = config(tmp_path / "all", **settings)
    ppo.train(whole)
    alone = default_probes(whole, ppo.backward)
    assert len(alone) == 7
    for probe in alone:
        out = tmp_path / type(probe).__name__
        ppo.train(config(out, **settings), probes=[probe])
        assert_same_state(tmp_path / "all", out)
        for row, among in zip(rows_without_times(out), rows_without_times(tmp_path / "all"), strict=True):
            assert row.items() <= among.items(), out.name


def test_a_probe_sees_every_stage_of_a_step(tmp_path: Path) -> None:
    seen: list[tuple[object, ...]] = []

    class Watch(Probe):
        def before_step(self, step: Step) -> None:
            seen.append((step.number, "before", step.rollout))

        def after_rollout(self, step: Step) -> None:
            seen.append((step.number, "rollout", step.sampled.ids.shape))

        def after_update(self, step: Step) -> None:
            seen.append((step.number, "update", len(step.updates)))

        def after_step(self, step: Step) -> None:
            seen.append((step.number, "after", len(step.updates)))
            step.row["reward"] = 0.5

    ppo.train(config(tmp_path / "run", steps=1, epochs=2), probes=[Watch()])
    updates = [(0, "update", n) for n in (1, 2, 3, 4)]
    first = [(0, "before", None), (0, "rollout", (16, 4)), *updates, (0, "after", 4)]
    assert seen == [*first, (1, "before", None), (1, "rollout", (16, 4))]
    assert rows_without_times(tmp_path / "run") == [{"step": 0, "reward": 0.5}, {"step": 1}]


# --- methods ---------------------------------------------------------------------------------------------------------


def test_a_method_from_outside_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"method: expected one of grpo, .*got 'surprise'"):
        config(tmp_path, method="surprise").validate()
    row = ek.Method(
        score=lambda batch, options: -batch["logprob"],
        rule=lambda batch, score, options: batch.top(score, ratio=options.ratio),
        defaults={"ratio": 0.5},
    )
    monkeypatch.setitem(METHODS, "surprise", Method("Surprise", row, {"ratio": 0.2}))
    for micro_batches in (1, 2):
        out = tmp_path / str(micro_batches)
        ppo.train(config(out, **SHORT, method="surprise", micro_batches=micro_batches))
        rows = rows_without_times(out)
        assert rows[0]["tokens_dropped"] == 2 * math.floor(0.2 * 32) and rows[0]["tokens_penalized"] == 0
    ppo.train(config(tmp_path / "grpo", **SHORT))
    rows = rows_without_times(tmp_path / "grpo")
    assert rows[0]["tokens_touched"] == rows[0]["decrease_share"] == 0 and rows[0]["control_dh"] == rows[0]["free_dh"]
    weights = [policy_weights(tmp_path / n) for n in ("1", "grpo")]
    assert any(not torch.equal(value, weights[1][name]) for name, value in weights[0].items())


@pytest.mark.parametrize("path", sorted(TRAINER.glob("*.py")), ids=lambda path: path.name)
def test_methods_are_named_in_their_table_and_nowhere_else(path: Path) -> None:
    tree = ast.parse(path.read_text())
    documents = {
        id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    words = [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documents
    ]
    # "random" and "repo" are words of the language, too
    named = {
        name for name in METHODS for word in words if word == name or ("_" in name and re.search(rf"\b{name}\b", word))
    }
    if path.name == "config.py":
        named -= {"grpo"}  # the estimator of the advantage
    if path.name == "advantages.py":
        named -= {"grpo"}
    if path.name == "methods.py":
        assert {*PAPER} <= named
    else:
        assert not named


# --- the header ------------------------------------------------------------------------------------------------------


def test_the_headers_numbers_are_the_defaults() -> None:
    defaults, walk = TrainerConfig(), WalkTask()
    parameters = sum(p.numel() for p in build_policy(defaults, EasyTask()).model.parameters())
    rollout = defaults.prompts_per_step * defaults.samples_per_prompt * walk.max_new_tokens
    clip_cov, kl_cov = METHODS["clip_cov"], METHODS["kl_cov"]
    assert defaults.normalize_std and defaults.advantage == "grpo" and not defaults.weight_decay
    assert defaults.cov_ratio is None and defaults.cov_band == "absolute" and defaults.epochs == 1
    text = " ".join((ppo.__doc__ or "").split())
    for phrase in (
        f"{parameters / 1e3:.0f} k parameters, {walk.max_new_tokens}-token answers and {rollout} tokens per rollout",
        f"fractions ({clip_cov.paper_ratio}, {kl_cov.paper_ratio}) would select less than one and less than two tokens",
        f"defaults are {clip_cov.ratio} (Clip-Cov) and {kl_cov.ratio} (KL-Cov, beta {defaults.kl_coef:g} instead of 1)",
        f"random walks ({WARM_STEPS} steps, {defaults.warm_wrong_fraction:.0%} with".replace("%", " %"),
        f"open covariance range ({defaults.cov_low:g} to {defaults.cov_high:g})",
        f"PPO clip is {defaults.clip_low} / {defaults.clip_high};",
        f"both use temperature {defaults.temperature:g} with no truncation",
        f"AdamW at a constant {defaults.lr} with betas {defaults.adam_beta1} and {defaults.adam_beta2}, no weight "
        f"decay, gradient norm {defaults.grad_clip:g}; {defaults.minibatches} updates of a rollout",
    ):
        assert phrase in text, phrase
    minibatch = rollout // defaults.minibatches
    assert clip_cov.paper_ratio * minibatch < 1 and kl_cov.paper_ratio * minibatch < 2
    # and no number stands there that is not compared above, but for those of the paper and the list's own
    deviations = text[text.index("1. Scale.") :]
    known = re.sub(r"\b(10|[1-9])\. (?=[A-Z])", "", deviations)
    for number in re.findall(r"\d+(?:\.\d+)?", known):
        assert number in {
            f"{parameters / 1e3:.0f}", f"{walk.max_new_tokens}", f"{rollout}", f"{clip_cov.paper_ratio}",
            f"{kl_cov.paper_ratio}", f"{clip_cov.ratio}", f"{kl_cov.ratio}", f"{defaults.kl_coef:g}", "1", "0",
            f"{WARM_STEPS}", f"{defaults.warm_wrong_fraction * 100:.0f}", f"{defaults.cov_high:g}",
            f"{defaults.clip_low}", f"{defaults.lr}", f"{defaults.adam_beta1}", f"{defaults.adam_beta2}",
            f"{defaults.minibatches}",
        }, number  # fmt: skip

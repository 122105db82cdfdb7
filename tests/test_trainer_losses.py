"""What the trainer's loss is made of beside a method: surrogates, reference, what counts."""

from __future__ import annotations

import copy
import dataclasses
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

import entropy_kernels as ek
from entropy_kernels.trainer import ppo
from entropy_kernels.trainer import run as trainer_run
from entropy_kernels.trainer.advantages import advantages_of
from entropy_kernels.trainer.config import HEADS, TrainerConfig
from entropy_kernels.trainer.faults import NonFinite
from entropy_kernels.trainer.groups import ROUND_STRIDE
from entropy_kernels.trainer.methods import controller_of, options_of, surrogate_of
from entropy_kernels.trainer.model import Encoded, Policy
from entropy_kernels.trainer.probes import Probe, RolloutMetrics, Step, Update, UpdateMetrics, default_probes
from entropy_kernels.trainer.reference import REFERENCE
from entropy_kernels.trainer.rollout import Rollout, all_tokens, score
from entropy_kernels.trainer.start import build_policy, word_tokenizer
from entropy_kernels.trainer.tasks import Prompt
from entropy_kernels.trainer.tensorfile import load_tree, save_tree
from hf_models import make
from trainer_setup import (  # noqa: F401
    SHORT,
    TINY,
    EasyTask,
    again,
    assert_same_gradients,
    config,
    contents,
    easy,
    resumed,
    rows_without_times,
    run,
    trained,
    trained_run,
    whole_rollout,
    with_task,
)

ONE = dataclasses.replace(TINY, minibatches=1, grad_clip=0.0, selection_logprob="old")
ROWS = torch.arange(8)


def settings_of(**changes: Any) -> TrainerConfig:
    found = dataclasses.replace(ONE, **changes)
    found.validate()
    return found


def policy_of(head: str = "linear") -> Policy:
    """In float64."""
    return Policy(make("llama").double(), word_tokenizer(["a"]), end_ids=[2], head=head)


def rollout_of(policy: Policy, noise: float = 0.3) -> Rollout:
    """Eight completions of 2 to 5 tokens, in float64, whose old log-probs are off by some noise."""
    generator = torch.Generator().manual_seed(0)
    prompts = Encoded(torch.randint(3, 97, (8, 3), generator=generator), torch.ones(8, 3, dtype=torch.long))
    mask = torch.arange(5) < 2 + torch.arange(8)[:, None] % 4
    ids = torch.randint(3, 97, (8, 5), generator=generator).masked_fill(~mask, 0)
    stats = score(policy, ONE, prompts, ids, mask)
    moved = noise * torch.randn(mask.shape, generator=generator, dtype=torch.float64)
    advantages = torch.randn((8, 1), generator=generator, dtype=torch.float64).expand(mask.shape)
    old = (stats.logprob + moved).clamp(max=0) * mask
    given = {"prompts": prompts, "ids": ids, "rewards": torch.zeros(2, 4), "advantages": advantages}
    return whole_rollout(mask, (old, *stats[1:]), **given)


def updated(policy: Policy, rollout: Rollout, settings: TrainerConfig) -> tuple[Update, dict[str, Tensor]]:
    """One update by a plain gradient step; and the gradients."""
    optimizer = torch.optim.SGD(policy.model.parameters(), lr=0.0)
    made = ppo.update(policy, optimizer, rollout, ROWS, settings, controller_of(settings), seed=3)
    gradients = {name: p.grad for name, p in policy.model.named_parameters() if p.grad is not None}
    assert all(bool(gradient.isfinite().all()) for gradient in gradients.values())
    return made, gradients


def logprob_of(model: Any, rollout: Rollout) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies of the completions' tokens, (B, L), by transformers and torch alone."""
    attention = torch.cat([rollout.prompts.mask, rollout.mask.long()], dim=1)
    ids = torch.cat([rollout.prompts.ids, rollout.ids], dim=1)
    positions = (attention.cumsum(1) - 1).clamp(min=0)
    start = rollout.prompts.ids.shape[1] - 1
    logits = model(input_ids=ids, attention_mask=attention, position_ids=positions).logits[:, start:-1]
    logp = torch.log_softmax(logits, dim=-1)
    return logp.gather(-1, rollout.ids[..., None])[..., 0], -(logp.exp() * logp).sum(-1)


def gradients_of(model: Any, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}


def assert_same(made: Update, ours: dict[str, Tensor], loss: Tensor, theirs: dict[str, Tensor]) -> None:
    """Losses and gradients; statistics are float64 throughout, but weights of tokens are float32."""
    torch.testing.assert_close(
        sum(float(part.loss) for part in made.losses), float(loss.detach()), rtol=1e-6, atol=1e-9
    )
    assert_same_gradients(ours, theirs, 1e-6, 1e-7)


#: A head and a method: all heads, and a method that decides.
PAIRS = [*((head, "grpo") for head in HEADS), ("linear", "exact_cov")]


# --- surrogates ------------------------------------------------------------------------------------------------------

#: Where the defaults would clip nothing, or are refused.
CLIPS = {"cispo_trl": {"clip_high": 1.1}, "gspo": {"clip_low": 0.02, "clip_high": 0.02}}


@pytest.mark.parametrize("method", ["grpo", "exact_cov"])
@pytest.mark.parametrize("surrogate", ek.surrogates())
def test_every_surrogate_under_every_head(surrogate: str, method: str) -> None:
    model = policy_of().model
    rollout = rollout_of(policy_of())
    settings = settings_of(surrogate=surrogate, method=method, entropy_coef=0.05, **CLIPS.get(surrogate, {}))
    by_hand = None
    # to the other heads one surrogate is as another
    for head in HEADS if method == "grpo" and surrogate in ("ppo", "gspo") else ("linear",):
        policy = Policy(copy.deepcopy(model), word_tokenizer(["a"]), end_ids=[2], head=head)
        made, gradients = updated(policy, rollout, settings)
        if by_hand is None:
            logprob, entropy = logprob_of(model, rollout)
            control = made.controls[0]
            assert (control is None) == (method == "grpo")
            result = ek.policy_loss(
                logprob, rollout.old_logprob, rollout.advantages, rollout.mask, entropy=entropy, entropy_coef=0.05,
                surrogate=surrogate, control=control, clip_low=settings.clip_low, clip_high=settings.clip_high,
            )  # fmt: skip
            by_hand = result.loss, gradients_of(model, result.loss)
        assert_same(made, gradients, *by_hand)


@pytest.mark.parametrize("surrogate", ["ppo", "gspo", "gmpo", "vespo"])
@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-mean"])
def test_micro_batches_are_one_update_under_a_sequences_ratio(surrogate: str, mode: str) -> None:
    found = []
    for parts in (1, 4):
        policy = policy_of()
        settings = settings_of(surrogate=surrogate, micro_batches=parts, loss_agg_mode=mode)
        found.append(updated(policy, rollout_of(policy), settings))
    for made, gradients in found[1:]:
        assert_same(made, gradients, torch.tensor(sum(float(part.loss) for part in found[0][0].losses)), found[0][1])


@pytest.mark.parametrize(("head", "method"), PAIRS)
def test_a_dual_clip_by_hand(head: str, method: str) -> None:
    policy = policy_of(head)
    rollout = rollout_of(policy, noise=1.0)
    settings = settings_of(dual_clip=1.5, clip_high=0.3, method=method)
    made, gradients = updated(policy, rollout, settings)
    model = policy_of().model
    logprob, _ = logprob_of(model, rollout)
    dropped = torch.zeros_like(rollout.mask) if made.controls[0] is None else made.controls[0].dropped
    total, stopped, tokens = torch.zeros((), dtype=torch.float64), 0, int(rollout.mask.sum())
    for row, position in rollout.mask.nonzero().tolist():
        if bool(dropped[row, position]):
            continue
        a, old = float(rollout.advantages[row, position]), rollout.old_logprob[row, position]
        ratio = (logprob[row, position] - old).exp()
        value = torch.maximum(-a * ratio, -a * ratio.clamp(0.8, 1.3))
        if a < 0 and float(value.detach()) > -1.5 * a:
            value, stopped = torch.tensor(-1.5 * a, dtype=torch.float64), stopped + 1
        total = total + value / tokens
    assert stopped > 0
    assert_same(made, gradients, total, gradients_of(model, total))
    if method == "grpo":  # the metric counts tokens that a method drops, too
        assert float(made.losses[0].metrics["clipfrac_lower"]) * tokens == pytest.approx(stopped, abs=1e-3)


def test_decisions_count_the_clip_of_ppo_alone() -> None:
    for surrogate, clips in (("ppo", (0.1, 0.3, 2.0)), ("gspo", (None, None, None)), ("gpg", (None, None, None))):
        settings = settings_of(surrogate=surrogate, method="exact_cov", clip_low=0.1, clip_high=0.3, dual_clip=2.0)
        controller = controller_of(settings)
        assert controller is not None
        assert tuple(controller.options[name] for name in ("clip_low", "clip_high", "dual_clip")) == clips
        told = surrogate_of(settings, controller)
        read = ek.surrogates()[surrogate].clips
        assert told == {"surrogate": surrogate, **{name: getattr(settings, name) for name in read}}
    # those that the method's own options set are the loss's, too
    settings = settings_of(method="exact_cov", method_options={"clip_low": 0.05})
    assert surrogate_of(settings, controller_of(settings))["clip_low"] == 0.05 == options_of(settings)["clip_low"]


def test_numbers_that_leave_float32_end_a_run(tmp_path: Path) -> None:
    largest = {"lr": 1e10, "critic_lr": 1e10, "weight_decay": 1e10, "lr_schedule": "1e10", "advantage": "gae"}
    with pytest.raises(NonFinite, match=r"^step 0, update 2: the gradient of "):
        ppo.train(config(tmp_path / "run", **SHORT, **largest))


@pytest.mark.parametrize("seed", [1 << 40, -(1 << 40)])
def test_the_largest_seeds_draw(tmp_path: Path, seed: int) -> None:
    """Those of draws are ten thousand million times as large, and more than 64 bits have."""
    ppo.train(config(tmp_path / "run", **SHORT, method="clip_cov", seed=seed))
    assert (tmp_path / "run" / "metrics.jsonl").read_text()


# --- a reference -----------------------------------------------------------------------------------------------------


def kl_by_hand(d: Tensor, estimator: str) -> Tensor:
    """Of D = log π - log π_ref; with + the value of the estimator and the gradient D."""
    name = estimator.removesuffix("+")
    value = {"k1": d, "abs": d.abs(), "k2": d * d / 2, "k3": (-d).exp() - 1 + d}[name]
    return value if name == estimator else value.detach() + d.detach() * (d - d.detach())


@pytest.mark.parametrize(
    ("estimator", "head", "method"),
    [
        *((estimator, "linear", "grpo") for estimator in ("k1", "abs", "k2", "k3", "k1+", "abs+", "k3+")),
        *((estimator, *pair) for estimator in ("k2", "k3+") for pair in PAIRS if pair != ("linear", "grpo")),
    ],
)
def test_a_penalty_in_the_loss_by_hand(estimator: str, head: str, method: str) -> None:
    policy = policy_of(head)
    rollout = rollout_of(policy, noise=0.1)
    generator = torch.Generator().manual_seed(5)
    noise = torch.randn(rollout.mask.shape, generator=generator, dtype=torch.float64)
    rollout.ref_logprob = (rollout.old_logprob + 0.5 * noise) * rollout.mask
    settings = settings_of(ref_kl_coef=0.3, ref_kl_estimator=estimator, method=method, micro_batches=2)
    made, gradients = updated(policy, rollout, settings)
    model = policy_of().model
    logprob, _ = logprob_of(model, rollout)
    dropped = torch.zeros_like(rollout.mask)
    for rows, control in zip(made.rows, made.controls, strict=True):
        dropped[rows] = control.dropped if control is not None else dropped[rows]
    assert bool(dropped.any()) == (method == "exact_cov")
    total = torch.zeros((), dtype=torch.float64)
    for row, position in rollout.mask.nonzero().tolist():
        a, new = rollout.advantages[row, position], logprob[row, position]
        ratio = (new - rollout.old_logprob[row, position]).exp()
        surrogate = torch.maximum(-a * ratio, -a * ratio.clamp(0.8, 1.2)) * (not bool(dropped[row, position]))
        total = total + surrogate + 0.3 * kl_by_hand(new - rollout.ref_logprob[row, position], estimator)
    total = total / int(rollout.mask.sum())
    assert_same(made, gradients, total, gradients_of(model, total))


class Keeps(Probe):
    """The rollouts of a run, and the weights that made them."""

    def __init__(self) -> None:
        self.rollouts: list[Rollout] = []
        self.models: list[Any] = []

    def after_rollout(self, step: Step) -> None:
        self.policy = step.policy
        self.rollouts.append(step.sampled)
        self.models.append(copy.deepcopy(step.policy.model).double())


@pytest.mark.parametrize("estimator", ["k1", "abs", "k2", "k3"])
def test_a_penalty_in_the_reward_by_hand(tmp_path: Path, estimator: str) -> None:
    kept = Keeps()
    changes = {"ref_kl_coef": 0.5, "ref_kl_in": "reward", "ref_kl_estimator": estimator}
    ppo.train(config(tmp_path / "run", **{**SHORT, "steps": 2, "lr": 0.03, **changes}), probes=[kept, RolloutMetrics()])
    rows = rows_without_times(tmp_path / "run")
    for i, (rollout, model) in enumerate(zip(kept.rollouts, kept.models, strict=True)):
        now, _ = logprob_of(model, rollout)
        then, _ = logprob_of(kept.models[0], rollout)
        difference = (now - then).detach()
        assert bool((difference == 0).all()) == (i == 0)
        rewards = rollout.rewards.double().flatten() - 0.5 * (kl_by_hand(difference, estimator) * rollout.mask).sum(1)
        for group in torch.arange(16).chunk(4):
            mine = rewards[group]
            expected = (mine - mine.mean()) / (mine.std() + 1e-6)
            if float(mine.std()) > 1e-3:
                got = rollout.advantages[group].double()
                torch.testing.assert_close(got, expected[:, None].expand_as(got), rtol=1e-3, atol=1e-3)
        assert rows[i]["ref_kl"] == pytest.approx(float(kl_by_hand(difference, "k3")[rollout.mask].mean()), abs=1e-6)
    assert rows[0]["ref_kl"] == 0 and rows[2]["ref_kl"] > 1e-4


@pytest.mark.parametrize("advantage", ["rloo", "reinforce_plus_plus", "reinforce_plus_plus_baseline", "gae"])
def test_a_penalty_in_the_reward_reaches_every_estimator(tmp_path: Path, advantage: str) -> None:
    kept = Keeps()
    changes = {"ref_kl_coef": 0.5, "ref_kl_in": "reward", "ref_kl_estimator": "k1", "lr": 0.03, "advantage": advantage}
    ppo.train(config(tmp_path / "run", **{**SHORT, **changes}), probes=[kept])
    rollout, length = kept.rollouts[1], kept.rollouts[1].ids.shape[1]
    now, then = (logprob_of(model, rollout)[0].detach().float() for model in reversed(kept.models[:2]))
    rewards = -0.5 * (now - then)
    assert float(rewards.abs().max()) > 1e-3
    rewards[:, length - 1] += rollout.rewards.flatten()  # all are of one length
    made = advantages_of(advantage, rewards, rollout.mask, samples=4, values=rollout.values)
    torch.testing.assert_close(rollout.advantages, made.advantages, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "changes", [{"dtype": "mixed"}, {"gradient_checkpointing": True}, {"head": "torch"}, {"micro_batches": 2}]
)
def test_a_reference_is_the_policy_at_first_however_it_is_trained(tmp_path: Path, changes: dict[str, Any]) -> None:
    ppo.train(config(tmp_path / "run", **SHORT, ref_kl_coef=0.5, **changes))
    rows = rows_without_times(tmp_path / "run")
    assert rows[0]["ref_kl"] == 0 and rows[1]["ref_kl"] > 0


@pytest.mark.parametrize("place", ["loss", "reward"])
def test_a_run_with_a_reference_resumes_bit_for_bit(tmp_path: Path, place: str) -> None:
    changes = {"ref_kl_coef": 0.5, "ref_kl_in": place, "lr": 0.01, "save_every": 2, "warm_steps": 3, "warm_batch": 8}
    whole, halves = resumed(tmp_path, 2, steps=3, **changes)
    assert (halves / REFERENCE).read_bytes() == (whole / REFERENCE).read_bytes()
    kls = [row["ref_kl"] for row in rows_without_times(whole)]
    assert kls[0] == 0 and min(kls[1:]) > 0


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda path: path.unlink(), r"ref_kl_coef: expected the reference of this run in .*, got none"),
        (lambda path: path.write_bytes(path.read_bytes()[:-9]), r"ref_kl_coef: expected .*, got a file that was cut"),
        (
            lambda path: path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1])),
            r"ref_kl_coef: expected .*, got a damaged file \(its checksum does not match\)",
        ),
        (lambda path: save_tree(path, {"lm_head.weight": torch.zeros(3)}), r"got that of another model"),
    ],
)
def test_a_reference_that_is_not_whole_stops_a_resumption(
    tmp_path: Path, with_reference: Path, harm: Callable[[Path], Any], message: str
) -> None:
    out = Path(shutil.copytree(with_reference, tmp_path / "run"))
    harm(out / REFERENCE)
    before = contents(out)
    with pytest.raises((ValueError, OSError), match=message):
        ppo.train(config(out, **{**SHORT, "ref_kl_coef": 0.5, "steps": 2, "resume": True}))
    assert contents(out) == before


@pytest.fixture(scope="module")
def with_reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory, ref_kl_coef=0.5)


def test_a_reference_that_is_not_finite_stops_the_run(tmp_path: Path, with_reference: Path) -> None:
    out = Path(shutil.copytree(with_reference, tmp_path / "run"))
    save_tree(out / REFERENCE, {n: torch.full_like(x, torch.nan) for n, x in load_tree(out / REFERENCE).items()})
    with pytest.raises(NonFinite, match=r"step 1: log-probs of 64 tokens under the reference are not finite"):
        ppo.train(config(out, **{**SHORT, "ref_kl_coef": 0.5, "steps": 2, "resume": True}))


def test_a_run_without_a_reference_has_none_to_go_on_with(run: Path) -> None:  # noqa: F811
    assert not (run / REFERENCE).exists()
    changes = {"resume_changes": ("ref_kl_coef",), "ref_kl_coef": 0.5}
    with pytest.raises(FileNotFoundError, match="got none: a run that began with ref_kl_coef = 0 kept none"):
        again(run, **changes)


def test_an_adapters_reference_is_the_adapter_where_rl_starts(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    changes = {"lora_rank": 2, "ref_kl_coef": 0.5, "lr": 0.03, "save_every": 1, "warm_steps": 3, "warm_batch": 8}
    whole, _ = resumed(tmp_path, 1, steps=2, **changes)
    weights = load_tree(whole / REFERENCE)
    assert weights and all("lora_" in name for name in weights)
    assert any(float(x.abs().max()) > 0 for name, x in weights.items() if "lora_B" in name)  # the start trained it
    kls = [row["ref_kl"] for row in rows_without_times(whole)]
    assert kls[0] == 0 and min(kls[1:]) > 0


# --- groups without signal -------------------------------------------------------------------------------------------


class Told(EasyTask):
    """Rewards by the number of the prompt: whether its group has signal is known. Round r of step s has the prompts
    (s, r, 0), (s, r, 1), ..."""

    def __init__(self, signal: dict[tuple[int, int], list[bool]]) -> None:
        super().__init__()
        self.signal, self.asked = signal, 0

    def prompts(self, count: int, *, seed: int, split: Any) -> list[Prompt]:
        if split == "validation":
            return super().prompts(count, seed=seed, split=split)
        number, step = divmod(seed, ROUND_STRIDE)
        return [Prompt(f"{step} {10 * number + i}", (step, number, i)) for i in range(count)]

    def verify(self, prompt: Prompt, completion: str) -> float:
        self.asked += 1
        if len(prompt.data) == 2:  # of the validation
            return 0.0
        step, number, i = prompt.data
        return float(self.signal.get((step, number), [False] * 4)[i] and self.asked % 2)


ALL = [True] * 4
#: What the rounds of a step have of signal, the most further rounds, the groups that the step learns from, and how
#: many were sampled: (round, place).
ROUNDS = [
    ([ALL], 3, [(0, 0), (0, 1), (0, 2), (0, 3)], 4),
    ([[True, False, True, False], [False, True, True, True]], 3, [(0, 0), (1, 1), (0, 2), (1, 2)], 8),
    ([[False] * 4, [False, False, True, False], ALL], 3, [(1, 2), (2, 0), (2, 1), (2, 2)], 12),
    ([[False, True, False, False], [False, False, False, True], [False] * 4], 2, [(1, 3), (0, 1), (0, 2), (0, 3)], 12),
    ([[True, False, True, True]], 0, [(0, 0), (0, 1), (0, 2), (0, 3)], 4),
]


@pytest.mark.parametrize(("rounds", "most", "places", "sampled"), ROUNDS)
def test_groups_without_signal_are_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rounds: list[list[bool]], most: int, places: Any, sampled: int
) -> None:
    task = Told({(step, number): mine for step in range(2) for number, mine in enumerate(rounds)})
    with_task(monkeypatch, lambda: task)
    kept = Keeps()
    settings = config(tmp_path / "run", **SHORT, dynamic_sampling=most)
    ppo.train(settings, probes=[kept, RolloutMetrics()])
    for step, rollout in enumerate(kept.rollouts):
        words = [f"{step} {10 * number + i}" for number, i in places]
        shown = [kept.policy.tokenizer.decode(ids, skip_special_tokens=True) for ids in rollout.prompts.ids[::4]]
        assert [text.strip() for text in shown] == words
        assert [bool(row[0] == row[1]) for row in rollout.rewards] == [not rounds[number][i] for number, i in places]
        assert torch.equal(rollout.completed, rollout.mask) and rollout.sampled_rewards.shape == (sampled, 4)
    row = rows_without_times(settings.out)[0]
    assert row.get("groups_sampled") == (sampled if most else None)
    assert row["reward"] == pytest.approx(sum(map(sum, rounds)) / 2 / sampled)


def test_without_groups_to_replace_a_run_is_the_same_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_task(monkeypatch, lambda: Told({(step, 0): ALL for step in range(3)}))
    for name, most in (("none", 0), ("some", 2)):
        ppo.train(config(tmp_path / name, **{**SHORT, "steps": 2}, dynamic_sampling=most))
    none, some = (rows_without_times(tmp_path / name) for name in ("none", "some"))
    assert [{**row, "groups_sampled": 4} for row in none] == some


def test_a_run_that_replaces_groups_resumes_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Rare(EasyTask):  # a group has signal now and then
        def verify(self, prompt: Prompt, completion: str) -> float:
            return float(sum(map(len, completion.split())) in (6, 9))

    with_task(monkeypatch, Rare)
    whole, _ = resumed(tmp_path, 2, steps=4, save_every=2, dynamic_sampling=3)
    assert len({row["groups_sampled"] for row in rows_without_times(whole)}) > 1


def test_answers_of_every_round_that_could_not_be_judged_are_told() -> None:
    class FailsAtFirst(EasyTask):
        calls = 0

        def verify(self, prompt: Prompt, completion: str) -> float:
            self.calls += 1
            if self.calls <= 16:
                raise ValueError("no verdict")
            return float(self.calls % 2)

    settings = settings_of(dynamic_sampling=1)
    task = FailsAtFirst()
    policy = build_policy(settings, task)
    rollout = ppo.collect(policy, task, settings, step=0, generator=torch.Generator().manual_seed(0))
    assert len(rollout.unscored) == 16 and rollout.rewards.mean() == 0.5


# --- completions that were cut off -----------------------------------------------------------------------------------

WORDS = [f"w{i}" for i in range(95)]


class Ending(EasyTask):
    """Completions of up to three words, which end with an end token."""

    name, max_new_tokens, fixed_length = "ending", 3, False

    def prompts(self, count: int, *, seed: int, split: Any) -> list[Prompt]:
        return [Prompt(f"w{(seed + i) % 95} w{i}") for i in range(count)]


def ending(monkeypatch: pytest.MonkeyPatch, end_ids: Iterable[int], head: str = "linear") -> None:
    """Runs of a model whose vocabulary has such end tokens."""
    with_task(monkeypatch, Ending)
    policy = lambda config, task: Policy(make("llama"), word_tokenizer(WORDS), end_ids=end_ids, head=config.head)  # noqa: E731
    monkeypatch.setattr(trainer_run, "first_policy", policy)


CUT = {**SHORT, "model": "smollm2", "mask_truncated": True}


def test_a_completion_that_was_cut_off_keeps_its_reward_and_its_length(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {}
    for name, masked in (("masked", True), ("counted", False)):
        ending(monkeypatch, range(30, 60))
        kept = Keeps()
        ppo.train(config(tmp_path / name, **{**CUT, "mask_truncated": masked}), probes=[kept, RolloutMetrics()])
        found[name] = kept.rollouts[0], rows_without_times(tmp_path / name)[0]
    (rollout, row), (counted, other) = found["masked"], found["counted"]
    last = rollout.ids.gather(1, rollout.lengths[:, None] - 1)[:, 0]
    assert torch.equal(rollout.truncated, (rollout.lengths == 3) & ~((last >= 30) & (last < 60)))
    assert 0 < int(rollout.truncated.sum()) < 16
    for i in range(16):
        expected = [t < int(rollout.lengths[i]) and not bool(rollout.truncated[i]) for t in range(3)]
        assert rollout.mask[i].tolist() == expected
        assert rollout.completed[i].tolist() == [t < int(rollout.lengths[i]) for t in range(3)]
    assert torch.equal(rollout.ids, counted.ids) and torch.equal(rollout.rewards, counted.rewards)
    assert torch.equal(rollout.advantages, counted.advantages) and torch.equal(counted.mask, counted.completed)
    same = ("entropy", "reward", "tokens", "sampling_gap", "truncated", "length_mean", "length_max", "groups_mixed")
    assert {name: row[name] for name in same} == {name: other[name] for name in same}
    assert row["truncated"] == float(rollout.truncated.double().mean())


def test_advantages_are_whitened_over_what_is_learned_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ending(monkeypatch, range(30, 60))
    kept = Keeps()
    ppo.train(config(tmp_path / "run", **CUT, advantage="reinforce_plus_plus_baseline"), probes=[kept])
    rollout = kept.rollouts[0]
    plain = (rollout.rewards - rollout.rewards.mean(1, keepdim=True)).double().view(-1, 1).expand(rollout.mask.shape)
    learned = plain[rollout.mask]
    assert bool(rollout.truncated.any()) and float(learned.var()) > 0 and float(learned.mean()) != 0
    torch.testing.assert_close(
        rollout.advantages[rollout.mask].double(), (learned - learned.mean()) / learned.std(), rtol=1e-5, atol=1e-6
    )


def test_a_constant_norm_is_that_of_the_longest_completion_there_may_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ending(monkeypatch, range(97))  # of one token each, where three are the most
    kept = Keeps()
    ppo.train(
        config(tmp_path / "run", **SHORT, model="smollm2", loss_agg_mode="seq-mean-token-sum-norm"), probes=[kept]
    )
    assert kept.rollouts[0].ids.shape[1] == 1 and kept.rollouts[0].longest == 3


def test_the_constant_norm_divides_losses_and_weights_of_tokens() -> None:
    policy = policy_of()
    whole = rollout_of(policy)
    settings = settings_of(loss_agg_mode="seq-mean-token-sum-norm")
    losses, weights = [], []
    for longest in (5, 20):
        given = dataclasses.replace(whole, longest=longest)
        made, _ = updated(policy, given, settings)
        losses.append(float(made.losses[0].loss))
        weights.append(all_tokens(given, [ROWS], settings).coefficient)
    assert losses[0] == pytest.approx(4 * losses[1], rel=1e-6) != 0
    torch.testing.assert_close(weights[0], 4 * weights[1])
    assert float(weights[1][0, 0]) == pytest.approx(1 / 8 / 20)


@pytest.mark.parametrize(
    ("head", "method", "mode"),
    [
        *(("linear", "grpo", mode) for mode in ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum")),
        ("logits", "grpo", "seq-mean-token-mean"),
        ("torch", "grpo", "token-mean"),
        ("linear", "exact_cov", "token-mean"),
        ("linear", "exact_cov", "seq-mean-token-mean"),
        ("linear", "clip_cov", "seq-mean-token-sum"),
    ],
)
def test_what_was_cut_off_takes_no_part_in_an_update(head: str, method: str, mode: str) -> None:
    policy = policy_of(head)
    whole = rollout_of(policy)
    truncated = torch.tensor([False, True, False, False, True, False, True, False])
    whole.mask, whole.truncated = whole.mask & ~truncated[:, None], truncated
    settings = settings_of(
        method=method, loss_agg_mode=mode, micro_batches=2, **({"cov_low": -9.0} if method == "clip_cov" else {})
    )
    made, gradients = updated(policy, whole, settings)
    dropped = torch.zeros_like(whole.mask)
    for rows, control in zip(made.rows, made.controls, strict=True):
        dropped[rows] = dropped[rows] if control is None else control.dropped
    assert bool(dropped.any()) == (method != "grpo") and not bool(dropped[truncated].any())
    model = policy_of().model
    logprob, _ = logprob_of(model, dataclasses.replace(whole, mask=whole.completed))
    total = torch.zeros((), dtype=torch.float64)
    left = [row for row in range(8) if not bool(truncated[row])]
    tokens = sum(int(whole.mask[row].sum()) for row in left)
    for row in left:
        losses: list[Tensor] = []
        for t in range(int(whole.mask[row].sum())):
            a, ratio = whole.advantages[row, t], (logprob[row, t] - whole.old_logprob[row, t]).exp()
            losses.append(torch.maximum(-a * ratio, -a * ratio.clamp(0.8, 1.2)) * (not bool(dropped[row, t])))
        weight = {
            "token-mean": 1 / tokens,
            "seq-mean-token-mean": 1 / len(losses) / len(left),
            "seq-mean-token-sum": 1 / len(left),
        }
        total = total + weight[mode] * torch.stack(losses).sum()
    assert_same(made, gradients, total, gradients_of(model, total))


@pytest.mark.parametrize(
    "changes", [{}, {"method": "clip_cov"}, {"advantage": "gae"}, {"target_entropy": "4"}, {"ref_kl_coef": 0.1}]
)
def test_a_rollout_without_a_token_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    ending(monkeypatch, [10**6])  # which is never drawn
    settings = {**CUT, "steps": 2, "weight_decay": 0.1, "measure_memory": True, "first_order_every": 1}
    kept = Keeps()
    told = config(tmp_path / "run", **{**settings, "measure_entropy_change": True, **changes})
    ppo.train(told, probes=[*default_probes(told, ppo.backward), kept])
    weights = [model.state_dict() for model in kept.models]
    assert all(torch.equal(value, weights[2][name]) for name, value in weights[0].items())
    assert all(bool(rollout.truncated.all()) and not bool(rollout.mask.any()) for rollout in kept.rollouts)
    for row in rows_without_times(told.out)[:2]:
        assert row["updates"] == 0 and row["truncated"] == 1 and row["tokens"] == 48 and row["measured_dh"] == 0
        assert "loss" not in row
        assert {name for name, value in row.items() if value is None and not name.startswith("method/")} == set()


def test_a_minibatch_without_a_token_is_no_update(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ending(monkeypatch, range(30, 60))
    kept = Keeps()
    settings = config(tmp_path / "run", **CUT, minibatches=16)
    ppo.train(settings, probes=[kept, RolloutMetrics(), UpdateMetrics()])
    left = 16 - int(kept.rollouts[0].truncated.sum())
    assert 0 < left < 16 and rows_without_times(settings.out)[0]["updates"] == left


def test_where_nothing_is_cut_off_it_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="mask_truncated: expected a task whose completions end with an end token, got "
    ):
        ppo.train(config(tmp_path / "run", **{**CUT, "model": "tiny"}))
    assert not (tmp_path / "run").exists()

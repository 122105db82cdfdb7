"""The reference trainer on tiny settings: task, policy, advantages, loop, reproducibility, resume, report."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from pathlib import Path

import pandas as pd
import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("tyro")

from entropy_kernels.trainer import checkpoint, drivers, ppo, reproduce
from entropy_kernels.trainer.__main__ import main
from entropy_kernels.trainer.advantages import group_advantages, pass_at_k
from entropy_kernels.trainer.config import RESUMABLE_FIELDS, TrainerConfig
from entropy_kernels.trainer.entropy_change import FirstOrder, logits_as_parameters
from entropy_kernels.trainer.metrics_log import COVARIANCE_COLUMNS, MetricsLog, defined, read_rows
from entropy_kernels.trainer.policy import Encoded, Policy, build_policy, load_policy, word_tokenizer
from entropy_kernels.trainer.progress import ProgressBoard
from entropy_kernels.trainer.report import write_report
from entropy_kernels.trainer.rollout import collect, evaluate, score
from entropy_kernels.trainer.selection import Part, ppo_clipped, select
from entropy_kernels.trainer.summary import agreement
from entropy_kernels.trainer.tasks import Prompt, WalkTask, extract_answer, make_task, task_options, verify_all

TINY = TrainerConfig(
    steps=3,
    warm_steps=0,
    hidden_size=16,
    intermediate_size=24,
    num_layers=1,
    num_heads=2,
    prompts_per_step=4,
    samples_per_prompt=4,
    minibatches=2,
    eval_every=2,
    eval_prompts=4,
    eval_samples=2,
    final_eval_prompts=4,
    final_eval_samples=4,
    first_order_every=2,
    save_every=0,
    tensorboard=False,
    progress=False,
    lr=3e-3,
)


class EasyTask(WalkTask):
    """The walk with a reward that even an untrained policy gets half of the time, so that gradients flow."""

    def verify(self, prompt: Prompt, completion: str) -> float:
        return float(sum(map(len, completion.split())) % 2)


@pytest.fixture(autouse=True)
def easy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ppo, "make_task", lambda name, max_new_tokens=None: EasyTask())
    monkeypatch.setattr(drivers, "make_task", lambda name, max_new_tokens=None: EasyTask())


def config(out: Path, **changes: object) -> TrainerConfig:
    return dataclasses.replace(TINY, out=out, **changes)  # type: ignore[arg-type]


def rows_without_times(out: Path) -> list[dict[str, object]]:
    rows = read_rows(out / "metrics.jsonl")
    assert rows, "no rows were logged"
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in rows]


# --- tasks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        ("x3 36 +8 44 -2 42 +15", 1.0),
        ("+15 27 +15 42 +8 50 +8", 0.0),  # ends on 58
        ("x3 36 +8 45 -2 43 +15", 0.0),  # 36 + 8 is not 45
        ("x3 36 +8 44 -2 42", 0.0),  # too short
        ("x3 36 +8 44 -2 42 +15 57", 0.0),  # too long
        ("x3 36 x3 108 -6 102 -6", 0.0),  # leaves 0..99
        ("36 x3 +8 44 -2 42 +15", 0.0),  # a value where a move belongs
        ("", 0.0),
    ],
)
def test_walk_verifier(completion: str, reward: float) -> None:
    assert WalkTask().verify(Prompt("12 57", (12, 57)), completion) == reward


def test_walk_prompts_are_solvable_seeded_and_split() -> None:
    task = WalkTask()
    train = task.prompts(200, seed=1, split="train")
    held = task.prompts(200, seed=1, split="validation")
    assert train == task.prompts(200, seed=1, split="train")
    assert train != task.prompts(200, seed=2, split="train")
    assert not {p.data for p in train} & {p.data for p in held}
    reachable = {}
    for prompt in (*train, *held):
        start, goal = prompt.data
        if start not in reachable:
            ends = {start}
            for _ in range(4):
                ends = {after for value in ends for _, after in task.successors[value]}
            reachable[start] = ends
        assert goal in reachable[start]


def test_walk_demonstrations_are_right_except_for_the_share_asked() -> None:
    task = WalkTask()

    def share_right(wrong_fraction: float) -> float:
        pairs = task.demonstrations(400, seed=0, wrong_fraction=wrong_fraction)
        prompts = [Prompt(p, tuple(map(int, p.split()))) for p, _ in pairs]
        assert all(task.split_of(*p.data) == "train" for p in prompts), "a held-out pair was shown"
        return sum(verify_all(task, prompts, [c for _, c in pairs])) / len(pairs)

    assert share_right(0.0) == 1.0
    assert 0.6 < share_right(0.3) < 0.8


def test_extract_answer() -> None:
    assert extract_answer("so <answer> 42 </answer> done") == "42"
    assert extract_answer("<answer>42") == "42"
    assert extract_answer("first\n 7 \n") == "7"
    assert extract_answer("") == ""


def test_task_names() -> None:
    with pytest.raises(ValueError, match=r"task: expected walk or reasoning_gym:NAME, got 'chess'"):
        make_task("chess")
    with pytest.raises(ValueError, match=r"max_new_tokens: expected 7 .*got 9"):
        make_task("walk", max_new_tokens=9)


def test_task_options() -> None:
    assert task_options("") == {}
    assert task_options("max_terms=2&share=0.5&kind=plain&both=[1, 2]") == {
        "max_terms": 2,
        "share": 0.5,
        "kind": "plain",
        "both": [1, 2],
    }
    with pytest.raises(ValueError, match=r"task: expected options as key=value&key=value after the [?], got 'max'"):
        task_options("max")


def test_reasoning_gym_options() -> None:
    pytest.importorskip("reasoning_gym")
    easy = make_task("reasoning_gym:chain_sum?max_terms=2&min_digits=1&max_digits=1")
    assert all(abs(int(prompt.data["answer"])) <= 18 for prompt in easy.prompts(50, seed=0, split="train"))
    with pytest.raises(ValueError, match=r"task: expected options that chain_sum has, got .*max_turms"):
        make_task("reasoning_gym:chain_sum?max_turms=2")


def test_reasoning_gym_adapter() -> None:
    pytest.importorskip("reasoning_gym")
    task = make_task("reasoning_gym:simple_equations")
    prompts = task.prompts(3, seed=0, split="train")
    for other in (task.prompts(3, seed=0, split="validation"), task.prompts(3, seed=1, split="train")):
        assert {p.text for p in prompts}.isdisjoint(p.text for p in other)
    for prompt, (text, completion) in zip(prompts, task.demonstrations(3, seed=0, wrong_fraction=0.0), strict=True):
        assert text == prompt.text
        assert task.verify(prompt, completion) == 1.0
        assert task.verify(prompt, "<answer>no number</answer>") < 1.0


# --- tokenizer and policy --------------------------------------------------------------------------------------------


def policy_of(settings: TrainerConfig = TINY) -> Policy:
    return build_policy(settings, EasyTask())


def test_tokenizer_round_trip(tmp_path: Path) -> None:
    policy = policy_of()
    walk = "x3 36 +8 44 -2 42 +15"
    ids, mask = policy.encode_completions([walk])
    assert ids.shape == (1, 7)
    assert bool(mask.all())
    assert policy.tokenizer.decode(ids[0]) == walk
    policy.save(tmp_path / "model")
    again = load_policy(tmp_path / "model", TINY, EasyTask())
    assert again.tokenizer.decode(ids[0]) == walk
    assert again.encode(["12 57"]).ids.tolist() == policy.encode(["12 57"]).ids.tolist()
    for name, value in policy.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name]), name
    with pytest.raises(Exception, match=r"UNK"):
        policy.encode(["12 hello"])
    with pytest.raises(ValueError, match=r"words: expected distinct words"):
        word_tokenizer(["a", "a"])


def test_rollout_logprobs_equal_a_full_forward() -> None:
    policy = policy_of()
    settings = dataclasses.replace(TINY, temperature=0.7)
    rollout = collect(policy, EasyTask(), settings, step=0, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        full = policy.model(torch.cat([rollout.prompts.ids, rollout.ids], dim=1)).logits[:, 2:-1].double()
    reference = torch.log_softmax(full / 0.7, dim=-1)
    expected = reference.gather(-1, rollout.ids[..., None])[..., 0]
    torch.testing.assert_close(rollout.old_logprob.double(), expected, rtol=0, atol=1e-5)
    entropy = -(reference.exp() * reference).sum(-1)
    torch.testing.assert_close(rollout.entropy.double(), entropy, rtol=0, atol=1e-5)
    assert rollout.sampling_gap < 1e-5


class EndingTask(EasyTask):
    """Prompts of unequal length and completions that may end early."""

    fixed_length = False


def test_padding_and_early_ends_do_not_change_the_scores() -> None:
    policy = policy_of()
    end = policy.tokenizer.convert_tokens_to_ids("+1")
    policy = Policy(policy.model, policy.tokenizer, end_id=end)
    encoded = policy.encode(["12 57", "12 57 3 4 5", "1"])
    assert encoded.mask.tolist() == [[0, 0, 0, 1, 1, 1], [1] * 6, [0, 0, 0, 0, 1, 1]]
    generator = torch.Generator().manual_seed(1)
    repeated = Encoded(encoded.ids.repeat(8, 1), encoded.mask.repeat(8, 1))
    drawn = policy.sample(repeated, max_new_tokens=12, temperature=1.0, generator=generator)
    lengths = drawn.mask.sum(1)
    assert lengths.min() < 12, "no completion ended early: the test shows nothing"
    for i in range(len(lengths)):
        n = int(lengths[i])
        assert end not in drawn.ids[i, : n - 1]
        assert n == drawn.ids.shape[1] or drawn.ids[i, n - 1] == end
    logprob, _, _ = score(policy, TINY, repeated, drawn.ids, drawn.mask)
    torch.testing.assert_close(logprob, drawn.logprob, rtol=0, atol=1e-5)
    for i in (0, 1, 2):
        alone = policy.encode([policy.tokenizer.decode(encoded.ids[i][encoded.mask[i].bool()][1:])])
        single, _, _ = score(policy, TINY, alone, drawn.ids[i : i + 1], drawn.mask[i : i + 1])
        torch.testing.assert_close(single[0], logprob[i], rtol=0, atol=1e-5)
    assert torch.equal(logprob == 0, ~drawn.mask)


# --- advantages and pass@k -------------------------------------------------------------------------------------------


def test_advantages_by_hand() -> None:
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0]])
    sd = math.sqrt(1 / 3)
    grpo = group_advantages(rewards, estimator="grpo")
    torch.testing.assert_close(grpo, torch.tensor([[0.5, -0.5, -0.5, 0.5], [0.0] * 4]) / sd, rtol=1e-5, atol=1e-6)
    plain = group_advantages(rewards, estimator="grpo", normalize_std=False)
    torch.testing.assert_close(plain, torch.tensor([[0.5, -0.5, -0.5, 0.5], [0.0] * 4]))
    rloo = group_advantages(rewards, estimator="rloo")
    # 1 - mean(0, 0, 1) and 0 - mean(1, 0, 1)
    torch.testing.assert_close(rloo, torch.tensor([[2 / 3, -2 / 3, -2 / 3, 2 / 3], [0.0] * 4]))
    with pytest.raises(ValueError, match=r"estimator: expected grpo or rloo, got 'gae'"):
        group_advantages(rewards, estimator="gae")
    with pytest.raises(ValueError, match=r"rewards: expected shape"):
        group_advantages(rewards[:, :1], estimator="grpo")


def test_pass_at_k() -> None:
    def brute(correct: int, samples: int, k: int) -> float:
        return 1 - math.comb(samples - correct, k) / math.comb(samples, k)

    counts = [0, 1, 3, 7, 8]
    for k in (1, 2, 5, 8):
        expected = sum(brute(c, 8, k) for c in counts) / len(counts)
        assert pass_at_k(torch.tensor(counts), 8, k) == pytest.approx(expected, abs=1e-12)
    with pytest.raises(ValueError, match=r"k: expected 1 <= k <= samples = 8, got 9"):
        pass_at_k(torch.tensor(counts), 8, 9)


# --- selection -------------------------------------------------------------------------------------------------------


def parts_of(n: int = 1) -> list[Part]:
    generator = torch.Generator().manual_seed(0)
    shape = (16, 50)
    logprob = -torch.rand(shape, generator=generator) * 3
    old = logprob + 0.3 * torch.randn(shape, generator=generator)
    advantages = torch.randn((16, 1), generator=generator).expand(shape) * 2
    mask = torch.rand(shape, generator=generator) < 0.9
    index = torch.arange(16 * 50).view(shape)
    return [
        Part(*parts)
        for parts in zip(*(tensor.chunk(n) for tensor in (logprob, old, advantages, mask, index)), strict=True)
    ]


@pytest.mark.parametrize("method", ["clip_cov", "kl_cov", "random_dropped", "random_penalized"])
def test_selection_is_that_of_the_whole_minibatch(method: str) -> None:
    settings = dataclasses.replace(TINY, method=method)  # type: ignore[arg-type]
    whole = select(settings, parts_of(), seed=3)
    split = select(settings, parts_of(4), seed=3)
    assert whole is not None and split is not None
    assert torch.equal(torch.cat(split), whole[0])
    part = parts_of()[0]
    assert not (whole[0] & ~part.mask).any()
    expected = int(settings.selection_ratio * int(part.mask.sum()))
    assert int(whole[0].sum()) == expected > 0


def test_controls_draw_as_many_tokens_elsewhere() -> None:
    part = parts_of()[0]
    chosen, control, other_seed = (
        select(dataclasses.replace(TINY, method=method, cov_ratio=0.05), [part], seed=seed)[0]  # type: ignore
        for method, seed in (("clip_cov", 3), ("random_dropped", 3), ("random_dropped", 5))
    )
    assert chosen.sum() == control.sum() == other_seed.sum()
    assert not torch.equal(control, other_seed)
    covariance = (part.logprob - part.logprob[part.mask].mean()) * (part.advantages - part.advantages[part.mask].mean())
    assert (covariance[chosen] > 1).all()
    assert (covariance[control] < 1).any(), "the control kept to the band"
    assert not (chosen & ppo_clipped(part, TINY)).any()


def test_grpo_selects_nothing() -> None:
    assert select(TINY, parts_of(), seed=0) is None


# --- the loop --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["grpo", "clip_cov", "kl_cov"])
def test_two_runs_of_one_seed_agree_bit_for_bit(tmp_path: Path, method: str) -> None:
    for name in ("a", "b"):
        ppo.train(config(tmp_path / name, method=method, cov_low=-9.0, cov_high=9.0, cov_ratio=0.1))
    a, b = rows_without_times(tmp_path / "a"), rows_without_times(tmp_path / "b")
    assert a == b
    assert [row["step"] for row in a] == [0, 1, 2, 3]
    weights = [torch.load(tmp_path / n / "checkpoint.pt", weights_only=True)["model"] for n in ("a", "b")]
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name]), name
    ppo.train(config(tmp_path / "c", method=method, seed=1))
    assert rows_without_times(tmp_path / "c") != a


@pytest.mark.parametrize("method", ["clip_cov", "kl_cov"])
def test_resume_continues_bit_for_bit(tmp_path: Path, method: str) -> None:
    settings = {"method": method, "cov_low": -9.0, "cov_high": 9.0, "cov_ratio": 0.1}
    ppo.train(config(tmp_path / "whole", steps=5, **settings))
    ppo.train(config(tmp_path / "halves", steps=2, **settings))
    # a crash after the checkpoint leaves rows that the resumed run must write anew, and half a line
    with open(tmp_path / "halves" / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": 3, "entropy": 9.9}) + '\n{"step": 4, "ent')
    ppo.train(config(tmp_path / "halves", steps=5, resume=True, **settings))
    assert rows_without_times(tmp_path / "halves") == rows_without_times(tmp_path / "whole")


def test_resume_errors(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"resume: expected a checkpoint at"):
        ppo.train(config(tmp_path / "none", resume=True))
    ppo.train(config(tmp_path / "run", steps=1))
    with pytest.raises(ValueError, match=r"another configuration; lr: expected 0.003 \(as saved\), got 0.1"):
        ppo.train(config(tmp_path / "run", steps=2, resume=True, lr=0.1))
    with pytest.raises(FileExistsError, match=r"out: expected a directory without a run"):
        ppo.train(config(tmp_path / "run", steps=1))
    ppo.train(config(tmp_path / "run", steps=1, overwrite=True))
    assert {f.name for f in dataclasses.fields(TrainerConfig)} > RESUMABLE_FIELDS


def test_interrupted_write_keeps_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ppo.train(config(tmp_path / "run", steps=1))
    path = tmp_path / "run" / "checkpoint.pt"
    before = path.read_bytes()

    def torn(state: object, file: object) -> None:
        file.write(b"half of a chec")  # type: ignore[attr-defined]
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", torn)
    with pytest.raises(OSError, match="disk full"):
        ppo.train(config(tmp_path / "run", steps=2, resume=True))
    assert path.read_bytes() == before
    assert checkpoint.load_checkpoint(path)["step"] == 1
    assert [p.name for p in path.parent.iterdir() if p.name.endswith(".tmp")] == []


@pytest.mark.parametrize("method", ["grpo", "clip_cov", "kl_cov", "random_dropped"])
@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-mean"])
def test_micro_batches_share_a_trajectory(tmp_path: Path, method: str, mode: str) -> None:
    logs = {}
    for n in (1, 4):
        settings = config(
            tmp_path / str(n),
            method=method,
            micro_batches=n,
            loss_agg_mode=mode,
            cov_low=-9.0,
            cov_high=9.0,
            cov_ratio=0.1,
            entropy_coef=0.01,
        )
        ppo.train(settings)
        logs[n] = rows_without_times(tmp_path / str(n))
    for one, four in zip(logs[1], logs[4], strict=True):
        assert one.keys() == four.keys()
        for name, value in one.items():
            if name in ("sampling_gap",):
                continue
            assert four[name] == pytest.approx(value, rel=2e-3, abs=2e-5), (one["step"], name)
    for row in logs[4][:-1]:
        selected = row["tokens_dropped"] + row["tokens_penalized"]  # type: ignore[operator]
        assert (selected > 0) == (method != "grpo")


def test_selection_with_old_logprobs_needs_no_extra_forward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = {"n": 0}
    original = ppo.fresh_logprob

    def counted(*args: object) -> torch.Tensor:
        calls["n"] += 1
        return original(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(ppo, "fresh_logprob", counted)
    ppo.train(config(tmp_path / "new", steps=1, method="kl_cov", micro_batches=2))
    assert calls["n"] == 4
    ppo.train(config(tmp_path / "old", steps=1, method="kl_cov", micro_batches=2, selection_logprob="old"))
    assert calls["n"] == 4


def test_rows_have_every_promised_number(tmp_path: Path) -> None:
    ppo.train(config(tmp_path / "run", method="clip_cov", cov_low=-9.0, cov_high=9.0, save_every=1, tensorboard=True))
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    promised = {
        *("entropy", "reward", "val_pass1", "val_pass2", "val_distinct", "cov_mean", *COVARIANCE_COLUMNS.values()),
        *("tokens_in_band", "tokens_dropped", "tokens_penalized", "clipfrac", "ppo_kl", "ppo_kl_abs", "measured_dh"),
        *(
            "predicted_dh",
            "first_order_dh",
            "first_update_dh",
            "small_update_dh",
            "first_order_step_dh",
            "grad_norm",
            "time/tokens_per_s",
            "time/ops_share",
            "time/step",
        ),
    }
    assert promised <= rows[0].keys()
    assert {"val_pass1", "val_pass2", "final_pass1", "final_pass4", "final_distinct"} <= rows[-1].keys()
    assert all(defined(name) for row in rows for name in row)
    assert rows[0]["tokens_dropped"] > 0
    assert 0 < rows[0]["time/ops_share"] < 1
    assert rows[0]["cov_top_1"] == pytest.approx(rows[0]["cov_mean"], abs=1e-12)
    assert rows[0]["cov_top_0.0002"] >= rows[0]["cov_top_0.2"] >= rows[0]["cov_top_1"]
    assert any((tmp_path / "run" / "tensorboard").iterdir())
    assert (tmp_path / "run" / "model" / "tokenizer.json").exists()


def test_log_refuses_undefined_names(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, tensorboard=False)
    with pytest.raises(ValueError, match=r"row: expected names from DEFINITIONS, got acuracy"):
        log.write({"step": 0, "acuracy": 1.0})
    log.write({"step": 0, "entropy": float("nan")})
    log.close()
    assert read_rows(tmp_path / "metrics.jsonl") == [{"step": 0, "entropy": None}]


# --- entropy change --------------------------------------------------------------------------------------------------


def test_logits_as_parameters_follow_the_theory() -> None:
    policy = policy_of()
    settings = dataclasses.replace(TINY, temperature=0.8)
    rollout = collect(policy, EasyTask(), settings, step=0, generator=torch.Generator().manual_seed(0))
    assert (rollout.advantages != 0).any()
    result = logits_as_parameters(policy, rollout, temperature=0.8)
    fit = agreement(result["predicted"], result["measured"])
    assert fit["correlation"] > 0.999
    assert fit["slope"] == pytest.approx(1.0, abs=0.01)
    # a large step leaves the first order: the experiment can fail
    far = logits_as_parameters(policy, rollout, temperature=0.8, step_size=30.0)
    assert agreement(far["predicted"], far["measured"])["slope"] != pytest.approx(1.0, abs=0.01)


def test_first_order_of_the_network() -> None:
    policy = policy_of()
    policy.model.double()
    with torch.no_grad():
        # an untrained policy is almost uniform, where the gradient of the entropy vanishes
        policy.model.lm_head.weight.mul_(20)
    rollout = collect(policy, EasyTask(), TINY, step=0, generator=torch.Generator().manual_seed(0))
    before = rollout.entropy.double()[rollout.mask].mean()
    first_order = FirstOrder(policy, rollout, TINY)
    # a step that makes the sampled tokens likelier
    logits = policy.completion_logits(rollout.prompts, rollout.ids, rollout.mask)
    policy.logprob_entropy(logits, rollout.ids, rollout.mask, temperature=1.0).logprob.mean().backward()
    with torch.no_grad():
        for parameter in policy.model.parameters():
            if parameter.grad is not None:
                parameter += 1e-6 * parameter.grad
    _, entropy, _ = score(policy, TINY, rollout.prompts, rollout.ids, rollout.mask)
    measured = float(entropy.double()[rollout.mask].mean() - before)
    assert abs(measured) > 1e-7
    assert first_order.change() == pytest.approx(measured, rel=0.05)
    with first_order.fraction(0.5):
        half = first_order.change()
    assert half == pytest.approx(first_order.change() / 2, rel=1e-9)


def test_evaluate_counts_distinct_answers() -> None:
    class AllRight(WalkTask):
        def verify(self, prompt: Prompt, completion: str) -> float:
            return 1.0

    policy = policy_of()
    metrics = evaluate(policy, AllRight(), TINY, prompts=3, samples=8, generator=torch.Generator().manual_seed(0))
    assert metrics["pass1"] == metrics["pass8"] == 1.0
    assert metrics["distinct"] == 8.0  # an untrained policy never repeats seven tokens
    assert 4.0 < metrics["entropy"] <= math.log(110)


# --- configuration and command line ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": 0.0}, r"temperature: expected a finite number > 0, got 0.0"),
        ({"minibatches": 3}, r"minibatches, micro_batches: expected a product that divides .* = 16, got '3 \* 1 = 3'"),
        ({"cov_low": 5.0}, r"cov_low: expected less than cov_high = 5.0, got 5.0"),
        ({"cov_band": "quantile"}, r"cov_low, cov_high: expected quantiles in \[0, 1\]"),
        ({"cov_ratio": 2.0}, r"cov_ratio: expected a fraction in \(0, 1\], got 2.0"),
        ({"samples_per_prompt": 1}, r"samples_per_prompt: expected at least 2"),
        ({"method": "clipcov"}, r"method: expected one of grpo, clip_cov.*got 'clipcov'"),
        ({"num_heads": 3}, r"hidden_size: expected a multiple of num_heads = 3, got 16"),
        ({"steps": -1}, r"steps: expected an integer >= 0, got -1"),
        ({"resume": True, "overwrite": True}, r"resume, overwrite: expected at most one"),
    ],
)
def test_config_errors(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **changes).validate()  # type: ignore[arg-type]


def test_config_round_trip() -> None:
    assert TrainerConfig.from_dict(json.loads(json.dumps(TINY.to_dict()))) == TINY
    with pytest.raises(ValueError, match=r"config: expected fields of TrainerConfig, got unknown lrr"):
        TrainerConfig.from_dict({"lrr": 1})


def test_help_explains_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    text = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    assert "quickstart" in text
    source = (Path(ppo.__file__).parent / "config.py").read_text()
    for field in dataclasses.fields(TrainerConfig):
        assert f"--{field.name.replace('_', '-')}" in text or f"--no-{field.name.replace('_', '-')}" in text, field.name
        assert re.search(rf'^    {field.name}: [^=]*(\n[^=]*)*?= .*\n    """\w', source, re.M), f"{field.name}: no help"


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint.write_json(tmp_path / "request.json", config(tmp_path / "run", steps=1).to_dict())
    assert main(["from-config", str(tmp_path / "request.json")]) == 0
    assert (tmp_path / "run" / "metrics.jsonl").exists()
    assert main(["from-config", str(tmp_path / "request.json")]) == 2
    assert "expected a directory without a run" in capsys.readouterr().err
    assert main(["from-config", str(tmp_path / "missing.json")]) == 2
    assert main(["nonsense"]) == 2
    assert main(["--out", str(tmp_path / "x"), "--temperature", "-1"]) == 2
    assert "temperature: expected a finite number > 0, got -1.0" in capsys.readouterr().err


# --- drivers and report ----------------------------------------------------------------------------------------------


def test_report_is_whole_and_self_contained(tmp_path: Path) -> None:
    methods = ("grpo", "clip_cov", "random_dropped")
    board = ProgressBoard(enabled=False)
    start = drivers.shared_warm_start(dataclasses.replace(TINY, warm_steps=2, warm_batch=8), tmp_path / "start", board)
    stamp = os.stat(start / "model.safetensors").st_mtime_ns
    again = drivers.shared_warm_start(dataclasses.replace(TINY, warm_steps=2, warm_batch=8), tmp_path / "start", board)
    assert os.stat(again / "model.safetensors").st_mtime_ns == stamp, "an equal warm start was made anew"
    for method in methods:
        ppo.train(
            config(tmp_path / method, method=method, steps=6, eval_every=1, first_order_every=1, eval_samples=8,
                   final_eval_samples=8, warm_start_from=start)
        )  # fmt: skip
    logs = drivers.load_runs({method: tmp_path / method for method in methods})
    page = write_report(
        tmp_path / "report",
        {method: [log] for method, log in logs.items()},
        experiment=drivers.start_experiment(TINY, start),
        command="python -m entropy_kernels.trainer quickstart --seed 0",
        seeds=[0],
        seconds=61.0,
        title="A <report>",
    ).read_text()
    assert "A &lt;report&gt;" in page
    assert "python -m entropy_kernels.trainer quickstart --seed 0" in page
    assert not re.search(r'(src|href)\s*=\s*"(?!data:)', page), "the page refers to something outside itself"
    assert len(re.findall(r'src="data:image/png;base64,iVBOR', page)) == 5
    for name in ("entropy", "performance", "law", "entropy_change", "covariance"):
        assert (tmp_path / "report" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    record = json.loads((tmp_path / "report" / "summary.json").read_text())
    assert record["logits_as_parameters"]["correlation"] > 0.999
    assert set(record["methods"]) == set(methods)
    for text in ("What does not show at this scale", "torch", "pass@8", "straight line", "Clip-Cov"):
        assert text in page


def test_report_needs_the_baseline(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"runs: expected the baseline 'grpo' among them, got kl_cov"):
        write_report(tmp_path, {"kl_cov": []}, experiment={}, command="", seeds=[0], seconds=0.0, title="")


def test_runs_side_by_side_reports_a_failure(tmp_path: Path) -> None:
    broken = config(tmp_path / "broken", warm_start_from=tmp_path / "nowhere")
    with pytest.raises(
        RuntimeError, match=r"run broken: expected exit code 0, got 2; [\s\S]*warm_start_from: expected"
    ):
        drivers.run_side_by_side({"broken": broken}, workers=1, board=ProgressBoard(enabled=False))


def test_report_of_a_policy_that_is_never_right(tmp_path: Path) -> None:
    log = pd.DataFrame(
        {
            "step": range(8),
            "entropy": [4.0 - 0.1 * i for i in range(8)],
            "tokens": 28,
            "reward": 0.0,
            "val_pass1": 0.0,
            "val_pass8": 0.0,
            "final_pass8": 0.0,
            "predicted_dh": 0.0,
            "measured_dh": 0.0,
            **dict.fromkeys(COVARIANCE_COLUMNS.values(), 0.0),
        }
    )
    page = write_report(
        tmp_path, {"grpo": [log]}, experiment={"predicted": [], "measured": []}, command="c", seeds=[0], seconds=1.0,
        title="t",
    )  # fmt: skip
    assert "no token had an advantage" in page.read_text()
    json.loads((tmp_path / "summary.json").read_text(), parse_constant=lambda text: pytest.fail(f"{text} is no JSON"))


def test_reproduction_keeps_complete_runs_and_continues_others(tmp_path: Path) -> None:
    settings = config(tmp_path / "run", steps=2)
    assert not reproduce.complete(settings) and not reproduce.continuable(settings)
    ppo.train(settings)
    longer = dataclasses.replace(settings, steps=3)
    assert reproduce.complete(settings)
    assert reproduce.continuable(settings)
    assert not reproduce.complete(longer) and not reproduce.continuable(longer)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    (tmp_path / "run" / "metrics.jsonl").write_text("\n".join(lines[:-1]) + "\n")
    assert not reproduce.complete(settings)
    assert reproduce.continuable(settings)

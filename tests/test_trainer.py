"""The reference trainer on tiny settings: policy, advantages, selection, loop, reproducibility, resume."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")


from entropy_kernels.trainer import ppo
from entropy_kernels.trainer.advantages import advantages_of, pass_at_k, rewards_of_tokens
from entropy_kernels.trainer.causal_lm import enable_checkpointing
from entropy_kernels.trainer.config import RESUMABLE_FIELDS, TrainerConfig
from entropy_kernels.trainer.log import COVARIANCE_COLUMNS, MetricsLog, defined, read_rows
from entropy_kernels.trainer.methods import controller_of
from entropy_kernels.trainer.model import Encoded, Policy
from entropy_kernels.trainer.ppo import collect
from entropy_kernels.trainer.probes import FirstOrder, logits_as_parameters
from entropy_kernels.trainer.report_numbers import agreement
from entropy_kernels.trainer.rollout import evaluate, score
from entropy_kernels.trainer.start import _finish, build_policy, load_policy, word_tokenizer
from entropy_kernels.trainer.tasks import Prompt, WalkTask
from trainer_setup import SHORT, TINY, EasyTask, assert_near, assert_same_run, config, easy, rows_without_times  # noqa: F401

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


def test_padding_and_early_ends_do_not_change_the_scores() -> None:
    policy = policy_of()
    end = policy.tokenizer.convert_tokens_to_ids("+1")
    policy = Policy(policy.model, policy.tokenizer, end_ids=[end])
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
    logprob = score(policy, TINY, repeated, drawn.ids, drawn.mask).logprob
    torch.testing.assert_close(logprob, drawn.logprob, rtol=0, atol=1e-5)
    for i in (0, 1, 2):
        alone = policy.encode([policy.tokenizer.decode(encoded.ids[i][encoded.mask[i].bool()][1:])])
        single = score(policy, TINY, alone, drawn.ids[i : i + 1], drawn.mask[i : i + 1]).logprob
        torch.testing.assert_close(single[0], logprob[i], rtol=0, atol=1e-5)
    assert torch.equal(logprob == 0, ~drawn.mask)


# --- advantages and pass@k -------------------------------------------------------------------------------------------


def test_advantages_by_hand() -> None:
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0]])
    sd = math.sqrt(1 / 3)
    mask = torch.tensor([[True, True, False], [True] * 3, [True, False, False], [True] * 3]).repeat(2, 1)
    token_rewards = rewards_of_tokens(rewards.view(-1), mask)
    assert torch.equal(token_rewards[:3], torch.tensor([[0.0, 1.0, 0.0], [0.0] * 3, [0.0] * 3]))

    def group_advantages(estimator: str, **options: bool) -> torch.Tensor:
        found = advantages_of(estimator, token_rewards, mask, samples=4, **options).advantages  # type: ignore[arg-type]
        assert torch.equal(found, found[:, :1] * mask)  # one number for a completion's tokens, 0 where masked
        return found[:, 0].view(2, 4)

    grpo = group_advantages("grpo")
    torch.testing.assert_close(grpo, torch.tensor([[0.5, -0.5, -0.5, 0.5], [0.0] * 4]) / sd, rtol=1e-5, atol=1e-6)
    plain = group_advantages("grpo", normalize_std=False)
    torch.testing.assert_close(plain, torch.tensor([[0.5, -0.5, -0.5, 0.5], [0.0] * 4]))
    rloo = group_advantages("rloo")
    # 1 - mean(0, 0, 1) and 0 - mean(1, 0, 1)
    torch.testing.assert_close(rloo, torch.tensor([[2 / 3, -2 / 3, -2 / 3, 2 / 3], [0.0] * 4]))
    with pytest.raises(ValueError, match=r"estimator: expected one of grpo, rloo, .*got 'remax'"):
        group_advantages("remax")
    with pytest.raises(ValueError, match=r"samples: expected at least 2 for grpo"):
        advantages_of("grpo", token_rewards, mask, samples=1)
    with pytest.raises(ValueError, match=r"values: expected the critic's for gae, got None"):
        advantages_of("gae", token_rewards, mask, samples=1)


def test_pass_at_k() -> None:
    def brute(correct: int, samples: int, k: int) -> float:
        return 1 - math.comb(samples - correct, k) / math.comb(samples, k)

    counts = [0, 1, 3, 7, 8]
    for k in (1, 2, 5, 8):
        expected = sum(brute(c, 8, k) for c in counts) / len(counts)
        assert pass_at_k(torch.tensor(counts), 8, k) == pytest.approx(expected, abs=1e-12)
    with pytest.raises(ValueError, match=r"k: expected 1 <= k <= samples = 8, got 9"):
        pass_at_k(torch.tensor(counts), 8, 9)


# --- the loop --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["clip_cov", "kl_cov"])
def test_two_runs_of_one_seed_agree_bit_for_bit(tmp_path: Path, method: str) -> None:
    settings = {"steps": 2, "method": method, "cov_low": -9.0, "cov_high": 9.0, "cov_ratio": 0.1}
    for name in ("a", "b"):
        ppo.train(config(tmp_path / name, **settings))
    assert_same_run(tmp_path / "a", tmp_path / "b")
    rows = rows_without_times(tmp_path / "a")
    assert [row["step"] for row in rows] == [0, 1, 2]
    ppo.train(config(tmp_path / "c", **{**settings, "steps": 1}, seed=1))
    assert rows_without_times(tmp_path / "c")[0] != rows[0]


def test_resume_continues_bit_for_bit(tmp_path: Path) -> None:
    settings = {"method": "clip_cov", "cov_low": -9.0, "cov_high": 9.0, "cov_ratio": 0.1}
    ppo.train(config(tmp_path / "whole", steps=3, **settings))
    ppo.train(config(tmp_path / "halves", steps=1, **settings))
    # a crash after the checkpoint leaves rows that the resumed run must write anew, and half a line
    with open(tmp_path / "halves" / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": 2, "entropy": 9.9}) + '\n{"step": 3, "ent')
    ppo.train(config(tmp_path / "halves", steps=3, resume=True, **settings))
    assert_same_run(tmp_path / "halves", tmp_path / "whole")


def test_resume_errors(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"resume: expected a checkpoint at"):
        ppo.train(config(tmp_path / "none", resume=True))
    ppo.train(config(tmp_path / "run", **{**SHORT, "steps": 1}))
    with pytest.raises(
        ValueError, match=r"another configuration; lr: expected 0.003 \(as saved\), got 0.1\. from-config"
    ):
        ppo.train(config(tmp_path / "run", **{**SHORT, "steps": 2}, resume=True, lr=0.1))
    with pytest.raises(FileExistsError, match=r"out: expected a directory without a run.*--resume to continue"):
        ppo.train(config(tmp_path / "run", **{**SHORT, "steps": 1}))
    ppo.train(config(tmp_path / "run", **{**SHORT, "steps": 2}, resume=True))
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir() if path.is_file()}
    with pytest.raises(ValueError, match=r"steps: expected at least the 2 that the checkpoint has finished, got 1"):
        ppo.train(config(tmp_path / "run", **{**SHORT, "steps": 1}, resume=True))
    assert all((tmp_path / "run" / name).read_bytes() == content for name, content in before.items())
    (tmp_path / "run" / "checkpoint.safetensors").unlink()  # stopped before the first one
    with pytest.raises(FileNotFoundError, match=r"resume: expected a checkpoint.*--overwrite"):
        ppo.train(config(tmp_path / "run", **{**SHORT, "steps": 1}, resume=True))
    with pytest.raises(FileExistsError, match=r"which holds one; pass --overwrite to replace it, or another --out"):
        ppo.train(config(tmp_path / "run", **{**SHORT, "steps": 1}))
    ppo.train(config(tmp_path / "run", **{**SHORT, "steps": 1}, overwrite=True))
    assert {f.name for f in dataclasses.fields(TrainerConfig)} > RESUMABLE_FIELDS


@pytest.mark.parametrize(
    ("method", "mode"),
    [
        ("grpo", "token-mean"),
        ("grpo", "seq-mean-token-mean"),
        ("clip_cov", "seq-mean-token-mean"),
        ("kl_cov", "token-mean"),
        ("random_dropped", "seq-mean-token-mean"),
    ],
)
def test_micro_batches_share_a_trajectory(tmp_path: Path, method: str, mode: str) -> None:
    for n in (1, 4):
        ppo.train(
            config(tmp_path / str(n), steps=1, method=method, micro_batches=n, loss_agg_mode=mode, cov_low=-9.0,
                   cov_high=9.0, cov_ratio=0.1, entropy_coef=0.01)
        )  # fmt: skip
    assert_near(tmp_path / "1", tmp_path / "4")
    for row in rows_without_times(tmp_path / "4")[:-1]:
        selected = row["tokens_dropped"] + row["tokens_penalized"]  # type: ignore[operator]
        assert (selected > 0) == (method != "grpo")


def test_selection_with_old_logprobs_needs_no_extra_forward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = {"n": 0}
    original = ppo.fresh_stats

    def counted(*args: object) -> object:
        calls["n"] += 1
        return original(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(ppo, "fresh_stats", counted)
    options = {"steps": 1, "method": "kl_cov", "micro_batches": 2}
    ppo.train(config(tmp_path / "new", **options))
    assert calls["n"] == 4
    ppo.train(config(tmp_path / "old", selection_logprob="old", **options))
    assert calls["n"] == 4


def test_rows_have_every_promised_number(tmp_path: Path) -> None:
    settings = {"method": "clip_cov", "cov_low": -9.0, "cov_high": 9.0, "measure_memory": True, "save_every": 1}
    ppo.train(config(tmp_path / "run", **settings, tensorboard=True))
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    promised = {
        *COVARIANCE_COLUMNS.values(),
        *("entropy", "reward", "val_pass1", "val_pass2", "val_distinct", "cov_mean", "tokens_in_band"),
        *("tokens_dropped", "tokens_penalized", "tokens_touched", "decrease_share", "control_dh", "free_dh"),
        *("clipfrac", "ppo_kl", "ppo_kl_abs", "measured_dh", "predicted_dh", "first_order_dh"),
        *("first_update_dh", "own_update_dh", "small_update_dh", "first_order_step_dh", "grad_norm"),
        *("memory/linear", "memory/logits", "memory/torch", "head_gap", "time/tokens_per_s"),
        *("time/ops_share", "time/step", "time/sample", "time/verify", "time/score"),
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
    log = MetricsLog(tmp_path)
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
    outputs = policy.outputs(rollout.prompts, rollout.ids, rollout.mask)
    policy.logprob_entropy(outputs, rollout.ids, rollout.mask, temperature=1.0).logprob.mean().backward()
    with torch.no_grad():
        for parameter in policy.model.parameters():
            if parameter.grad is not None:
                parameter += 1e-6 * parameter.grad
    entropy = score(policy, TINY, rollout.prompts, rollout.ids, rollout.mask).entropy
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


# --- precision and memory of the model -------------------------------------------------------------------------------


def test_weights_and_updates_are_float32_whatever_was_saved(tmp_path: Path) -> None:
    policy = policy_of()
    policy.model.bfloat16()
    policy.save(tmp_path / "model")
    for settings in (
        dataclasses.replace(TINY, dtype="mixed"),
        dataclasses.replace(TINY, dtype="mixed", model=str(tmp_path / "model")),
    ):
        for loaded in (load_policy(tmp_path / "model", settings, EasyTask()), build_policy(settings, EasyTask())):
            assert {p.dtype for p in loaded.model.parameters()} == {torch.float32}
    before = {name: value.clone() for name, value in loaded.model.named_parameters()}
    optimizer = torch.optim.AdamW(loaded.model.parameters(), lr=5e-6, weight_decay=0.0)
    rollout = collect(loaded, EasyTask(), settings, step=0, generator=torch.Generator().manual_seed(0))
    rows = torch.arange(len(rollout.ids))
    ppo.update(loaded, optimizer, rollout, rows, settings, controller_of(settings), seed=0)
    moved = [(value != before[name])[value.grad != 0] for name, value in loaded.model.named_parameters()]
    assert torch.cat(moved).float().mean() > 0.95


@pytest.mark.parametrize("head", ["linear", "logits"])
@pytest.mark.parametrize("asked", ["configuration", "model"])
def test_gradient_checkpointing_recomputes_and_changes_nothing(head: str, asked: str) -> None:
    settings = dataclasses.replace(TINY, head=head, num_layers=2)  # type: ignore[arg-type]
    plain = policy_of(settings)
    if asked == "configuration":
        checkpointed = policy_of(dataclasses.replace(settings, gradient_checkpointing=True))
    else:
        checkpointed = policy_of(settings)
        enable_checkpointing(checkpointed.model)
    rollouts = [
        collect(policy, EasyTask(), settings, step=0, generator=torch.Generator().manual_seed(0))
        for policy in (plain, checkpointed)
    ]
    assert torch.equal(rollouts[0].ids, rollouts[1].ids) and torch.equal(rollouts[0].entropy, rollouts[1].entropy)
    calls = {"n": 0}
    for layer in checkpointed.model.model.layers:
        # a recomputation stops at the last tensor that is needed: its beginning is counted
        layer.input_layernorm.register_forward_pre_hook(lambda *_: calls.update(n=calls["n"] + 1))
    grads = []
    for policy in (plain, checkpointed):
        outputs = policy.outputs(rollouts[0].prompts, rollouts[0].ids, rollouts[0].mask)
        policy.logprob_entropy(outputs, rollouts[0].ids, rollouts[0].mask, temperature=1.0).logprob.sum().backward()
        grads.append([parameter.grad for parameter in policy.model.parameters()])
    assert calls["n"] == 2 * 2, "the layers' activations were kept, not computed once more"
    assert all(torch.equal(one, other) for one, other in zip(*grads, strict=True))
    assert not any(module.training for module in checkpointed.model.modules())


def test_dropout_is_off_under_gradient_checkpointing() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    tokenizer = word_tokenizer(EasyTask().words())
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, n_positions=32, resid_pdrop=0.9,
                   attn_pdrop=0.9, embd_pdrop=0.9)
    )  # fmt: skip
    policy = _finish(model, tokenizer, dataclasses.replace(TINY, gradient_checkpointing=True), EasyTask())
    prompts = policy.encode(["12 57"])
    ids, mask = policy.encode_completions(["x3 36 +8 44 -2 42 +15"])
    with torch.no_grad():
        expected = policy.outputs(prompts, ids, mask)
    assert torch.equal(policy.outputs(prompts, ids, mask), expected)

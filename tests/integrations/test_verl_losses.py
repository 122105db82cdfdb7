"""Every loss_mode ek_* through verl's own ``ppo_loss``, beside verl's function of the same loss.

``test_peers_verl.py`` holds the losses against verl's over many batches; here it is what lies between verl's config and
them: which number goes where.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import verl_batches
from omegaconf import OmegaConf
from torch import Tensor
from verl.trainer.ppo.core_algos import get_policy_loss_fn
from verl.utils import tensordict_utils as tu
from verl.workers.config import ActorConfig, PolicyLossConfig
from verl.workers.utils import losses as verl_losses

import entropy_kernels as ek
from entropy_kernels.integrations.verl import losses, plan, statistics, worker
from entropy_kernels.integrations.verl.config import MODES
from entropy_kernels.integrations.verl.losses import controller_of

CLIPS = {"clip_ratio_low": 0.1, "clip_ratio_high": 0.15, "clip_ratio_c": 1.3}
# ours -> verl's; where verl's knows one aggregation only, its name; its policy_loss
PAIRS: dict[str, tuple[str, str | None, dict[str, Any]]] = {
    "ek_ppo": ("vanilla", None, {}),
    "ek_gspo_token": ("gspo", None, {}),
    "ek_sapo": ("sapo", "seq-mean-token-mean", {}),
    "ek_cispo": ("cispo", None, {}),
    "ek_gpg": ("gpg", None, {}),
    "ek_dppo_tv": ("dppo_tv", None, {}),
    "ek_dppo_kl": ("dppo_kl", None, {}),
    "ek_gmpo": ("geo_mean", "seq-mean-token-mean", {}),
    "ek_dro": ("dro", None, {"dro_beta": 0.3}),
    "ek_kl_cov": ("kl_cov", None, {"kl_cov_ratio": 0.1, "ppo_kl_coef": 0.3}),
    # of ratio 1 verl's draw is all of the range
    "ek_clip_cov": ("clip_cov", None, {"clip_cov_ratio": 1.0, "clip_cov_lb": -0.1, "clip_cov_ub": 0.5}),
}
VERLS = {"actor/pg_clipfrac", "actor/ppo_kl", "actor/pg_clipfrac_lower"}
OWN: dict[str, dict[str, Any]] = {"ek_cispo_trl": {"clip_high": 5.0}}
OF_CURRENT_ENTROPY = ("ek_erc", "ek_adaptive_entropy")  # have a test of their own
LAYOUTS = pytest.mark.parametrize("layout", ["nested", "padded"])


def actor(mode: str, own: dict[str, Any] | None = None, agg: str = "token-mean", **given: Any) -> ActorConfig:
    of_policy = {key: given.pop(key) for key in list(given) if key in PolicyLossConfig.__dataclass_fields__}
    keys = {} if own is None else {"ek": own}
    return ActorConfig(
        strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, loss_agg_mode=agg,
        policy_loss=PolicyLossConfig(loss_mode=mode, **of_policy, **keys), **{**CLIPS, **given},
    )  # fmt: skip


class Case:
    """Rows with log-probs near the old ones, weights of a rollout correction, counts of a larger batch."""

    def __init__(self, layout: str, seed: int = 3, number: int = 6, temperature: Any = 1.0, **counts: Any) -> None:
        self.layout, self.temperature = layout, temperature
        self.rows = verl_batches.rows(number, seed)
        generator = torch.Generator().manual_seed(seed)
        for row in self.rows:
            noise = torch.randn(len(row["responses"]), generator=generator)
            row["rollout_is_weights"] = 0.5 + torch.rand(len(noise), generator=generator)
            row["log_probs"] = (row["old_log_probs"] + 0.3 * noise).clamp(max=-1e-3)
        self.counts = {"dp_size": 1, "batch_num_tokens": None, "global_batch_size": None, **counts}

    @property
    def data(self) -> Any:
        fields = [{name: x for name, x in row.items() if name != "log_probs"} for row in self.rows]
        data = getattr(verl_batches, self.layout)(fields, **self.counts)
        if isinstance(self.temperature, Tensor):  # one for each sample, as verl lets a rollout have them
            data["temperature"] = self.temperature
            return data
        return tu.assign_non_tensor(data, temperature=self.temperature)

    def of(self, config: ActorConfig, made: plan.Plan | None = None, data: Any = None) -> tuple[Tensor, Tensor, Any]:
        """verl's ``ppo_loss``: loss, gradient at the responses' tokens, metrics."""
        leaves = [row["log_probs"].clone().requires_grad_() for row in self.rows]
        output = {"log_probs": verl_batches.output(self.rows, leaves)}
        function = verl_losses.ppo_loss

        def loss(model_output: Any, data: Any, dp_group: Any = None) -> Any:
            return function(config, model_output, data, dp_group)

        called = loss if made is None else made.around(loss)
        value, metrics = called(model_output=output, data=self.data if data is None else data, dp_group=None)
        value.backward()
        return value.detach(), torch.cat([leaf.grad for leaf in leaves]), metrics


@LAYOUTS
@pytest.mark.parametrize("ours", PAIRS)
def test_as_verls(ours: str, layout: str) -> None:
    theirs, agg, policy = PAIRS[ours]
    for counts in ({}, {"dp_size": 2, "batch_num_tokens": 200, "global_batch_size": 12}):
        case = Case(layout, **counts)
        if ours == "ek_gmpo":  # where weights are another thing (test_peers_verl.py)
            for row in case.rows:
                row["rollout_is_weights"] = torch.ones_like(row["rollout_is_weights"])
        # verl's geo_mean does not read the counts
        mean = counts and ours == "ek_gmpo"
        for mode in [agg] if agg else ["token-mean", "seq-mean-token-sum", "seq-mean-token-mean"]:
            mine = case.of(actor(ours, agg=mode, **policy))
            peer = case.of(actor(theirs, agg=mode, **policy))
            scale = 6 * 2 / 12 if mean else 1.0
            torch.testing.assert_close(mine[0], peer[0] * scale, rtol=2e-5, atol=1e-6)
            torch.testing.assert_close(mine[1], peer[1] * scale, rtol=2e-5, atol=1e-7)
            assert peer[2].keys() <= mine[2].keys() and mine[2].keys() >= VERLS
            for name in peer[2].keys() - {"actor/pg_loss"}:
                assert mine[2][name].aggregate() == pytest.approx(peer[2][name].aggregate(), rel=1e-5, abs=1e-7), name
                assert mine[2][name].aggregation == peer[2][name].aggregation
            assert mine[2]["actor/pg_loss"].aggregation == peer[2]["actor/pg_loss"].aggregation


class Engine:
    """What a plan asks of verl's engine: one rank."""

    engine_config = None

    def get_data_parallel_group(self) -> None:
        return None

    def get_data_parallel_rank(self) -> int:
        return 0

    def get_data_parallel_size(self) -> int:
        return 1


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(plan, "collective_device", lambda: torch.device("cpu"))
    yield
    statistics.enable(False)  # of this process, where other tests compare with verl's


@LAYOUTS
@pytest.mark.parametrize("mode", [mode for mode in MODES if mode not in OF_CURRENT_ENTROPY])
def test_every_mode_with_its_plan(mode: str, layout: str) -> None:
    """Ours is what ran: the value is that of policy_loss with the control that the public function decides."""
    row = MODES[mode][1]
    options: dict[str, float] = {"mu": 0.5} if row in ("clip_b", "clip_v") else {}
    options |= {"ratio": 0.2} if row in ("clip_cov", "kl_cov", "exact_cov", "random", "clip_v") else {}
    config = actor(mode, {**OWN.get(mode, {}), **options}, dro_beta=0.3)
    settings, case = config.ek_settings, Case(layout)
    data = case.data
    made = plan.plan_minibatch(settings, config, Engine(), data)
    loss, gradient, metrics = case.of(config, made, data)

    def flat(name: str) -> Tensor:
        return torch.cat([row[name] for row in case.rows])

    offsets = torch.tensor([0, *(len(row["responses"]) for row in case.rows)]).cumsum(0)
    control = None
    if settings.decides:
        # the same index in every layout: row, then position
        index = torch.cat([i * 2**32 + torch.arange(len(row["responses"])) for i, row in enumerate(case.rows)])
        known = {name: flat(f"ek_{name}") for name in settings.needs}
        batch = ek.TokenBatch(
            flat("old_log_probs"), None, flat("advantages"), flat("response_mask"), token_index=index, **known
        )
        seed = settings.seed if ek.methods()[settings.method].draws else None
        control = ek.control(settings.method, batch, seed=seed, **settings.options)
    lp = flat("log_probs").requires_grad_()
    expected = ek.policy_loss(
        lp, flat("old_log_probs"), flat("advantages"), flat("response_mask"), surrogate=settings.surrogate,
        control=control, token_weight=flat("rollout_is_weights"), cu_seqlens=offsets, **settings.loss,
    )  # fmt: skip
    expected.loss.backward()
    torch.testing.assert_close(loss, expected.loss.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, lp.grad, rtol=1e-5, atol=1e-7)
    if control is not None:
        told = metrics["actor/ek_touched_frac"].aggregate()
        assert told > 0 and told == pytest.approx(float(control.metrics["touched_frac"]))


@LAYOUTS
def test_temperatures_are_those_of_the_batch(layout: str) -> None:
    """They weigh a token's covariance: other tokens than with one temperature for all."""
    chosen = []
    for temperature in (1.0, torch.tensor([0.2, 1.0, 3.0, 0.5, 2.0, 0.8])):
        case, config = Case(layout, temperature=temperature), actor("ek_exact_cov", {"ratio": 0.2})
        data = case.data
        plan.plan_minibatch(config.ek_settings, config, Engine(), data)
        whole = ek.SelectionBatch()
        for i, row in enumerate(case.rows):
            whole.add(
                row["old_log_probs"], row["advantages"], row["response_mask"],
                i * 2**32 + torch.arange(len(row["responses"])), vocab_covariance=row["ek_vocab_covariance"],
                temperature=float(temperature[i]) if isinstance(temperature, Tensor) else temperature,
            )  # fmt: skip
        controls = ek.Controller("exact_cov", **config.ek_settings.options).step(whole)
        for mine, control in zip(plan._padded(data["ek_dropped"]), controls, strict=True):
            assert mine[: len(control.dropped)].equal(control.dropped)
        chosen.append(torch.cat([control.dropped for control in controls]))
    assert chosen[0].sum() == chosen[1].sum() > 5 and not chosen[0].equal(chosen[1])


@LAYOUTS
@pytest.mark.parametrize("size", [6, 3, 2, 1])
def test_the_same_tokens_in_every_split(size: int, layout: str) -> None:
    """verl's own splitting carries the plan; gradients add up."""
    case = Case(layout, batch_num_tokens=100)
    config = actor("ek_clip_cov", {"ratio": 0.2, "low": -9.0, "high": 9.0})
    data = case.data
    made = plan.plan_minibatch(config.ek_settings, config, Engine(), data)
    whole = case.of(config, made, data)
    parts = tu.chunk_tensordict(data, 6 // size)
    gradients, rows = [], case.rows
    for i, part in enumerate(parts):
        case.rows = rows[i * size : (i + 1) * size]
        gradients.append(case.of(config, made, part)[1])
    torch.testing.assert_close(torch.cat(gradients), whole[1], rtol=1e-5, atol=1e-8)
    dropped = torch.cat([plan._padded(part["ek_dropped"]).sum(-1) for part in parts])
    assert dropped.equal(plan._padded(data["ek_dropped"]).sum(-1)) and dropped.sum() == int(0.2 * _valid(rows))


def _valid(rows: list[dict[str, Tensor]]) -> int:
    return sum(int(row["response_mask"].sum()) for row in rows)


def test_layouts_and_padding_do_not_count() -> None:
    """The same tokens where prompts and responses are padded, and where a longer row without a token follows."""
    chosen = []
    for layout, longer in (("nested", False), ("padded", False), ("nested", True), ("padded", True)):
        config, case = actor("ek_clip_cov", {"ratio": 0.2, "low": -9.0, "high": 9.0}), Case(layout)
        if longer:
            (more,) = verl_batches.rows(1, seed=9, response=31)
            more["response_mask"].zero_()
            case.rows.append({name: more.get(name, more["old_log_probs"]) for name in case.rows[0]})
        data = case.data
        plan.plan_minibatch(config.ek_settings, config, Engine(), data)
        dropped, advantages = plan._padded(data["ek_dropped"]), plan._padded(data["advantages"])
        assert dropped.shape[1] == (31 if longer else 12)
        chosen.append(sorted(advantages[dropped].tolist()))
    assert len(chosen[0]) > 5 and all(other == chosen[0] for other in chosen)


@LAYOUTS
@pytest.mark.parametrize("mode", OF_CURRENT_ENTROPY)
def test_the_entropy_of_the_policy_that_is_trained(mode: str, layout: str) -> None:
    """erc compares it with the old one, token by token; adaptive_entropy's coefficient multiplies its mean."""
    case = Case(layout)
    config = actor(mode, {"coef": 0.1, "target": 5.0} if mode == "ek_adaptive_entropy" else {})
    data = case.data
    made = plan.plan_minibatch(config.ek_settings, config, Engine(), data)
    assert tu.get(data, "calculate_entropy") is True  # asked of verl's forward
    now = [row["ek_entropy"] * torch.linspace(0.9, 1.1, len(row["ek_entropy"])) for row in case.rows]
    leaves = [x.clone().requires_grad_() for x in now]
    output = {
        "log_probs": verl_batches.output(case.rows, [row["log_probs"] for row in case.rows]),
        "entropy": verl_batches.output(case.rows, leaves),
    }

    def loss(model_output: Any, data: Any, dp_group: Any = None) -> Any:
        return verl_losses.ppo_loss(config, model_output, data, dp_group)

    with pytest.raises(RuntimeError, match=r"set actor_rollout_ref.actor.calculate_entropy=true"):
        made.around(loss)(model_output={"log_probs": output["log_probs"]}, data=data, dp_group=None)
    value, metrics = made.around(loss)(model_output=output, data=data, dp_group=None)
    mask = torch.cat([row["response_mask"] for row in case.rows]).bool()
    if mode == "ek_erc":
        ratio = torch.cat(now) / torch.cat([row["ek_entropy"] for row in case.rows])
        outside = mask & ~((ratio > 0.95) & (ratio < 1.05))
        assert metrics["actor/ek_touched"].aggregate() == outside.sum() > 5
    else:
        value.backward()
        gradient = torch.cat([leaf.grad for leaf in leaves])
        torch.testing.assert_close(gradient, torch.where(mask, -0.1 / mask.sum(), 0.0))
        assert controller_of(config.ek_settings, config).memory["coef"] == pytest.approx(0.105)


@pytest.mark.parametrize("mode", ["ek_ppo", "ek_kl_cov", "ek_adaptive_entropy"])
def test_a_config_of_omegaconf(mode: str) -> None:
    """As who calls a registered loss himself has it: it holds no objects, and yet a method's memory lives with it."""
    row = verl_batches.rows(1, 3)[0]
    given = {"old_log_prob": row["old_log_probs"], "response_mask": row["response_mask"].bool()}
    given |= {"log_prob": given["old_log_prob"] - 0.1, "advantages": row["advantages"]}
    function = get_policy_loss_fn(mode)
    found = {}
    policy = {"loss_mode": mode, "kl_cov_ratio": 0.1, "ppo_kl_coef": 0.3}
    plain = OmegaConf.create({**CLIPS, "policy_loss": policy, "global_batch_info": {}, "entropy_coeff": 0.0})
    for config in (actor(**{"mode" if key == "loss_mode" else key: x for key, x in policy.items()}), plain):
        with losses.given(losses.Given(entropy=torch.full((1, len(row["responses"])), 0.1))):
            for _ in range(2):
                found[type(config)], metrics = function(**{k: x[None] for k, x in given.items()}, config=config)
        assert mode != "ek_adaptive_entropy" or metrics["actor/ek_entropy_coef"] == pytest.approx(0.005)
    one, two = found.values()
    assert torch.equal(one, two)


@pytest.mark.parametrize("name", ["ek_entropy", "ek_vocab_covariance"])
def test_statistics_of_whole_sequences_are_those_of_the_responses(name: str) -> None:
    """As trainer v1 stores what workers give out: in whole sequences, a token to the left."""
    case = Case("nested")
    data, config = case.data, actor("ek_exact_cov", {"ratio": 0.2})
    short = plan.statistic(data, name.removeprefix("ek_"), config.ek_settings)
    data[name] = verl_batches.output(case.rows, [row[name] for row in case.rows])
    assert plan.statistic(data, name.removeprefix("ek_"), config.ek_settings).equal(short)


def test_a_statistic_that_did_not_arrive_is_told() -> None:
    case, config = Case("padded"), actor("ek_exact_cov", {})
    data = case.data
    del data["ek_vocab_covariance"]
    with pytest.raises(
        RuntimeError, match=r"exact_cov: expected vocab_covariance of the old policy .*bypass_mode=false"
    ):
        plan.plan_minibatch(config.ek_settings, config, Engine(), data)
    data["entropy"] = data["ek_entropy"]  # verl's own field of this name is no substitute, whose layout is another
    del data["ek_entropy"]
    with pytest.raises(RuntimeError, match=r"expected entropy of the old policy"):
        plan.statistic(data, "entropy", config.ek_settings)


@pytest.mark.parametrize("agg", ["token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"])
def test_coefficients_are_those_of_verls_aggregation(agg: str) -> None:
    """The derivative of verl's agg_loss by each token's term."""
    from verl.trainer.ppo.core_algos import agg_loss

    mask = torch.rand(5, 9, generator=torch.Generator().manual_seed(0)) < 0.6
    config = actor("ek_exact_cov", {}, agg=agg)
    mine = plan.coefficient(config, mask, 5, None)
    term = torch.zeros(5, 9, dtype=torch.float64, requires_grad=True)
    agg_loss(term, mask.double(), agg, global_batch_size=5).backward()
    np.testing.assert_allclose(mine, term.grad, rtol=3e-8)


class Trained(Engine):
    """With an optimizer, as a plan of a rollout asks of it."""

    class engine_config:
        pipeline_model_parallel_size = 1

    class optimizer:
        param_groups = ({"lr": 3e-4},)


@LAYOUTS
@pytest.mark.parametrize("agg", ["token-mean", "seq-mean-token-mean"])
@pytest.mark.parametrize("shuffle", [False, True])
def test_a_target_plans_every_mini_batch_and_epoch(shuffle: bool, agg: str, layout: str) -> None:
    """As TargetEntropy itself over the mini-batches, with the coefficients of their losses."""
    case = Case(layout, number=8)
    config = actor("ek_ppo", {"target_entropy": 4.0}, agg=agg)
    data = tu.assign_non_tensor(
        case.data, mini_batch_size=4, epochs=2, global_batch_size=4, dataloader_kwargs={"shuffle": shuffle}
    )
    made = plan.plan_rollout(config.ek_settings, config, Trained(), data)
    whole, controller = ek.SelectionBatch(), ek.TargetEntropy(4.0, **config.ek_settings.options)
    halves = [case.rows[:4], case.rows[4:]]
    for i, half in enumerate(halves):
        tokens = _valid(case.rows) / 2 if shuffle else _valid(half)
        for j, row in enumerate(half):
            mask, length = row["response_mask"], len(row["responses"])
            share = 1 / tokens if agg == "token-mean" else 1 / (4 * int(mask.sum()))
            whole.add(
                row["old_log_probs"], row["advantages"], mask, (4 * i + j) * 2**32 + torch.arange(length),
                coefficient=torch.full((length,), share, dtype=torch.float64), entropy=row["ek_entropy"],
                vocab_covariance=row["ek_vocab_covariance"],
            )  # fmt: skip
    controls = controller.step(whole, lr=3e-4, updates=2)
    for row, control in zip(plan._padded(data["ek_dropped"]), controls, strict=True):
        assert row[: len(control.dropped)].equal(control.dropped)
    for name, value in controls[0].metrics.items():
        assert made.metrics[name] == pytest.approx(float(value), rel=1e-6, nan_ok=True), name
    assert made.metrics["touched"] > 5
    # per nat of gain, as an observation is held against it: of all epochs at this learning rate
    mine, theirs = (x._awaited.predicted for x in (controller_of(config.ek_settings, config), controller))
    assert mine == pytest.approx(float(theirs), rel=1e-6) and mine != 0


@LAYOUTS
def test_a_target_by_bonus_asks_for_the_entropy(layout: str) -> None:
    config = actor("ek_ppo", {"target_entropy": 4.0, "target_method": "bonus"})
    data = tu.assign_non_tensor(Case(layout).data, mini_batch_size=6, epochs=1, global_batch_size=6)
    made = plan.plan_rollout(config.ek_settings, config, Trained(), data)
    assert tu.get(data, "calculate_entropy") is True and made.fields == () and made.entropy_coef == 0.005


def test_a_target_wants_the_whole_rollout() -> None:
    """Who calls train_batch himself, mini-batch by mini-batch, is told."""
    config = actor("ek_ppo", {"target_entropy": 4.0})
    with pytest.raises(RuntimeError, match=r"target_entropy: expected a plan of the whole rollout, .*train_mini_batch"):
        plan.plan_minibatch(config.ek_settings, config, Engine(), Case("nested").data)


def test_a_target_refuses_pipeline_stages() -> None:
    class Pipelined(Trained):
        class engine_config:
            pipeline_model_parallel_size = 2

    config = actor("ek_ppo", {"target_entropy": 4.0})
    with pytest.raises(RuntimeError, match=r"outputs on every rank, got pipeline_model_parallel_size=2"):
        plan.plan_rollout(config.ek_settings, config, Pipelined(), Case("nested").data)


class Split(Trained):
    """Two ranks share the model: verl gives the outputs to one of them."""

    def get_data_parallel_size(self) -> int:
        return 2


def test_a_target_that_observes_refuses_ranks_without_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """On every rank, before any of them waits for the others."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group=None: 4)

    def planned(**own: Any) -> plan.Plan:
        config = actor("ek_ppo", {"target_entropy": 4.0, **own})
        data = tu.assign_non_tensor(Case("padded").data, mini_batch_size=12, epochs=1, global_batch_size=12)
        return plan.plan_rollout(config.ek_settings, config, Split(), data)

    message = (
        r"policy_loss.ek.observe: expected data-parallel ranks alone.* 4 ranks of which 2 are data-parallel; set "
        r"actor.ulysses_sequence_parallel_size=1 .*ek.observe=false"
    )
    with pytest.raises(RuntimeError, match=message):
        planned()
    assert planned(observe=False).metrics["touched"] > 0
    assert planned(target_method="bonus").entropy_coef == 0.005


class Worker:
    """What verl's TrainingWorker has, of what a rollout's training asks."""

    engine = Trained()

    def __init__(self, config: ActorConfig, entropy: Tensor) -> None:
        self.loss_fn = functools.partial(verl_losses.ppo_loss, config=config)
        self.entropy, self.asked = entropy, []

    def infer_batch(self, data: Any) -> dict[str, Tensor]:
        self.asked.append({name: tu.get(data, name) for name in ("distillation_use_topk", "distillation_only")})
        return {"entropy": self.entropy}


def test_a_target_beside_distillation() -> None:
    """Its forward for the entropy is a plain one; where distillation is all, there is nothing to plan."""
    case, config = Case("nested"), actor("ek_ppo", {"target_entropy": 4.0})
    known = {"mini_batch_size": 6, "epochs": 1, "global_batch_size": 6, "distillation_use_topk": True}
    trained: list[plan.Plan | None] = []

    def original(self: Any, data: Any) -> str:
        trained.append(plan.active())
        return "theirs"

    for only, asked in ((False, 1), (True, 0)):
        ours = Worker(config, verl_batches.output(case.rows, [row["ek_entropy"] for row in case.rows]))
        data = tu.assign_non_tensor(case.data, distillation_only=only, **known)
        assert worker._plans_rollout(original)(ours, data) == "theirs"
        assert ours.asked == [{"distillation_use_topk": False, "distillation_only": False}] * asked
        assert tu.get(data, "distillation_use_topk") is True  # the training's own is as it was
    assert trained[0] is not None and trained[1] is None
    batch = tu.assign_non_tensor(case.data, distillation_only=True)
    called = worker._plans_minibatch(lambda self, data, loss_function: loss_function)(Engine(), batch, ours.loss_fn)
    assert called is ours.loss_fn

"""Decisions about the tokens of a mini-batch, or of a rollout, before verl splits it.

A plan is made from old log-probs and what else is known before the update. It is written beside them, field by field,
so that verl's own splitting carries it into the micro-batches; there :meth:`Plan.around` hands it to the loss.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import entropy_kernels as ek
from entropy_kernels.integrations.verl.config import Settings
from entropy_kernels.integrations.verl.losses import Given, controller_of, given, numbers

__all__ = ["Plan", "active", "plan_minibatch", "plan_rollout"]

#: Beside verl's fields: statistics of the old policy; what was decided.
STATISTIC = "ek_{}"
_TENSORS = ("token_weight", "dropped", "detached", "penalized", "advantages")
_ROW = 2**32  # token indices of a row: no response is longer, so that padding does not count


@dataclass(frozen=True)
class Plan:
    """What holds for all micro-batches: which fields were written, numbers, and figures of the whole batch."""

    settings: Settings
    fields: tuple[str, ...] = ()
    penalty_coef: Any = None
    entropy_coef: Any = None
    metrics: dict[str, float] = field(default_factory=dict)

    def around(self, loss_function: Callable[..., Any]) -> Callable[..., Any]:
        """verl's loss function, which calls ours in the end, with what was decided for its micro-batch."""

        def call(*args: Any, **kwargs: Any) -> Any:
            data, output = kwargs.get("data"), kwargs.get("model_output")
            if data is None or output is None:  # a function of logits, of distillation
                return loss_function(*args, **kwargs)
            with given(self._of(data, output)):
                return loss_function(*args, **kwargs)

        return call

    def _of(self, data: Any, output: Any) -> Given:
        entropy = old_entropy = control = None
        if self.settings.entropy_now:
            from verl.workers.utils.padding import no_padding_2_padding

            if output.get("entropy") is None:
                raise RuntimeError(
                    f"loss_mode={self.settings.mode}: expected the entropy of the policy that is trained from the "
                    "forward, got none; set actor_rollout_ref.actor.calculate_entropy=true"
                )
            entropy = no_padding_2_padding(output["entropy"], data)
        if self.settings.by_token:
            old_entropy = statistic(data, "entropy", self.settings)
        else:
            told: dict[str, Any] = {name: _padded(data[STATISTIC.format(name)]) for name in self.fields}
            control = ek.Control(**told, penalty_coef=self.penalty_coef, entropy_coef=self.entropy_coef)
        return Given(control, entropy, old_entropy, self.metrics)


_ACTIVE: ContextVar[Plan | None] = ContextVar("entropy_kernels_verl_plan", default=None)


def active() -> Plan | None:
    """The plan of the rollout that is being trained on."""
    return _ACTIVE.get()


@contextlib.contextmanager
def within(plan: Plan) -> Iterator[None]:
    """Train on the rollout of this plan inside."""
    token = _ACTIVE.set(plan)
    try:
        yield
    finally:
        _ACTIVE.reset(token)


def plan_minibatch(settings: Settings, config: Any, engine: Any, data: Any) -> Plan:
    """The decision about a mini-batch: all its tokens, on all data-parallel ranks.

    Args:
        settings: what was set.
        config: verl's ActorConfig, with which the method's memory lives.
        engine: verl's engine.
        data: this rank's rows, to which fields are added.
    """
    from verl.utils import tensordict_utils as tu

    _ask_for_entropy(settings, data)
    if settings.target is not None:
        raise RuntimeError(
            "target_entropy: expected a plan of the whole rollout, which TrainingWorker.train_mini_batch makes, got a "
            "call of train_batch without one"
        )
    if not settings.decides or settings.by_token:
        return Plan(settings)
    group = _group(engine)
    whole = ek.SelectionBatch(group)
    mask = _mask(data)
    weight = None
    if "vocab_covariance" in settings.needs:  # Σ c·F, which metrics have beside it, is all that reads the coefficients
        weight = coefficient(config, mask, tu.get(data, "global_batch_size"), group)
    _add(whole, settings, engine, data, mask, weight)
    (control,) = controller_of(settings, config).step(whole)
    return _written(settings, control, data)


def plan_rollout(settings: Settings, config: Any, engine: Any, data: Any) -> Plan:
    """The plan of :class:`entropy_kernels.TargetEntropy` for all mini-batches of a rollout, and all epochs; arguments:
    :func:`plan_minibatch`.
    """
    from verl.utils import tensordict_utils as tu

    _refuse(settings, engine)
    _ask_for_entropy(settings, data)
    group, mask, rows = _group(engine), _mask(data), data.shape[0]
    size, number = tu.get(data, "mini_batch_size"), tu.get(data, "num_mini_batch")
    own = rows // number if size is None else size // engine.get_data_parallel_size()
    shuffled = bool((tu.get(data, "dataloader_kwargs") or {}).get("shuffle"))
    parts = [mask] if shuffled else list(mask.split(own))
    weights = [coefficient(config, part, tu.get(data, "global_batch_size"), group) for part in parts]
    if shuffled:  # which rows are one mini-batch is drawn later, anew in each epoch
        weights = [weights[0] * (rows // own) if config.loss_agg_mode == "token-mean" else weights[0]]
    whole = ek.SelectionBatch(group)
    _add(whole, settings, engine, data, mask, torch.cat(weights))
    controller = controller_of(settings, config)
    assert isinstance(controller, ek.TargetEntropy)
    rate = engine.optimizer.param_groups[0]["lr"]
    (control,) = controller.step(whole, lr=float(rate), updates=tu.get(data, "epochs", 1))
    return _written(settings, control, data)


def _refuse(settings: Settings, engine: Any) -> None:
    """On all ranks alike, where a rank would not see the entropy, and the others would wait for it."""
    pipeline = getattr(engine.engine_config, "pipeline_model_parallel_size", 1)
    if pipeline > 1:
        raise RuntimeError(
            f"target_entropy: expected an engine that has outputs on every rank, got pipeline_model_parallel_size="
            f"{pipeline}, whose first stages never see the entropy"
        )
    ranks = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    if settings.observes and ranks != engine.get_data_parallel_size():
        raise RuntimeError(
            f"policy_loss.ek.observe: expected data-parallel ranks alone, as verl gives outputs to one rank of those "
            f"that share a model, got {ranks} ranks of which {engine.get_data_parallel_size()} are data-parallel; set "
            "actor.ulysses_sequence_parallel_size=1 and no other model parallelism, or policy_loss.ek.observe=false"
        )


def _ask_for_entropy(settings: Settings, data: Any) -> None:
    """Of verl's forward, where the loss needs it."""
    from verl.utils import tensordict_utils as tu

    if settings.entropy_now:
        tu.assign_non_tensor(data, calculate_entropy=True)


def coefficient(config: Any, mask: Tensor, global_batch_size: Any, group: Any) -> Tensor:
    """The loss's weight of each token of a mini-batch: the derivative of verl's aggregation, as ours has it."""
    with torch.enable_grad():
        term = torch.zeros(mask.shape, dtype=torch.float64, device=mask.device, requires_grad=True)
        total = ek.aggregate(
            term, mask, loss_agg_mode=config.loss_agg_mode, global_batch_size=global_batch_size,
            loss_scale_factor=config.loss_scale_factor, batch_group=group,
        )  # fmt: skip
        return torch.autograd.grad(total, term)[0]


def statistic(data: Any, name: str, settings: Settings) -> Tensor:
    """(B, L) of the old policy, from the fields of a batch."""
    found = data.get(STATISTIC.format(name), None)
    if found is None:
        wanted = settings.method or "target_entropy"
        raise RuntimeError(
            f"{wanted}: expected {name} of the old policy with the batch, got none. It is computed with the old "
            "log-probs: set algorithm.rollout_correction.bypass_mode=false, and actor_rollout_ref.actor.policy_loss."
            "ek.statistics=true where it is more than the entropy"
        )
    if found.is_nested and found.values().shape[0] == data["input_ids"].values().shape[0]:
        from verl.workers.utils.padding import no_padding_2_padding

        return no_padding_2_padding(found, data)  # of whole sequences: the response's part
    return _padded(found)


def _add(
    whole: ek.SelectionBatch, settings: Settings, engine: Any, data: Any, mask: Tensor, weight: Tensor | None
) -> None:
    from verl.utils import tensordict_utils as tu

    device = mask.device
    rows, length = mask.shape
    # data-parallel ranks have equal numbers of rows
    row = torch.arange(rows, device=device) + engine.get_data_parallel_rank() * rows
    index = row[:, None] * _ROW + torch.arange(length, device=device)
    temperature = tu.get(data, "temperature", 1.0)
    if isinstance(temperature, Tensor):
        temperature = temperature.to(device).float().view(-1, 1)
    whole.add(
        _on(data["old_log_probs"], device), _on(data["advantages"], device), mask, index, coefficient=weight,
        temperature=temperature, **{name: statistic(data, name, settings).to(device) for name in settings.needs},
    )  # fmt: skip


def _written(settings: Settings, control: ek.Control, data: Any) -> Plan:
    """The control, as fields of ``data`` in the layout of its old log-probs."""
    from verl.workers.utils.padding import response_to_nested

    like = data["old_log_probs"]
    fields = tuple(name for name in _TENSORS if getattr(control, name) is not None)
    for name in fields:
        value = getattr(control, name).to(like.device)
        data[STATISTIC.format(name)] = response_to_nested(value, data["response_mask"]) if like.is_nested else value
    return Plan(settings, fields, control.penalty_coef, control.entropy_coef, numbers(control.metrics))


def _group(engine: Any) -> Any:
    group = engine.get_data_parallel_group()
    return None if group is None or group.size() == 1 else group


def _mask(data: Any) -> Tensor:
    return _on(data["response_mask"], collective_device()).bool()


def collective_device() -> torch.device:
    """Where collectives run."""
    from verl.utils.device import get_device_id, get_device_name

    name = get_device_name()
    return torch.device(name) if name == "cpu" else torch.device(name, get_device_id())


def _on(tensor: Tensor, device: torch.device) -> Tensor:
    return _padded(tensor).to(device)


def _padded(tensor: Tensor) -> Tensor:
    return tensor.to_padded_tensor(0) if tensor.is_nested else tensor

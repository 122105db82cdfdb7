"""Numbers that are not finite stop a run before they reach a weight, and the batch that they came from is kept.

:func:`clip_gradients` stands between the backward pass and the optimizers, :func:`check_sampled` behind a rollout,
:func:`check_weights` before a checkpoint. replay.py takes the file up again.
"""

from __future__ import annotations

import dataclasses
import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import entropy_kernels as ek
from entropy_kernels.trainer.checkpoint import NONFINITE, Weights
from entropy_kernels.trainer.files import OwnFiles
from entropy_kernels.trainer.tensorfile import save_tree

if TYPE_CHECKING:
    from entropy_kernels.trainer.model import Completions, Encoded
    from entropy_kernels.trainer.probes import Step
    from entropy_kernels.trainer.run import Run

#: Number of the layout of a kept batch.
FORMAT = 1


class NonFinite(FloatingPointError):
    """A loss, gradient, log-prob or weight is not finite, in words; with what a kept batch has of its own."""

    def __init__(self, what: str, **batch: Any) -> None:
        super().__init__(what)
        self.batch = batch


def clip_gradients(
    modules: Mapping[str, torch.nn.Module], losses: Sequence[ek.PolicyLoss], grad_clip: float
) -> list[float]:
    """The norm of each module's gradient, which is then clipped to `grad_clip` (0: is not).

    Raises :class:`NonFinite`, with no gradient and no weight changed, if one of them, or a loss of `losses` (one per
    micro-batch), is not finite.
    """
    grads = [[p.grad for p in module.parameters() if p.grad is not None] for module in modules.values()]
    norms = [torch.nn.utils.get_total_norm(each) for each in grads]
    parts = [part.loss.detach() for part in losses]
    device = parts[0].device
    found: list[float] = torch.stack([x.to(device).double() for x in (*norms, *parts)]).tolist()  # waited for once
    if not all(map(math.isfinite, found)):
        raise NonFinite(_causes(modules, found), losses=found[len(norms) :])
    for module, norm in zip(modules.values(), norms, strict=True):
        torch.nn.utils.clip_grads_with_norm_(module.parameters(), grad_clip or math.inf, norm)
    return found[: len(norms)]


def _causes(modules: Mapping[str, torch.nn.Module], found: Sequence[float]) -> str:
    losses = found[len(modules) :]
    said = [
        f"the loss of micro-batch {i + 1} of {len(losses)} is {loss:g}"
        for i, loss in enumerate(losses)
        if not math.isfinite(loss)
    ][:1]
    names = bad_gradients(modules)
    if names:
        more = f" and of {len(names) - 1} more" if len(names) > 1 else ""
        said.append(f"the gradient of {names[0]}{more} is not finite")
    elif not said:
        norm = next(norm for norm in found if not math.isfinite(norm))
        said.append(f"the gradient's norm is {norm:g}, though each of its entries is finite")
    return ", and ".join(said)


def bad_gradients(modules: Mapping[str, torch.nn.Module]) -> list[str]:
    """Names of the parameters whose gradient is not finite, in the order of the modules."""
    return [
        _name(module, name)
        for module in modules
        for name, p in modules[module].named_parameters()
        if p.grad is not None and not bool(p.grad.isfinite().all())
    ]


def bad_weights(modules: Mapping[str, Mapping[str, Tensor]]) -> list[str]:
    """Names of the weights that are not finite, of the state dict of each module."""
    found = [(_name(module, name), x) for module, state in modules.items() for name, x in state.items()]
    found = [(name, x) for name, x in found if x.is_floating_point()]
    finite = torch.stack([x.isfinite().all() for _, x in found]).tolist() if found else []
    return [name for (name, _), whole in zip(found, finite, strict=True) if not whole]


def _name(module: str, name: str) -> str:
    return name if module == "policy" else f"{module}'s {name}"


def check_weights(modules: Mapping[str, Weights], step: int) -> None:
    """Raise :class:`NonFinite` rather than keep weights that are not finite."""
    names = bad_weights({name: module.state_dict() for name, module in modules.items()})
    if names:
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        raise NonFinite(
            f"after {step} steps: expected finite weights, got {names[0]}{more} that are not (lr may be too high); no "
            "checkpoint of them is written"
        )


def check_sampled(prompts: Encoded, completions: Completions, logprob: Tensor, where: str) -> None:
    """Raise :class:`NonFinite` if the log-prob of a completion's token, (B, L), is not finite."""
    if math.isfinite(float(logprob.sum())):
        return
    places = (~logprob.isfinite()).nonzero().tolist()
    row, position = places[0]
    raise NonFinite(
        f"log-probs of {len(places)} tokens {where} are not finite, first {float(logprob[row, position]):g} in row "
        f"{row}, position {position}",
        rollout={**_fields(completions), "prompts": _fields(prompts)},
    )


@contextmanager
def kept(run: Run, step: Step, *, rows: Tensor | None = None, seed: int = 0) -> Iterator[None]:
    """Within: a rollout, or an update on its `rows`. If that raises :class:`NonFinite`, what it was made of is kept in
    the run's folder, and the error says how to take it up."""
    decides = run.target or run.controller
    memory = {} if decides is None else decides.memory
    try:
        yield
    except NonFinite as error:
        path = step.config.out / NONFINITE
        batch = {
            "kind": "batch",
            "format": FORMAT,
            "what": str(error),
            "step": step.number,
            "update": len(step.updates),
            "seed": seed,
            "config": step.config.to_dict(),
            "modules": {name: module.state_dict() for name, module in run.modules.items()},
            "rollout": None if step.rollout is None else _fields(step.rollout),
            "rows": rows,
            "plan": None if step.plan is None else step.plan._asdict(),
            "memory": {name: float(value) for name, value in memory.items()},
            **error.batch,
        }
        place = f"step {step.number}" + ("" if rows is None else f", update {len(step.updates) + 1}")
        try:
            save_tree(OwnFiles(step.config.out, "run").file(NONFINITE), batch)
            command = f"python -m entropy_kernels.trainer replay {shlex.quote(str(path))}"
            told = f"the batch is kept, and this replays it: {command}"
        except OSError as failed:
            told = f"the batch could not be kept ({failed})"
        raise NonFinite(f"{place}: {error}; no weight was changed; {told}") from error


def _fields(value: Any) -> dict[str, Any]:
    """Of a dataclass, those within it, too; tensors as they are."""
    found = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return {name: _fields(x) if dataclasses.is_dataclass(x) else x for name, x in found.items()}

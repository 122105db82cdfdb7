"""``replay FILE``: the update that was not finite, once more from the batch that was kept (faults.py), without a step.

From the same weights and tokens it has the same bits; under another head, dtype or device it shows whose fault it is.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import entropy_kernels as ek
from entropy_kernels.trainer import checkpoint, faults, ppo
from entropy_kernels.trainer.config import TrainerConfig
from entropy_kernels.trainer.critic import critic_of
from entropy_kernels.trainer.methods import controller_of, target_of
from entropy_kernels.trainer.model import Encoded, Policy
from entropy_kernels.trainer.rollout import Rollout
from entropy_kernels.trainer.start import first_policy
from entropy_kernels.trainer.tensorfile import read_tree

#: Of what is listed, so many are shown.
_SHOWN = 5


@dataclass
class Flags:
    """What may differ from the run."""

    head: str | None = None
    """linear, logits or torch; none is the run's. torch has none of this library's kernels."""
    dtype: str | None = None
    """float32 or mixed; none is the run's."""
    device: str | None = None
    """Where; none is the run's."""


class Still:
    """In the place of an optimizer: gradients are made and stay, weights do not change."""

    def __init__(self, module: torch.nn.Module) -> None:
        self._module = module

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As an optimizer does."""
        self._module.zero_grad(set_to_none)

    def step(self) -> None:
        """Nothing."""


def load_batch(path: Path) -> dict[str, Any]:
    """What :func:`faults.kept` wrote; ValueError or OSError for anything else, in one line."""
    path = path / checkpoint.NONFINITE if path.is_dir() else path
    expected = f"replay: expected a batch that a run kept ({checkpoint.NONFINITE}), got {path}, "
    if not path.exists():
        raise FileNotFoundError(f"{expected}which does not exist")
    batch = read_tree(path, expected)
    if batch.get("kind") != "batch":
        raise ValueError(f"{expected}which holds something else")
    if batch["format"] > faults.FORMAT:
        raise ValueError(f"{expected}which is of a newer version; update entropy_kernels")
    return batch


def replay(path: Path, flags: Flags, *, task: Any = None) -> Iterator[str]:
    """The lines of the report; the last begins with "finite" or "not finite". `task`: of a run that was given one.

    Raises as :func:`load_batch`, and ValueError for a configuration that cannot work here.
    """
    batch = load_batch(path)
    config = TrainerConfig.from_dict(batch["config"])
    asked = {name: value for name, value in vars(flags).items() if value is not None}
    config, task = ppo.prepared(dataclasses.replace(config, **asked), task)
    torch.set_num_threads(config.threads)
    policy = first_policy(config, task)
    policy.load_state_dict(batch["modules"]["policy"])
    as_before = not asked.keys() & {"head", "dtype", "device"}
    kept = _on(batch["rollout"], policy.device)
    rows = batch["rows"]
    place = f"step {batch['step']}" + ("" if rows is None else f", update {batch['update'] + 1}")
    yield f"{place}: {batch['what']}"
    yield _listed("weights that are not finite", faults.bad_weights(batch["modules"]))
    if rows is None:
        rows = torch.arange(len(kept["ids"]))
        finite = yield from _tokens(policy, config, kept, rows.to(policy.device))
    else:
        rows = rows.to(policy.device)
        finite = yield from _tokens(policy, config, kept, rows)
        finite &= yield from _update(policy, config, batch, kept, rows, as_before)
    yield "finite: no step was made" if finite else "not finite" + " again" * as_before


def _on(value: Any, device: torch.device) -> Any:
    if isinstance(value, dict):
        return {name: _on(x, device) for name, x in value.items()}
    return value.to(device) if isinstance(value, Tensor) else value


@torch.no_grad()
def _tokens(policy: Policy, config: TrainerConfig, kept: dict[str, Any], rows: Tensor) -> Generator[str, None, bool]:
    """Lines about the tokens of `rows`; returns whether all have finite numbers."""
    completed, prompts = kept.get("completed", kept["mask"]), Encoded(**kept["prompts"])
    parts = []
    for part in rows.chunk(config.micro_batches):
        outputs = policy.outputs(prompts[part], kept["ids"][part], completed[part])
        parts.append(
            policy.logprob_entropy(outputs, kept["ids"][part], kept["mask"][part], temperature=config.temperature)
        )
    known = {"log-prob": torch.cat([part.logprob for part in parts])}
    known |= {
        label: kept[name][rows]
        for name, label in (("old_logprob", "old log-prob"), ("logprob", "while sampling"), ("advantages", "advantage"))
        if name in kept
    }
    mask = kept["mask"][rows]
    bad = mask & ~torch.stack([value.isfinite() for value in known.values()]).all(0)
    places = bad.nonzero().tolist()
    shown = [
        f"row {int(rows[i])}, position {j} ({', '.join(f'{name} {float(x[i, j]):g}' for name, x in known.items())})"
        for i, j in places[:_SHOWN]
    ]
    yield _listed(f"tokens that are not finite, of {int(mask.sum())}", shown, len(places))
    before = "old log-prob" if "old log-prob" in known else "while sampling"
    ratios = (known["log-prob"] - known[before])[mask & ~bad]
    if len(ratios):
        yield f"log-ratio of the others: {float(ratios.min()):g} to {float(ratios.max()):g}"
    return not places


def _update(
    policy: Policy, config: TrainerConfig, batch: dict[str, Any], kept: dict[str, Any], rows: Tensor, as_before: bool
) -> Generator[str, None, bool]:
    """Lines about losses and gradients; returns whether all are finite."""
    rollout = Rollout(**{**kept, "prompts": Encoded(**kept["prompts"])})
    plan = None if batch["plan"] is None else ek.Control(**_on(batch["plan"], policy.device))
    target = target_of(config, vocab_size=policy.vocab_size, backend=policy.backend)
    decides = target or controller_of(config)
    if target is None and decides is not None:
        decides.load_state_dict({"calls": 0, "memory": batch["memory"]})
    optimizer: Any = Still(policy.model)
    critic, modules = critic_of(config, policy), {"policy": policy.model}
    if critic is not None:
        critic.load_state_dict(batch["modules"]["critic"])
        critic.optimizer, modules["critic"] = Still(critic.module), critic.module  # type: ignore[assignment]
    try:
        made = ppo.update(
            policy, optimizer, rollout, rows, config, decides, seed=batch["seed"], plan=plan, critic=critic,
            critic_alone=batch["step"] < config.critic_first,
        )  # fmt: skip
        losses, finite = [float(part.loss) for part in made.losses], True
    except faults.NonFinite as error:
        losses, finite = error.batch["losses"], False
    for i, (loss, was) in enumerate(zip(losses, batch["losses"], strict=True)):
        same = ", the same bits" if as_before and (loss == was or (math.isnan(loss) and math.isnan(was))) else ""
        yield f"loss of micro-batch {i + 1} of {len(losses)}: {loss:.9g} (was {was:.9g}{same})"
    yield _listed("parameters whose gradient is not finite", faults.bad_gradients(modules))
    return finite


def _listed(what: str, found: list[str], count: int | None = None) -> str:
    count = len(found) if count is None else count
    if not count:
        return f"{what}: none"
    return f"{what}: {count}: {'; '.join(found[:_SHOWN])}{'; ...' if count > _SHOWN else ''}"

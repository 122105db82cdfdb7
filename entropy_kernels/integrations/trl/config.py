"""TRL's ``GRPOConfig`` with the fields of this package: what holds the entropy, and whose head reads the logits."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import trl

from entropy_kernels.integrations.trl.plan import check


@dataclass
class GRPOConfig(trl.GRPOConfig):
    """``trl.GRPOConfig`` and, all optional, the fields below; as flags, too (``TrlParser``, ``HfArgumentParser``).

    Args:
        method: a name of ``entropy_kernels.methods()``; None: TRL's loss as it is.
        method_options: of the method, or of :class:`entropy_kernels.TargetEntropy` with ``target_entropy``; a dict, as
            a flag JSON. PPO's clip is not among them: it is ``epsilon``, ``epsilon_high`` and ``delta``.
        preset: "verl" or "paper", of clip_cov and kl_cov. kl_cov, and the paper's clip_cov, have no PPO clip.
        target_entropy: the entropy to hold, nats: a number, or ``[[step, nats], ...]`` with steps that count rollouts;
            in the place of a method.
        target_method: by what it is held: "exact_cov", "weight" or "bonus".
        target_observe: whether to measure what a rollout's updates did to its entropy, one forward without gradient per
            rollout, from which the strength of the control is learned.
        plan_from: which statistics a method decides from. "auto": those of the training forward where a step is one
            micro-batch, else "old". "old": those of the rollout's policy. "fresh": those of the policy before each
            step; with several micro-batches a step one forward without gradient more.
        fused_head: whether this package's head reads the logits in the place of TRL's; None: where a method needs it.
        any_trl_version: also beside a version of TRL that this was not tested with.

    Raises:
        TypeError, ValueError: an unknown method, option, preset or target, or one that this loss cannot express.

    Source:
        docs/integrations.md.
    """

    method: str | None = field(
        default=None, metadata={"help": "Method of entropy_kernels.methods() that holds the entropy. None: TRL's loss."}
    )
    method_options: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Options of the method (or of the target's control), as JSON."}
    )
    preset: str | None = field(default=None, metadata={"help": "'verl' or 'paper', of clip_cov and kl_cov."})
    target_entropy: list[Any] | str | float | None = field(
        default=None, metadata={"help": "Entropy to hold in nats: a number, or [[rollout, nats], ...] as JSON."}
    )
    target_method: str = field(
        default="exact_cov", metadata={"help": "What holds it: 'exact_cov', 'weight' or 'bonus'."}
    )
    target_observe: bool = field(
        default=True, metadata={"help": "Learn from what updates did to the entropy; a forward pass per rollout."}
    )
    plan_from: str = field(
        default="auto", metadata={"help": "Statistics that a method decides from: 'auto', 'old' or 'fresh'."}
    )
    fused_head: bool | None = field(
        default=None, metadata={"help": "Read the logits with this package's head. None: where a method needs it."}
    )
    any_trl_version: bool = field(
        default=False, metadata={"help": "Run beside a version of TRL that this was not tested with."}
    )

    def __post_init__(self) -> None:
        # flags are text
        self.method_options = _parsed("method_options", self.method_options, "JSON like '{\"ratio\": 0.1}'", dict)
        nats = "a number of nats or [[rollout, nats], ...] as JSON"
        self.target_entropy = _parsed("target_entropy", self.target_entropy, nats, (int, float, list))
        super().__post_init__()
        check(self)


def _parsed(name: str, value: Any, expected: str, kind: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        found = json.loads(value)
    except json.JSONDecodeError:
        found = None
    if not isinstance(found, kind):
        raise ValueError(f"{name}: expected {expected}, got {value!r}")
    return found

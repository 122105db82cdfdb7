"""The reference that a policy is held near: the policy where RL starts, after the supervised start or as it is loaded.

Its weights are kept beside the run's checkpoints, written once, and put in the place of the present ones for a forward:
those that are trained, so that under LoRA a reference is as small as an adapter.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import entropy_kernels as ek
from entropy_kernels.trainer.files import OwnFiles
from entropy_kernels.trainer.tensorfile import read_tree, save_tree

if TYPE_CHECKING:
    from entropy_kernels.trainer.config import TrainerConfig
    from entropy_kernels.trainer.model import Encoded, Policy
    from entropy_kernels.trainer.rollout import Rollout

#: In the folder of a run that has a reference.
REFERENCE = "reference.safetensors"
#: Where the penalty goes, and what it is estimated by; '+': with the gradient of k2, which a reward does not have.
PLACES = ("loss", "reward")
ESTIMATORS = (*ek.losses.KL_ESTIMATORS, *(f"{name}+" for name in ek.losses.KL_ESTIMATORS if name != "k2"))


class Reference:
    """A policy with the weights of a reference, `weights`: those that are trained, by their names."""

    def __init__(self, policy: Policy, weights: dict[str, Tensor]) -> None:
        self._policy, self.weights = policy, weights

    @contextmanager
    def _in_place(self) -> Iterator[None]:
        """Within: the policy has the reference's weights."""
        trained = _trained(self._policy)
        now = {name: p.data for name, p in trained.items()}
        for name, p in trained.items():
            p.data = self.weights[name]
        try:
            yield
        finally:
            for name, p in trained.items():
                p.data = now[name]

    @torch.no_grad()
    def logprob(self, parts: list[slice], prompts: Encoded, ids: Tensor, mask: Tensor, *, temperature: float) -> Tensor:
        """Log-probs of completions under the reference, (B, L) float32, nats, 0 where masked; some rows at a time."""
        found, policy = [], self._policy
        with self._in_place():
            for rows in parts:
                outputs = policy.outputs(prompts[rows], ids[rows], mask[rows])
                found.append(policy.logprob_entropy(outputs, ids[rows], mask[rows], temperature=temperature).logprob)
        return torch.cat(found)


def reference_of(config: TrainerConfig, policy: Policy, *, resumed: bool) -> Reference | None:
    """The reference of a run, None without one: the policy as it is, or, of a run that goes on, the one that it kept.

    FileNotFoundError or ValueError if that is missing, damaged or of another model.
    """
    if not config.ref_kl_coef:
        return None
    trained, path = _trained(policy), config.out / REFERENCE
    if not resumed:
        return Reference(policy, {name: p.detach().clone() for name, p in trained.items()})
    expected = f"ref_kl_coef: expected the reference of this run in {path}, got "
    if not path.is_file():
        raise FileNotFoundError(f"{expected}none: a run that began with ref_kl_coef = 0 kept none, and goes on so")
    weights = read_tree(path, expected, "; without it the run cannot go on as it was")
    if {n: p.shape for n, p in trained.items()} != {n: getattr(x, "shape", None) for n, x in weights.items()}:
        raise ValueError(f"{expected}that of another model")
    return Reference(policy, {name: x.to(policy.device) for name, x in weights.items()})


def keep_reference(reference: Reference | None, out: Path) -> None:
    """Write it into the folder of a run that begins."""
    if reference is not None:
        save_tree(OwnFiles(out, "run").file(REFERENCE), dict(reference.weights))


def check_reference(config: TrainerConfig) -> None:
    """ValueError for a penalty that there is not."""
    if config.ref_kl_in == "reward" and config.ref_kl_estimator.endswith("+"):
        raise ValueError(
            "ref_kl_estimator: expected one without + under ref_kl_in = reward, as a reward has no gradient, got "
            f"{config.ref_kl_estimator}"
        )


def reward_penalty(config: TrainerConfig, logprob: Tensor, ref_logprob: Tensor | None) -> Tensor | float:
    """What the rewards of tokens are lowered by, (B, L), 0 where masked; 0 unless the configuration says so.

    The estimate of the KL divergence at each token, by the log-probs of the policy that sampled, as in verl's
    apply_kl_penalty.
    """
    if ref_logprob is None or config.ref_kl_in != "reward":
        return 0.0
    return config.ref_kl_coef * ek.losses.kl_estimate(logprob - ref_logprob, config.ref_kl_estimator)


def loss_penalty(config: TrainerConfig, rollout: Rollout, rows: Tensor) -> dict[str, Any]:
    """The same for the loss of a micro-batch, as its keywords; none unless the configuration says so."""
    if rollout.ref_logprob is None or config.ref_kl_in != "loss":
        return {}
    return {
        "ref_logprob": rollout.ref_logprob[rows],
        "ref_kl_coef": config.ref_kl_coef,
        "kl_estimator": config.ref_kl_estimator,
    }


def _trained(policy: Policy) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in policy.model.named_parameters() if p.requires_grad}

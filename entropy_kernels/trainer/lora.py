"""LoRA: low-rank adapters, by peft, in layers of a model whose weights stay as they are.

The adapter is all that is trained, checkpointed and given to the optimizer, in the supervised start as in RL. What is
exported is the model with the adapter merged into copies of its weights, and the adapter beside it.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from entropy_kernels._console import did_you_mean, one_line
from entropy_kernels._require import require
from entropy_kernels.trainer.causal_lm import base_of

if TYPE_CHECKING:
    from entropy_kernels.trainer.config import TrainerConfig

#: Name of the fingerprint among what a checkpoint holds of a model.
FROZEN = "frozen_weights"


def with_adapter(model: Any, config: TrainerConfig) -> Any:
    """The model with a new adapter, drawn from `config.warm_seed`; it changes no output yet.

    Raises ValueError for layers that are not there, that peft does not know, or whose weight has another use, too.
    """
    peft: Any = require("peft", "lora_rank > 0", "lora")
    _check_targets(model, config.lora_targets)
    alpha = 2 * config.lora_rank if config.lora_alpha is None else config.lora_alpha
    options = peft.LoraConfig(
        r=config.lora_rank,
        lora_alpha=alpha,
        target_modules=list(config.lora_targets) or "all-linear",
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():  # the model is on the CPU still
        torch.manual_seed(config.warm_seed)
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers by older names
        try:
            adapted = peft.get_peft_model(model, options)
        except ValueError as error:
            reason = one_line(error, 200)
            raise ValueError(f"lora_targets: expected layers that peft can put an adapter into ({reason})") from error
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head is not None and head.weight is embedding.weight
    if tied and any(p is embedding.weight for layer in _layers(adapted).values() for p in layer.parameters()):
        raise ValueError(
            "lora_targets: expected layers with a weight of their own, got the output head or the embedding of a model "
            "that ties the two: merged, they would be two weights"
        )
    return adapted


def _check_targets(model: Any, targets: tuple[str, ...]) -> None:
    """peft passes over names that it does not find, if it finds one."""
    names = [name for name, module in model.named_modules() if getattr(module, "weight", None) is not None]
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            known = sorted({name.rpartition(".")[2] for name in names if not name.rpartition(".")[2].isdigit()})
            raise ValueError(
                f"lora_targets: expected names of the model's layers, some of {', '.join(known)}, got {target!r}"
                f"{did_you_mean(target, known)}"
            )


def _layers(model: Any) -> dict[str, Any]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {name: layer for name, layer in base_of(model).named_modules() if isinstance(layer, BaseTunerLayer)}


@contextmanager
def merged(model: Any) -> Iterator[dict[str, Tensor]]:
    """Within: the state of the model itself with the adapter merged into its weights; afterwards these are, to the bit,
    what they were, of which copies are held on the CPU."""
    base, layers = base_of(model), _layers(model)
    weights = {id(p): p for layer in layers.values() for p in layer.parameters() if not p.requires_grad}
    before = {key: p.detach().to("cpu", copy=True) for key, p in weights.items()}
    trained = {name for name, p in base.named_parameters() if p.requires_grad}
    model.merge_adapter()
    try:
        state = base.state_dict()
        yield {name.replace(".base_layer", ""): value for name, value in state.items() if name not in trained}
    finally:
        model.unmerge_adapter()
        with torch.no_grad():
            for key, p in weights.items():
                p.copy_(before[key])


def trained_state(model: torch.nn.Module) -> dict[str, Tensor]:
    """The state of a model but for weights that are not trained, of which a fingerprint stands there."""
    frozen = {n for n, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad}
    state = {name: value for name, value in model.state_dict().items() if name not in frozen}
    return {**state, FROZEN: fingerprint(model)} if frozen else state


def load_trained_state(model: torch.nn.Module, state: Mapping[str, Tensor]) -> None:
    """The inverse of :func:`trained_state`. Raises RuntimeError for the state of another model."""
    state, own = dict(state), trained_state(model)
    if own.keys() != state.keys():
        raise RuntimeError("state: expected that of this model, got one of other parameters")
    frozen, ours = state.pop(FROZEN, None), own.pop(FROZEN, None)
    if ours is not None and frozen is not None and not _same(ours, frozen):
        raise RuntimeError("state: expected an adapter of this model, got one of a model with other weights")
    model.load_state_dict(state, strict=False)


def _same(ours: Tensor, theirs: Tensor) -> bool:
    return ours.shape == theirs.shape and torch.allclose(ours, theirs, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def fingerprint(module: torch.nn.Module) -> Tensor:
    """One number per weight that is not trained, float64, on the CPU: what is trained fits onto no other model."""
    return torch.stack([p.sum(dtype=torch.float64).cpu() for p in module.parameters() if not p.requires_grad])

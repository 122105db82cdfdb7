"""What is asked of a causal language model of transformers: how it is called, its cache, its positions, its parts.

Families differ in the arguments of their forward, and versions in their names. Whether all of it works together is
tried on a few tokens before anything is trained (:func:`check_policy`).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from entropy_kernels.trainer.model import Encoded, Policy

#: Largest difference of log-probs between two ways to the same tokens that is rounding of float32, nats.
_ROUNDING = 0.01


def base_of(model: Any) -> Any:
    """The model itself, of one that PEFT has put an adapter into."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _arguments(model: Any) -> Mapping[str, Any]:
    """Of its forward. To look at a signature takes as long as a small layer."""
    return _parameters(getattr(model.forward, "__func__", model.forward))


@functools.lru_cache(maxsize=16)
def _parameters(forward: Any) -> Mapping[str, Any]:
    return inspect.signature(forward).parameters


def call(module: Any, **inputs: Any) -> Any:
    """What the forward of a model or backbone gives; positions are left out where it makes them from the mask."""
    if "position_ids" not in _arguments(module):
        del inputs["position_ids"]
    return module(**inputs)


def last_logits(model: Any, count: int, **inputs: Any) -> Tensor:
    """Logits of the last `count` positions, (B, count, V), and of no others where the model can leave them out."""
    names = _arguments(model)
    keep = next((name for name in ("logits_to_keep", "num_logits_to_keep") if name in names), None)
    logits: Tensor = call(model, **inputs, **({} if keep is None else {keep: count})).logits
    return logits[:, -count:]


def new_cache(model: Any) -> dict[str, Any]:
    """An empty key-value cache, as the argument of the forward that it is."""
    from transformers import DynamicCache

    names = _arguments(model)
    # "cache" from transformers 5.24 on, which warns of the name before
    name = next((name for name in ("cache", "past_key_values") if name in names), None)
    if name is None:
        raise ValueError("it takes no key-value cache")
    return {name: DynamicCache(config=model.config)}


def longest_of(model: Any) -> int | None:
    """The number of positions that a model was made for; None where it says none."""
    config = model.config.get_text_config()
    limits = (getattr(config, name, None) for name in ("max_position_embeddings", "max_seq_len"))
    return next((limit for limit in limits if isinstance(limit, int) and limit > 0), None)


def vocab_size_of(model: Any) -> int:
    """Rows of the embedding: ids are below."""
    return int(model.get_input_embeddings().weight.shape[0])


def enable_checkpointing(model: Any) -> None:
    """Gradient checkpointing of a model of transformers, under the name that its version has for it."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    try:
        enable({"use_reentrant": False})
    except ValueError as error:
        raise ValueError(f"gradient_checkpointing: expected a model that supports it ({error})") from error


@contextmanager
def in_training_mode(model: Any) -> Iterator[None]:
    """Within: layers under gradient checkpointing do it, where there is a gradient.

    transformers asks them to be in training mode. They alone are, not what is in them, and their dropout is 0
    (start.py); outside they are not, since they would drop the cache that sampling needs.
    """
    layers = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False) and not m.training]
    if not torch.is_grad_enabled():
        layers = []
    for layer in layers:
        layer.training = True
    try:
        yield
    finally:
        for layer in layers:
            layer.training = False


def save_model(model: Any, folder: Path, state: dict[str, Tensor] | None = None) -> None:
    """Write a model for from_pretrained, with the weights in `state` in place of its own.

    Its generation config is written as it is: before transformers 5, saving refuses sampling parameters that generate()
    would not use, which models on the hub have.
    """
    from transformers import GenerationConfig

    given = getattr(model, "generation_config", None)
    try:
        if given is not None:
            model.generation_config = GenerationConfig()
        model.save_pretrained(folder, state_dict=state)
    finally:
        model.generation_config = given
    if given is not None:
        given.to_json_file(folder / "generation_config.json")


# --- before anything is trained ---------------------------------------------------------------------------------------


def check_policy(policy: Policy, *, checkpointing: bool = False) -> None:
    """Sample and score a few tokens. Raises ValueError, with the reason, for a model that cannot be trained here.

    Sampling needs the cache, scoring the head; both have to agree, and so have a prompt with padding before it and
    without. Under gradient `checkpointing` a layer has to do it.
    """
    base = base_of(policy.model)
    name = type(base).__name__ + ("" if base is policy.model else " with adapters")
    prompts = _prompts(policy)
    with policy.full_precision():
        with _told(f"model: expected one that samples with a DynamicCache of transformers, got {name}, which fails"):
            drawn = policy.sample(
                prompts, max_new_tokens=4, temperature=1.0, generator=torch.Generator(policy.device).manual_seed(0)
            )
        with _told(f"head: expected one that {name} can be trained under, got {policy.head_name}, which fails"):
            scored = _logprob(policy, prompts, drawn.ids, drawn.mask)
            short = replace(prompts, ids=prompts.ids[:1, -_SHORT:], mask=prompts.mask[:1, -_SHORT:])
            alone = _logprob(policy, short, drawn.ids[:1], drawn.mask[:1])
        for what, gap in (("the cache", scored - drawn.logprob), ("padding before a prompt", alone - scored[:1])):
            if not float(gap.abs().max()) <= _ROUNDING:
                raise ValueError(
                    f"model: expected log-probs that {what} does not change, got {name}, whose are "
                    f"{float(gap.abs().max()):.2g} nats off"
                )
        if checkpointing:
            _check_checkpointing(policy, prompts, drawn.ids, drawn.mask)


#: Tokens of the shorter of the two prompts.
_SHORT = 2


def _prompts(policy: Policy) -> Encoded:
    """Two prompts of ordinary tokens, the first shorter."""
    from entropy_kernels.trainer.model import Encoded

    special = {*policy.tokenizer.all_special_ids, *policy.end_ids}
    ordinary = [i for i in range(vocab_size_of(policy.model)) if i not in special][: _SHORT + 3] or [0]
    ids = torch.tensor([[ordinary[i % len(ordinary)] for i in range(_SHORT + 3)]] * 2, device=policy.device)
    mask = torch.ones_like(ids)
    mask[0, :-_SHORT] = 0
    return Encoded(ids, mask)


@torch.no_grad()
def _logprob(policy: Policy, prompts: Encoded, ids: Tensor, mask: Tensor) -> Tensor:
    outputs = policy.outputs(prompts, ids, mask)
    return policy.logprob_entropy(outputs, ids, mask, temperature=1.0).logprob


def _check_checkpointing(policy: Policy, prompts: Encoded, ids: Tensor, mask: Tensor) -> None:
    """Whether a layer of the model asks for gradient checkpointing, which is enabled."""
    base = base_of(policy.model)
    asked: list[Any] = []

    def forward(function: Any, *args: Any, **options: Any) -> Any:
        asked.append(function)
        return function(*args, **options)

    for layer in (m for m in base.modules() if getattr(m, "gradient_checkpointing", False)):
        layer._gradient_checkpointing_func = forward
    policy.outputs(prompts, ids, mask)
    enable_checkpointing(base)  # puts the functions back
    if not asked:
        raise ValueError(
            f"gradient_checkpointing: expected a model whose layers do it, got {type(base).__name__}, where none does"
        )


@contextmanager
def _told(expected: str) -> Iterator[None]:
    """What a model's own code raises, as a sentence that begins as is `expected`."""
    try:
        yield
    except (torch.OutOfMemoryError, ImportError):
        raise
    except Exception as error:
        text = str(error)
        if text.startswith(("model: ", "head: ")):
            way_out = "; head = logits takes the model's own logits" if text.startswith("model: ") else ""
            raise ValueError(text + way_out) from error
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise ValueError(f"{expected} ({kind}{' '.join(text.split())[:200]})") from error

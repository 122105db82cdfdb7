"""Hugging Face causal language models without their logits: the backbone runs, our op takes the place of the head."""

from __future__ import annotations

import difflib
import inspect
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

import entropy_kernels as ek
from entropy_kernels import _fsdp as fsdp
from entropy_kernels._arguments import (
    boolean,
    check_device,
    check_tensor,
    keywords,
    recorded,
    refuse_mapped,
    values_are_checked,
)
from entropy_kernels.integrations import _models, _modules

__all__ = ["CausalLMParts", "causal_lm_logprob_entropy", "causal_lm_parts", "next_tokens"]

_NOT_OF_THE_BACKBONE = (
    "labels", "logits_to_keep", "num_logits_to_keep", "use_cache", "softcap", "entropy_coef", "method", "vocab_size",
)  # fmt: skip
# The last word of names that say something of every token, which a backbone's **kwargs would swallow
_OF_TOKENS = dict.fromkeys(("mask", "masks"), "attention_mask") | dict.fromkeys(
    ("label", "labels", "target", "targets"), "target, of the token after each position"
)


class CausalLMParts(NamedTuple):
    """A causal language model in two: its logits are softcap(``hidden @ weight.T + bias``), hidden = scale · backbone.

    A factor of the model's logits is in ``scale`` and ``bias``; of a head that is called, in what it returns.

    ``weight``, ``bias`` and ``softcap`` are arguments of :func:`entropy_kernels.linear_logprob_entropy` as they stand.

    Attributes:
        backbone: called as the model is; gives the states before the head as its first output, (B, L, H).
        weight: (V, H) in the model's dtype; a module that calls the head where it is more than a weight: quantised,
            with an adapter, with hooks.
        bias: (V,) in the model's dtype, or None.
        scale: factor of the hidden states.
        softcap: that of the logits, or None.
        vocab_size: that of a head that does not tell; else None.

    Source:
        docs/linear.md.
    """

    backbone: torch.nn.Module
    weight: Tensor | Callable[..., Tensor]
    bias: Tensor | None
    scale: float
    softcap: float | None
    vocab_size: int | None


def next_tokens(
    input_ids: Tensor,
    *,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """The label of every position: the token after it in the same sequence, ``ignore_index`` where there is none.

    Args:
        input_ids: (..., L) int token ids.
        attention_mask: ``input_ids``'s shape, bool, int or float 0/1, 1 = a token, 0 = padding on either side: a padded
            position has no label and is none.
        position_ids: int, ``input_ids``'s shape, or (1, L) for all rows; a position that does not follow the one before
            it begins a sequence (several sequences packed in one row). Or with a first dimension of 3, the positions of
            Qwen2-VL and its kin in time, height and width: a sequence begins where all are 0 and where the least of the
            three falls, so that those of images do not. Of 4: the first are those of the text, and tell alone.
        cu_seqlens: (S + 1,) int, from 0 to at most L, never falling: sequence s of a packed row, (L,) or (1, L), is
            [cu_seqlens[s], cu_seqlens[s + 1]); what lies behind the last one is padding.
        ignore_index: the label of a position that has none.

    Returns:
        Token ids, ``input_ids``'s shape and dtype; nothing is read back from a GPU.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype or shape, or values that are no ``cu_seqlens`` (on the
            CPU; on a GPU they give wrong labels, and ENTROPY_KERNELS_DEBUG=1 makes it an error there too, at the price
            of a sync).

    Source:
        docs/linear.md.
    """
    _check_kinds(input_ids, attention_mask=attention_mask, position_ids=position_ids)
    target = torch.full_like(input_ids, ignore_index)
    target[..., :-1] = input_ids[..., 1:]
    if cu_seqlens is not None:
        _check_cu_seqlens(cu_seqlens, input_ids)
        last = _sequence_ends(input_ids, cu_seqlens)
        target = torch.where(last.view(input_ids.shape), ignore_index, target)
    if position_ids is not None:
        follows = _follows(position_ids, input_ids)
        target[..., :-1] = torch.where(follows, target[..., :-1], ignore_index)
    if attention_mask is not None:
        _check_shape("attention_mask", attention_mask, input_ids)
        real, wrong = boolean("attention_mask", attention_mask)
        target[..., :-1] = torch.where(real[..., 1:] & real[..., :-1], target[..., :-1], ignore_index)
        if wrong is not None:  # no id, so that what comes of it is NaN
            target.masked_fill_(wrong, torch.iinfo(target.dtype).min)
    return target


def causal_lm_logprob_entropy(
    model: Any,
    input_ids: Tensor,
    *,
    target: Tensor | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    ignore_index: int = -100,
    logits_dtype: torch.dtype | None = None,
    memory_budget: int | None = None,
    backend: str = "auto",
    **model_options: Any,
) -> ek.LogprobEntropy:
    """Log-prob of every next token and entropy of its distribution, without the logits of the whole batch.

        logprob, entropy = ek.hf.causal_lm_logprob_entropy(model, input_ids, attention_mask=mask)

    replaces ``logits = model(input_ids, ...).logits`` and what follows. Gradients reach every parameter, a tied
    embedding through both of its uses. Gradient checkpointing, autocast and adapters work as in ``model(...)``; a head
    that is more than its weight (LoRA, quantised, with hooks) is called with a tile of the tokens at a time. Softcaps
    (Gemma) and scales of the logits (Granite, Cohere, Falcon-H1 and others) are the model's. What is not computed: a
    loss, the balancing loss of a mixture of experts among it.

    Args:
        model: a transformers causal language model, or a PEFT, accelerate or torch.compile model around one; not one
            wrapped in DDP or FSDP1, nor one with hooks or a forward of yours, which this would go past.
        input_ids: (B, L) int32 or int64; packed sequences: (1, L) with ``cu_seqlens`` or ``position_ids``.
        target: (B, L) int32 or int64 labels of the positions; by default :func:`next_tokens`. Positions with
            ``ignore_index`` cost nothing but their row in the product.
        attention_mask, position_ids: as in :func:`next_tokens`; also handed to the backbone. For packed sequences
            without an attention mask transformers keeps them apart by ``position_ids``, which are made from
            ``cu_seqlens``.
        cu_seqlens: as in :func:`next_tokens`.
        temperature, ignore_index, logits_dtype, memory_budget, backend: as in
            :func:`entropy_kernels.linear_logprob_entropy`.
        model_options: handed to the backbone.

    Returns:
        ``LogprobEntropy(logprob, entropy)``, each (B, L), fp32 (fp64 for fp64), in nats: position t belongs to the
        token at t + 1; 0 where there is no label.

    Raises:
        TypeError: as in :func:`causal_lm_parts`; an option of the model that has no effect here.
        ValueError: arguments of the wrong shape; values that are no ``cu_seqlens``, as :func:`next_tokens`; positions
            or packed sequences, of a model that does not tell sequences apart by positions.

    Source:
        docs/linear.md.
    """
    layers = _check_model(model)
    inner, backbone, head = modules = _modules_of(layers[-1])
    parts = _parts(model, *modules)
    _check_kinds(input_ids, target=target, attention_mask=attention_mask, position_ids=position_ids)
    if input_ids.dtype not in (torch.int32, torch.int64):  # what an embedding takes
        raise TypeError(f"input_ids: expected dtype torch.int32 or torch.int64, got {input_ids.dtype}")
    if input_ids.dim() != 2:
        raise ValueError(f"input_ids: expected (B, L), got shape {tuple(input_ids.shape)}")
    if cu_seqlens is not None and position_ids is None:
        position_ids = _positions(input_ids, cu_seqlens)
    if target is None:
        target = next_tokens(
            input_ids, attention_mask=attention_mask, position_ids=position_ids, cu_seqlens=cu_seqlens,
            ignore_index=ignore_index,
        )  # fmt: skip
    _check_shape("target", target, input_ids)
    if cu_seqlens is not None and attention_mask is not None:
        raise ValueError(
            "attention_mask: expected None beside cu_seqlens, which say where sequences and padding are, got a tensor "
            "(with which transformers would let packed sequences see each other)"
        )
    if position_ids is not None:
        _check_positions(inner, backbone, cu_seqlens)
        position_ids = _with_text_positions(position_ids, input_ids, cu_seqlens, _models.text_config(inner))
    options = _options(layers, backbone, model_options)
    input_ids, attention_mask, position_ids = recorded(input_ids, attention_mask, position_ids)

    def forward(**inputs: Any) -> list[Tensor]:
        found = parts.backbone(**inputs)
        hidden = found if isinstance(found, Tensor) else found[0]
        return fsdp.as_forward(around_head, through_head, hidden, called=head)

    def through_head(hidden: Tensor) -> list[Tensor]:  # (B, L, H)
        now = _parts(model, *modules) if around_head else parts  # FSDP has gathered the weight only now
        hidden = hidden if now.scale == 1 else hidden * now.scale
        return [*ek.linear_logprob_entropy(
            hidden, now.weight, target, now.bias, temperature=temperature, softcap=now.softcap,
            ignore_index=ignore_index, vocab_size=now.vocab_size, logits_dtype=logits_dtype,
            memory_budget=memory_budget, backend=backend,
        )]  # fmt: skip

    units = fsdp.sharded(model.modules())
    around_backbone = fsdp.sharded(fsdp.around(model, backbone)) if units else []
    around_head = fsdp.sharded([*fsdp.around(model, head), head]) if units else []
    given = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids, **options}
    inputs = {name: value for name, value in given.items() if value is not None}
    with _modules.autocast_of(*layers):
        return ek.LogprobEntropy(*fsdp.as_forward(around_backbone, forward, **inputs))


def causal_lm_parts(model: Any) -> CausalLMParts:
    """What :func:`causal_lm_logprob_entropy` runs, for callers that choose the positions, or another of our functions.

        parts = ek.hf.causal_lm_parts(model)
        hidden = parts.backbone(input_ids, attention_mask=mask, use_cache=False)[0][:, -n - 1 : -1] * parts.scale
        stats = ek.linear_token_stats(
            hidden, parts.weight, input_ids[:, -n:], parts.bias, vocab_size=parts.vocab_size, softcap=parts.softcap
        )

    Args:
        model: as in :func:`causal_lm_logprob_entropy`. Code of a model's own that makes logits in a way which no
            attribute tells is not noticed: compare the two once (the trainer does).

    Returns:
        :class:`CausalLMParts`.

    Raises:
        TypeError: a model without an output head, with layers between backbone and head, with an encoder, one that is
            known to change its logits in another way than by a factor and a softcap, one that is wrapped, one with
            hooks or a forward that take effect on the whole model only, or a PEFT model that adds tokens to the prompt.

    Source:
        docs/linear.md.
    """
    layers = _check_model(model)
    fsdp.settle(model.modules())
    return _parts(model, *_modules_of(layers[-1]))


def _check_model(model: Any) -> list[Any]:
    """:func:`_wrapped`, of a model that can be taken apart."""
    layers = _wrapped(model)
    for module in layers:
        _check_call(module)
    _say_what_is_dropped(_models.text_config(layers[-1]))
    return layers


def _parts(given: Any, model: Any, backbone: Any, head: Any) -> CausalLMParts:
    """Of the model ``given``, and :func:`_modules_of` it."""
    config = _models.text_config(model)
    _models.check_logits(model, backbone, head, config)
    before, after, softcap = _models.hidden_scale_logit_scale_softcap(model.config, config)
    vocab_size = None if getattr(head, "out_features", None) is not None else config.vocab_size
    if fsdp.is_managed(backbone):
        backbone = fsdp.Forward(backbone, fsdp.around(given, backbone))
    weight = _modules.weight_of(head)
    if weight is None:
        return CausalLMParts(backbone, _Called(head, after), None, before, softcap, vocab_size)
    bias = head.bias if head.bias is None or after == 1 else head.bias * after
    return CausalLMParts(backbone, weight, bias, before * after, softcap, vocab_size)


def _modules_of(model: Any) -> tuple[Any, Any, Any]:
    """The model, which has nothing around it, its backbone, its head."""
    return model, *_models.backbone_and_head(model, _models.text_config(model))


def _check_call(model: Any) -> None:
    """What a call of the model adds to that of its parts would be lost without a word."""
    added = _modules.added_to(model) if isinstance(model, torch.nn.Module) else []
    if added and not _modules.in_call_of(model):
        raise TypeError(
            "model: expected one whose logits nothing changes behind its head, since it is not called itself, got "
            f"{type(model).__name__} with {', '.join(added)}; take ek.logprob_entropy(model(...).logits, ...), or "
            "put that on the backbone or the head; if it leaves logits as they are, remove it for this call, or take "
            "the model's parts yourself: ek.linear_logprob_entropy(model.model(input_ids, use_cache=False)[0], "
            "model.lm_head.weight, ek.hf.next_tokens(input_ids), softcap=...)"
        )
    for hook in _modules.global_hooks():
        if not _modules.is_harmless(hook):
            warnings.warn(
                f"model: the global hook {_modules.name_of(hook)} runs on backbone and head, not on the model, which "
                "is not called itself",
                stacklevel=4,
            )


def _say_what_is_dropped(config: Any) -> None:
    if getattr(config, "output_router_logits", False):
        warnings.warn(
            "model: its config has output_router_logits=True; the balancing loss of its experts is not computed here "
            "(model(..., output_router_logits=True).aux_loss has it)",
            stacklevel=4,
        )


def _options(layers: list[Any], backbone: Any, options: dict[str, Any]) -> dict[str, Any]:
    """For the backbone; refuses what it would swallow without a word: misspelt names of ours, the head's, PEFT's."""
    known = _parameters(backbone)
    ours = [*keywords(causal_lm_logprob_entropy)]
    for name, value in options.items():
        close = [] if name in known else difflib.get_close_matches(name, ours, 1, 0.75)
        meant = _OF_TOKENS.get(name.split("_")[-1])
        if not close and meant and not any(name in _parameters(part) for part in backbone.modules()):
            close = [meant]
        if name in ("adapter_names", "alora_offsets") or any(
            name in getattr(layer, "special_peft_forward_args", ()) for layer in layers
        ):
            raise TypeError(
                f"{name}: expected none, since it is the PEFT model's own call that takes it, got {value!r}; choose "
                "an adapter by model.set_adapter, or take ek.logprob_entropy(model(...).logits, ...)"
            )
        if close or name in _NOT_OF_THE_BACKBONE:
            raise TypeError(
                f"{name}: expected an option of causal_lm_logprob_entropy or of the backbone, got one of neither"
                + (f"; did you mean {close[0]}?" if close else "")
            )
        if name.startswith("output_") and value:
            raise TypeError(
                f"{name}: expected none of the outputs that are not returned here, got {value!r}; take them, and a "
                "balancing loss of experts, from model(...)"
            )
    return {"use_cache": False, **options} if _takes_any(known) or "use_cache" in known else options


def _check_positions(model: Any, backbone: Any, cu_seqlens: Tensor | None) -> None:
    """Models that do not look at positions, or not only, let packed sequences see each other."""
    known = _parameters(backbone)
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    if _takes_any(known) and decoder is not model:  # models of images hand on what they do not name
        known = {**known, **_parameters(decoder)}
    name = "position_ids" if cu_seqlens is None else "cu_seqlens"
    why = ""
    if "input_ids" in known and "position_ids" not in known:
        why = "whose backbone takes no position_ids"
    elif cu_seqlens is not None and getattr(model, "_is_stateful", False):
        why = "whose layers have a state that goes on from one packed sequence to the next"
    elif cu_seqlens is not None and _models.masks_without_positions(model):
        why = "whose attention masks do not follow positions (flash attention's do)"
    if why:
        raise ValueError(
            f"{name}: expected None for {type(model).__name__}, {why}, got a tensor; pad sequences to rows of their "
            "own, with an attention_mask"
        )


def _with_text_positions(position_ids: Tensor, input_ids: Tensor, cu_seqlens: Tensor | None, config: Any) -> Tensor:
    """With positions in time, height and width (mRoPE), those of the text before them: they keep sequences apart."""
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    axes = len(rope.get("mrope_section") or ())
    flat = position_ids.dim() == input_ids.dim()
    if axes == 0 or not (flat or (cu_seqlens is not None and position_ids.shape[0] == axes)):
        return position_ids
    text = position_ids if cu_seqlens is None else _positions(input_ids, cu_seqlens)
    return torch.cat([part.expand(n, *input_ids.shape) for part, n in ((text, 1), (position_ids, axes))])


def _parameters(backbone: Any) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(getattr(backbone, "_orig_mod", backbone).forward).parameters


def _takes_any(parameters: Mapping[str, inspect.Parameter]) -> bool:
    return any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())


def _wrapped(model: Any) -> list[Any]:
    """The model and, before it, what is around it, from outside; a PEFT model has its adapters inside of the model."""
    ddp = isinstance(model, torch.nn.parallel.DistributedDataParallel)
    if ddp or type(model).__name__ == "FullyShardedDataParallel":
        raise TypeError(
            f"model: expected the model itself, got {type(model).__name__}, whose forward (which synchronises the "
            "gradients) would be gone past; call this function inside of the forward of the module that you wrap"
        )
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        raise TypeError(
            "model: expected a PEFT model with adapters in its layers, "
            f"got {model.active_peft_config.peft_type}, whose virtual tokens would be left out"
        )
    if (added := _models.added_by_peft(model)) is not None:
        raise TypeError(
            f"model: expected a PEFT model that only its adapters' layers change, got {added} its own call computes; "
            "take ek.logprob_entropy(model(...).logits, ...)"
        )
    if hasattr(model, "_orig_mod"):  # torch.compile
        return [model, *_wrapped(model._orig_mod)]
    if hasattr(model, "get_base_model"):
        return [model, model.base_model, *_wrapped(model.get_base_model())]
    return [model]


class _Called(torch.nn.Module):
    """A head as its model calls it, with (..., L, H) states, and its logits multiplied."""

    def __init__(self, head: torch.nn.Module, scale: float) -> None:
        super().__init__()
        self._head, self._scale = head, scale
        self.out_features = getattr(head, "out_features", None)

    def __call__(self, hidden: Tensor) -> Tensor:  # no module of the user's: global hooks are not to meet it
        logits: Tensor = self._head(hidden) if hidden.dim() > 2 else self._head(hidden[None])[0]
        return logits if self._scale == 1 else logits * self._scale


def _sequence_ends(input_ids: Tensor, cu_seqlens: Tensor) -> Tensor:
    """(L,) bool: the last token of a sequence, and everything behind the last sequence."""
    place = torch.arange(input_ids.shape[-1], device=input_ids.device)
    # the number of sequences that end at or before t + 1 grows where one ends
    ends = torch.searchsorted(cu_seqlens.to(place), place + 1, right=True)
    ends = ends != torch.searchsorted(cu_seqlens.to(place), place, right=True)
    return ends | (place >= cu_seqlens[-1])


def _follows(position_ids: Tensor, input_ids: Tensor) -> Tensor:
    """(..., L - 1) bool: whether a token is of the sequence of the one before it."""
    check_tensor("position_ids", position_ids)
    channels = position_ids.shape[0] if position_ids.dim() == input_ids.dim() + 1 else 0
    place = position_ids[0] if channels in (3, 4) else position_ids
    if place.shape != input_ids.shape and place.shape != (1, *input_ids.shape[1:]):
        raise ValueError(
            f"position_ids: expected input_ids's shape {tuple(input_ids.shape)}, or 3 or 4 times that, "
            f"got {tuple(position_ids.shape)}"
        )
    if channels == 3:
        least, first = position_ids.amin(0), (position_ids == 0).all(0)
        return (least[..., 1:] >= least[..., :-1]) & ~first[..., 1:]
    return place[..., 1:] == place[..., :-1] + 1


def _positions(input_ids: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Position of each token in its sequence, 0, 1, … again behind the last one."""
    _check_cu_seqlens(cu_seqlens, input_ids)
    place = torch.arange(input_ids.shape[-1], device=input_ids.device)
    starts = cu_seqlens.to(place)
    return (place - starts[torch.searchsorted(starts, place, right=True) - 1]).view(input_ids.shape)


def _check_kinds(input_ids: Any, **others: Any) -> None:
    """Tensors as ops take them, on one device; ``others`` may be None or what else a backbone knows, no arrays."""
    _check_ids(input_ids)
    refuse_mapped({"input_ids": input_ids, **others})
    for name, value in others.items():
        if isinstance(value, (Tensor, list, tuple)) or hasattr(value, "__array__"):
            check_tensor(name, value)
            unusual = value.dtype in (torch.uint16, torch.uint32, torch.uint64) or value.dtype.itemsize < 2
            if value.is_complex() or (unusual and value.dtype not in (torch.bool, torch.uint8, torch.int8)):
                raise TypeError(f"{name}: expected a bool, int or float dtype, got {value.dtype}; .long() is one")
            check_device(name, value, "input_ids", input_ids)


def _check_ids(input_ids: Any) -> None:
    check_tensor("input_ids", input_ids)
    if input_ids.is_floating_point() or input_ids.is_complex() or input_ids.dtype == torch.bool:
        raise TypeError(f"input_ids: expected a tensor of integers, got {input_ids.dtype}")
    if input_ids.dim() == 0:
        raise ValueError("input_ids: expected (..., L), got a 0-d tensor")


def _check_shape(name: str, value: Tensor, input_ids: Tensor) -> None:
    check_tensor(name, value)
    if value.shape != input_ids.shape:
        raise ValueError(f"{name}: expected input_ids's shape {tuple(input_ids.shape)}, got {tuple(value.shape)}")


def _check_cu_seqlens(cu_seqlens: Any, input_ids: Tensor) -> None:
    length = input_ids.shape[-1]
    check_tensor("cu_seqlens", cu_seqlens)
    integers = not (cu_seqlens.is_floating_point() or cu_seqlens.is_complex() or cu_seqlens.dtype == torch.bool)
    if input_ids.numel() != length or cu_seqlens.dim() != 1 or cu_seqlens.numel() == 0 or not integers:
        raise ValueError(
            "cu_seqlens: expected (S + 1,) int for input_ids of shape (L,) or (1, L), "
            f"got {cu_seqlens.dtype} {tuple(cu_seqlens.shape)} for {tuple(input_ids.shape)}"
        )
    # a compiled graph would break where the host looks at a value
    if torch.compiler.is_compiling() or not values_are_checked(cu_seqlens):
        return
    first, last = cu_seqlens[0].item(), cu_seqlens[-1].item()
    falls = (cu_seqlens[1:] < cu_seqlens[:-1]).nonzero()
    if first != 0 or last > length or falls.numel() > 0:
        if falls.numel() > 0:
            place = int(falls[0])
            got = f"{cu_seqlens[place].item()} before {cu_seqlens[place + 1].item()}"
        else:
            got = f"{first} to {last}"
        raise ValueError(f"cu_seqlens: expected numbers from 0 to at most L = {length} that never fall, got {got}")

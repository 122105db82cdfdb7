"""What transformers' models are made of, asked of the model itself: backbone, head, and how logits follow from them."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from typing import Any

from torch import nn

# How transformers' models make their logits, by attribute of the text configuration. A factor is the value to a power.
_FACTORS = {
    "logit_scale": 1,  # Cohere
    "lm_head_multiplier": 1,  # Falcon-H1
    "output_multiplier": 1,  # Muse
    "logits_scaling": -1,  # Granite
    "logits_mup_width_multiplier": -1,  # Inkling
}
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")  # Gemma; RecurrentGemma; xLSTM
# Exceptions, by `model_type`
_MULTIPLIES = {"hyperclovax"}  # where others divide
_BEFORE_THE_HEAD = {"minicpm3", "inkling_text"}  # the factor is that of the hidden states: a bias does not have it
_UNUSED = {  # the configuration has a factor or a softcap, of its own or of its text model, that the logits do not
    "aya_vision", "cohere2_vision", "gemma3", "granite_speech", "granite_speech_plus", "mpt", "shieldgemma2",
}  # fmt: skip
_UNUSED_BEFORE = {"paligemma": (5, 23)}  # the version of transformers that began to use it
# Known to change logits, in models whose code is not in transformers. Neutral values change none.
_OTHERS = (
    "mup_output_alpha", "mup_width_scale", "output_logits_scale", "width_scale",  # Jais
    "mup_width_multiplier",  # Phi-3-small
    "output_multiplier_scale",  # Grok-1
    "scale_logits",  # OLMo's first code
)  # fmt: skip
_NEUTRAL = (None, 0, 1)
_OTHERWISE = {"chameleon": "image tokens, which are ruled out", "prophetnet": "streams of its own that predict"}
# As transformers 5.23 has them, these let packed sequences see each other
_MASKS_WITHOUT_POSITIONS = {
    "afmoe", "bert-generation", "biogpt", "cosmos3_edge", "evolla", "falcon", "gpt_oss", "inkling2", "inkling2_text",
    "inkling_mm_model", "inkling_text", "lfm3", "lfm3_vl", "minimax", "openai-gpt", "opt", "xglm", "xlm",
}  # fmt: skip
# Names of layers that people put beside the head, for other purposes; any others are taken to be before it
_BESIDE = ("value", "v_head", "score", "critic", "reward")


def backbone_and_head(model: Any, config: Any) -> tuple[Any, Any]:
    """What the model says they are; where its name of the backbone names nothing, the only part beside the head."""
    parts = dict(model.named_children()) if isinstance(model, nn.Module) else {}
    parts = {n: part for n, part in parts.items() if not _is_beside(n) and next(part.parameters(), None) is not None}
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    backbone: Any = getattr(model, "base_model", None)
    if backbone is None or backbone is model:
        others = [part for part in parts.values() if part is not head]
        backbone = others[0] if len(others) == 1 else None
    beside = any(part is head for part in parts.values()) and backbone is not head  # no walk over all of it
    if None not in (head, backbone, config) and (beside or all(part is not head for part in backbone.modules())):
        return backbone, head
    around = [n for n, part in parts.items() if part is not head and any(inner is head for inner in part.modules())]
    way_out = f"; for text alone take model.{around[0]}" if around else ""
    raise TypeError(
        "model: expected a transformers causal language model with an output head after its backbone, "
        f"got {type(model).__name__}{way_out}"
    )


def text_config(model: Any) -> Any:
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def hidden_scale_logit_scale_softcap(config: Any, text: Any) -> tuple[float, float, float | None]:
    """Factor of the hidden states, factor of the logits, softcap; of the model's configuration and its text model's."""
    if config.model_type in _UNUSED or _transformers() < _UNUSED_BEFORE.get(config.model_type, (0,)):
        return 1.0, 1.0, None
    scale = 1.0
    for name, power in _FACTORS.items():
        value = getattr(text, name, None)
        scale *= 1.0 if value is None else float(value) ** (abs(power) if text.model_type in _MULTIPLIES else power)
    softcaps = [value for name in _SOFTCAPS if (value := getattr(text, name, None)) is not None]
    before, after = (scale, 1.0) if text.model_type in _BEFORE_THE_HEAD else (1.0, scale)
    return before, after, float(softcaps[0]) if softcaps else None


def _transformers() -> tuple[int, ...]:
    """The version that is loaded, (major, minor); without one a model is of other code, as new as can be."""
    version = getattr(sys.modules.get("transformers"), "__version__", "999.0")
    return tuple(map(int, re.findall(r"\d+", version)[:2]))


def added_by_peft(model: Any) -> str | None:
    """What the call of a PEFT model hands to its adapters, in words; but for its layers it calls the model as it is."""
    configs = getattr(model, "peft_config", None)
    if not hasattr(model, "get_base_model") or not isinstance(configs, dict):
        return None
    active = [configs[name] for name in getattr(model, "active_adapters", ()) if name in configs]
    if any(getattr(config, "alora_invocation_tokens", None) for config in active):
        return "aLoRA, whose offsets"
    tuner = type(model.base_model)
    # AdaLoRA's adds to the loss alone
    known = ("peft.tuners.tuners_utils", "peft.tuners.adalora.model", nn.Module.forward.__module__)
    if tuner.forward.__module__ not in known:
        return f"{tuner.__name__}, part of whose result"
    return None


def _is_beside(name: str) -> bool:
    return any(word in name.lower() for word in _BESIDE)


def check_logits(model: Any, backbone: nn.Module, head: nn.Module, config: Any) -> None:
    """Refuse what would give other logits than the model's without a word."""
    if getattr(model.config, "is_encoder_decoder", False):
        raise TypeError(f"model: expected a causal language model without an encoder, got {type(model).__name__}")
    others = [(name, p) for name, p in _parameters_beside(model, (backbone, head)) if not _is_beside(name)]
    known = {id(p) for part in (backbone, head) if others for p in part.parameters()}
    between = [name for name, p in others if id(p) not in known]
    if between:
        raise TypeError(
            "model: expected one whose linear head comes right after its backbone, "
            f"got {type(model).__name__}, which has {between[0]} beside them"
        )
    values = {name: getattr(config, name, None) for name in _OTHERS}
    changing = [f"{name}={value!r}" for name, value in values.items() if value is True or value not in _NEUTRAL]
    width = getattr(config, "hidden_size", None)
    if getattr(config, "dim_model_base", width) != width and not hasattr(config, "logits_scaling"):  # MiniCPM 1 and 2
        changing.append(f"dim_model_base={config.dim_model_base!r}")
    rows, padded = getattr(config, "unpadded_vocab_size", None), getattr(config, "vocab_size", 0)
    if rows is not None and rows < padded:  # Inkling: logits behind it are cut off
        changing.append(f"unpadded_vocab_size={rows}")
    if config.model_type in _OTHERWISE:
        changing.append(_OTHERWISE[config.model_type])
    if changing:
        raise TypeError(
            "model: expected one whose logits are those of a linear head, with a factor and a softcap that are known "
            f"here, got {type(model).__name__} with {', '.join(changing)}"
        )


def _parameters_beside(module: Any, parts: tuple[Any, ...], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Those of ``module`` with their names, without a walk over ``parts``."""
    for name, parameter in module.named_parameters(prefix, recurse=False):
        yield name, parameter
    for name, child in module.named_children():
        if all(child is not part for part in parts):
            yield from _parameters_beside(child, parts, f"{prefix}.{name}" if prefix else name)


def masks_without_positions(model: Any) -> bool:
    attention = str(getattr(text_config(model), "_attn_implementation", None))
    return model.config.model_type in _MASKS_WITHOUT_POSITIONS and "flash" not in attention

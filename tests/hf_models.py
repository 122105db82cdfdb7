"""Tiny random models of the families that `ek.hf` knows: biases, softcaps, scales, tied embeddings among them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
GROUPED = {**SIZES, "num_key_value_heads": 2}
SMALL = {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
LATENT = {
    "num_key_value_heads": 4, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}  # fmt: skip
MAMBA = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8}
INKLING = {
    "head_dim": 8, "swa_head_dim": 8, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "d_rel": 4,
    "rel_extent": 16, "moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "n_shared_experts": 1,
}  # fmt: skip
EXPERTS = {
    "num_experts_per_tok": 1, "num_local_experts": 2, "intermediate_size_mlp": 48, "head_dim": 8,
    "interleave_moe_layer_step": 2,
}  # fmt: skip
MPT = {"vocab_size": 97, "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64}
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", GROUPED),
    "llama, tied": ("LlamaConfig", "LlamaForCausalLM", {**GROUPED, "tie_word_embeddings": True}),
    "mistral": ("MistralConfig", "MistralForCausalLM", GROUPED),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", GROUPED),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {**GROUPED, "head_dim": 8}),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", {**GROUPED, "head_dim": 8, "final_logit_softcapping": 0.5}),
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", {**GROUPED, "head_dim": 8, "final_logit_softcapping": 0.5}),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", {**SMALL, "bos_token_id": 1, "eos_token_id": 2}),
    "gpt-neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", SIZES),
    "granite": ("GraniteConfig", "GraniteForCausalLM", {**GROUPED, "logits_scaling": 4.0}),
    "hyperclovax": ("HyperCLOVAXConfig", "HyperCLOVAXForCausalLM", {**GROUPED, "logits_scaling": 0.25}),
    "minicpm3": ("MiniCPM3Config", "MiniCPM3ForCausalLM", {**SIZES, **LATENT, "dim_model_base": 8}),
    "falcon-h1": ("FalconH1Config", "FalconH1ForCausalLM", {**GROUPED, **MAMBA, "lm_head_multiplier": 0.25}),
    "inkling": ("InklingTextConfig", "InklingForCausalLM", {**GROUPED, **INKLING, "logits_mup_width_multiplier": 4.0}),
    "recurrent-gemma": (
        "RecurrentGemmaConfig",
        "RecurrentGemmaForCausalLM",
        {**GROUPED, "num_hidden_layers": 3, "lru_width": 32, "attention_window_size": 16, "logits_soft_cap": 0.5},
    ),
    "nanochat": ("NanoChatConfig", "NanoChatForCausalLM", {**GROUPED, "final_logit_softcapping": 0.5}),
    "mpt, unused scale": ("MptConfig", "MptForCausalLM", {**MPT, "logit_scale": 0.25}),
    "cohere": ("CohereConfig", "CohereForCausalLM", {**GROUPED, "logit_scale": 0.25}),
    "llama4": ("Llama4TextConfig", "Llama4ForCausalLM", {**GROUPED, **EXPERTS}),
    "phi, with bias": ("PhiConfig", "PhiForCausalLM", SIZES),
}


IMAGES = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
SIGLIP = {"model_type": "siglip_vision_model", **IMAGES}
CAPPED = {**GROUPED, "head_dim": 8, "final_logit_softcapping": 0.5}
COHERE2 = {"model_type": "cohere2", **GROUPED, "logit_scale": 0.25}
#: What differs too much from the families above for their tests: models of images, which take text as well, and others
#: with tests of their own.
OTHERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gemma3, images": (
        "Gemma3Config", "Gemma3ForConditionalGeneration",
        {"text_config": CAPPED, "vision_config": IMAGES, "mm_tokens_per_image": 4, "image_token_id": 95,
         "boi_token_id": 94, "eoi_token_id": 93},
    ),
    "paligemma": (
        "PaliGemmaConfig", "PaliGemmaForConditionalGeneration",
        {"text_config": {"model_type": "gemma2", **CAPPED}, "vision_config": SIGLIP, "image_token_index": 95,
         "projection_dim": 32},
    ),
    "cohere2, images": (
        "Cohere2VisionConfig", "Cohere2VisionForConditionalGeneration",
        {"text_config": COHERE2, "vision_config": SIGLIP, "image_token_id": 95, "alignment_intermediate_size": 32},
    ),
    "aya": (
        "AyaVisionConfig", "AyaVisionForConditionalGeneration",
        {"text_config": COHERE2, "vision_config": SIGLIP, "image_token_index": 95},
    ),
    "muse": (
        "MuseGlimmerConfig", "MuseGlimmerForConditionalGeneration",
        {"text_config": {**CAPPED, "output_multiplier": 0.25},
         "vision_config": {**IMAGES, "layer_types": ["full_attention"]}},
    ),
    "qwen2.5, images": (
        "Qwen2_5_VLConfig", "Qwen2_5_VLForConditionalGeneration",
        {"text_config": {**GROUPED, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4,
                                                        "mrope_section": [2, 1, 1]}},
         "vision_config": {"depth": 1, "hidden_size": 16, "num_heads": 2, "out_hidden_size": 32,
                           "intermediate_size": 16, "fullatt_block_indexes": [0]},
         "image_token_id": 92, "video_token_id": 93, "vision_start_token_id": 94, "vision_end_token_id": 95},
    ),
    "mixtral": (
        "MixtralConfig", "MixtralForCausalLM",
        {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "opt": (
        "OPTConfig", "OPTForCausalLM",
        {"vocab_size": 97, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "max_position_embeddings": 64, "word_embed_proj_dim": 32, "bos_token_id": 1, "eos_token_id": 2,
         "pad_token_id": 0},
    ),
    "bloom": (
        "BloomConfig", "BloomForCausalLM",
        {"vocab_size": 97, "hidden_size": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2},
    ),
    "gemma3, window": (
        "Gemma3TextConfig", "Gemma3ForCausalLM", {**GROUPED, "head_dim": 8, "sliding_window": 4},
    ),
    "mamba": (
        "MambaConfig", "MambaForCausalLM",
        {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8},
    ),
    "xlstm": (
        "xLSTMConfig", "xLSTMForCausalLM",
        {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_heads": 4, "output_logit_soft_cap": 0.5},
    ),
}  # fmt: skip


def make(family: str, **changes: Any) -> Any:
    config, model, options = {**FAMILIES, **OTHERS}[family]
    torch.manual_seed(0)
    made = getattr(transformers, model)(
        getattr(transformers, config)(**{**options, **changes}, attn_implementation="eager")
    )
    with torch.no_grad():
        for parameter in made.parameters():  # as they are initialised, all tokens are nearly equally likely
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made.eval()

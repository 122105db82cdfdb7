"""Heads and models that PEFT has put adapters into: ours against the materialised logits, values and gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import entropy_kernels as ek

peft = pytest.importorskip("peft", reason="peft is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

LORA = {"r": 4, "init_lora_weights": False, "task_type": "CAUSAL_LM"}
ADAPTERS: dict[str, Callable[[], Any]] = {
    "backbone": lambda: peft.LoraConfig(**LORA, target_modules=["q_proj", "v_proj"]),
    "head": lambda: peft.LoraConfig(**LORA, target_modules=["lm_head"]),
    "both": lambda: peft.LoraConfig(**LORA, target_modules=["q_proj", "lm_head"]),
    "both, DoRA": lambda: peft.LoraConfig(**LORA, target_modules=["q_proj", "lm_head"], use_dora=True),
    "trained head": lambda: peft.LoraConfig(**LORA, target_modules=["q_proj"], modules_to_save=["lm_head"]),
}


def make(adapter: str) -> Any:
    config = transformers.LlamaConfig(
        vocab_size=203, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight.normal_(std=0.5)
    return peft.get_peft_model(model, ADAPTERS[adapter]()).train()


def ids() -> Tensor:
    return torch.randint(3, 203, (3, 11), generator=torch.Generator().manual_seed(1))


def results(model: nn.Module, outputs: Any) -> dict[str, Tensor]:
    """Values, and the gradients of all that is trained."""
    model.zero_grad()
    logprob, entropy = outputs
    weights = torch.randn(2, *logprob.shape, generator=torch.Generator().manual_seed(3))
    ((logprob * weights[0]).sum() + (entropy * weights[1]).sum()).backward()
    found = {"logprob": logprob.detach(), "entropy": entropy.detach()}
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
        if parameter.grad is not None:
            found[name] = parameter.grad.clone()
    return found


def close(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=2e-5, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("budget", (1 << 30, 100_000))
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_model_with_adapters(adapter: str, budget: int) -> None:
    model, input_ids = make(adapter), ids()
    target = ek.hf.next_tokens(input_ids)
    want = results(model, ek.logprob_entropy(model(input_ids).logits, target))
    got = results(model, ek.hf.causal_lm_logprob_entropy(model, input_ids, memory_budget=budget))
    assert len(want) > 2
    close(got, want)


@pytest.mark.parametrize("adapter", ("head", "both, DoRA"))
def test_adapters_that_are_off_take_no_part(adapter: str) -> None:
    model, input_ids = make(adapter), ids()
    with torch.no_grad(), model.disable_adapter():
        want = ek.logprob_entropy(model(input_ids).logits, ek.hf.next_tokens(input_ids))
        got = ek.hf.causal_lm_logprob_entropy(model, input_ids)
    torch.testing.assert_close(tuple(got), tuple(want), rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        assert (ek.hf.causal_lm_logprob_entropy(model, input_ids).entropy - got.entropy).abs().max() > 0.1


@pytest.mark.parametrize("budget", (1 << 30, 12 * 203 * 5))
@pytest.mark.parametrize("adapter", ("head", "both, DoRA", "trained head"))
def test_a_wrapped_head(adapter: str, budget: int) -> None:
    """By itself, on hidden states of which some are ignored."""
    head = make(adapter).get_base_model().lm_head
    hidden, target = torch.randn(24, 32), torch.arange(24) * 8
    target[::5] = -100
    found = []
    for ours in (True, False):
        h = hidden.clone().requires_grad_()
        if ours:
            outputs = ek.linear_logprob_entropy(h, head, target, temperature=0.7, memory_budget=budget)
        else:
            outputs = ek.logprob_entropy(head(h), target, temperature=0.7)
        found.append(results(head, outputs) | {"hidden": h.grad})
    close(*found)


def test_virtual_tokens_are_refused() -> None:
    """They would be left out without a word."""
    base = make("backbone").unload()
    model = peft.get_peft_model(base, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(TypeError, match=r"model: expected a PEFT model with adapters in its layers, got .*PROMPT"):
        ek.hf.causal_lm_logprob_entropy(model, ids())

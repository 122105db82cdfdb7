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


def test_what_the_call_of_a_peft_model_computes_is_refused() -> None:
    """Offsets, names and scalings, which it hands to the adapters' layers."""
    config = peft.LoraConfig(**LORA, target_modules=["q_proj"], alora_invocation_tokens=[5, 6])
    alora = peft.get_peft_model(make("backbone").unload(), config)
    for model in (alora, torch.compile(alora, backend="eager")):
        with pytest.raises(TypeError, match=r"model: expected a PEFT model .*, got aLoRA, whose .* ek.logprob_entropy"):
            ek.hf.causal_lm_logprob_entropy(model, ids())
    alora.add_adapter("plain", ADAPTERS["both"]())
    alora.set_adapter("plain")
    want = results(alora, ek.logprob_entropy(alora(ids()).logits, ek.hf.next_tokens(ids())))
    close(results(alora, ek.hf.causal_lm_logprob_entropy(alora, ids())), want)
    with pytest.raises(TypeError, match=r"adapter_names: expected none, .* model\.set_adapter"):
        ek.hf.causal_lm_logprob_entropy(alora, ids(), adapter_names=["default", "plain", "plain"])
    poly = peft.get_peft_model(make("backbone").unload(), peft.PolyConfig(task_type="CAUSAL_LM", r=4, n_tasks=2))
    with pytest.raises(TypeError, match=r"model: expected a PEFT model .*, got PolyModel, .* its own call"):
        ek.hf.causal_lm_logprob_entropy(poly, ids())


@pytest.mark.parametrize(
    "config",
    (
        lambda: peft.AdaLoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], total_step=9, tinit=1, tfinal=1),
        lambda: peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=3, adapter_layers=1),
        lambda: peft.IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj"], feedforward_modules=[]),
    ),
    ids=("AdaLoRA, which adds to the loss alone", "adaption prompt", "IA3"),
)
def test_adapters_of_other_kinds(config: Callable[[], Any]) -> None:
    model = peft.get_peft_model(make("backbone").unload(), config())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1) if parameter.requires_grad else None
        want = ek.logprob_entropy(model(ids()).logits, ek.hf.next_tokens(ids()))
        got = ek.hf.causal_lm_logprob_entropy(model, ids())
    torch.testing.assert_close(tuple(got), tuple(want), rtol=1e-5, atol=1e-5)

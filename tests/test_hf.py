"""Hugging Face models: our op in place of the head against the model's own logits; packed sequences leak no label."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import entropy_kernels as ek

transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
GROUPED = {**SIZES, "num_key_value_heads": 2}
SMALL = {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
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
    "cohere": ("CohereConfig", "CohereForCausalLM", {**GROUPED, "logit_scale": 0.25}),
    "phi, with bias": ("PhiConfig", "PhiForCausalLM", SIZES),
}


def make(family: str) -> Any:
    config, model, options = FAMILIES[family]
    torch.manual_seed(0)
    made = getattr(transformers, model)(getattr(transformers, config)(**options, attn_implementation="eager"))
    with torch.no_grad():
        for parameter in made.parameters():  # as they are initialised, all tokens are nearly equally likely
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made.eval()


def ids(*shape: int) -> Tensor:
    return torch.randint(3, 97, shape, generator=torch.Generator().manual_seed(1))


def expected(model: Any, input_ids: Tensor, target: Tensor, temperature: float = 1.0, **options: Any) -> list[Tensor]:
    logp = torch.log_softmax(model(input_ids, **options).logits.double() / temperature, -1)
    valid = target >= 0
    logprob = logp.gather(-1, target.clamp(min=0)[..., None])[..., 0]
    return [torch.where(valid, x, 0) for x in (logprob, -(logp.exp() * logp).sum(-1))]


def weigh(outputs: Any) -> Tensor:
    logprob, entropy = outputs
    weights = torch.randn(2, *logprob.shape, generator=torch.Generator().manual_seed(3))
    return (logprob * weights[0]).sum() + (entropy * weights[1]).sum()


@pytest.mark.parametrize("family", FAMILIES)
def test_values_and_parameter_gradients(family: str) -> None:
    model, input_ids = make(family), ids(3, 11)
    mask = torch.ones_like(input_ids)
    mask[1, 7:] = 0  # right padding
    target = ek.hf.next_tokens(input_ids, attention_mask=mask)
    assert (target[1, 6:] == -100).all() and (target[:, -1] == -100).all()
    other = copy.deepcopy(model)
    got = ek.hf.causal_lm_logprob_entropy(model, input_ids, attention_mask=mask, temperature=0.7)
    want = expected(other, input_ids, target, 0.7, attention_mask=mask)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)
    weigh(got).backward()
    weigh(want).backward()
    for (name, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        assert b.grad is not None and a.grad is not None, name
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=2e-5, msg=lambda text, n=name: f"{n}: {text}")


def test_a_dropped_softcap_or_scale_would_show() -> None:
    for family, attribute, neutral in (("gemma2", "final_logit_softcapping", None), ("granite", "logits_scaling", 1.0)):
        model, input_ids = make(family), ids(2, 7)
        want = expected(model, input_ids, ek.hf.next_tokens(input_ids))
        setattr(model.config, attribute, neutral)
        got = ek.hf.causal_lm_logprob_entropy(model, input_ids)
        assert (got.entropy.double() - want[1]).abs().max() > 1e-3


@pytest.mark.parametrize("how", ["subclass", "hooked"])
def test_a_head_that_is_more_than_its_weight(how: str) -> None:
    """Its forward is what counts: quantised and adapted heads are classes of their own, offloading replaces it."""
    model, input_ids = make("llama"), ids(2, 7)
    head = model.lm_head
    if how == "subclass":

        class Doubled(torch.nn.Linear):
            def forward(self, hidden: Tensor) -> Tensor:
                return 2 * super().forward(hidden)

        head.__class__ = Doubled
    else:
        plain = head.forward
        head.forward = lambda hidden: 2 * plain(hidden)
    got = ek.hf.causal_lm_logprob_entropy(model, input_ids)
    want = expected(model, input_ids, ek.hf.next_tokens(input_ids))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


def test_gradient_checkpointing() -> None:
    model, input_ids = make("llama"), ids(2, 9)
    weigh(ek.hf.causal_lm_logprob_entropy(model, input_ids)).backward()
    plain = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    model.gradient_checkpointing_enable()
    model.train()
    weigh(ek.hf.causal_lm_logprob_entropy(model, input_ids)).backward()
    for a, b in zip(plain, model.parameters(), strict=True):
        torch.testing.assert_close(a, b.grad)


@pytest.mark.parametrize("given", ["cu_seqlens", "position_ids"])
def test_packed_sequences_are_as_if_alone(given: str) -> None:
    model = make("llama")
    model.config._attn_implementation = "sdpa"
    sequences = [ids(1, length) for length in (5, 1, 9)]
    packed = torch.cat(sequences, 1)
    if given == "cu_seqlens":
        options = {"cu_seqlens": torch.tensor([0, 5, 6, 15], dtype=torch.int32)}
    else:
        options = {"position_ids": torch.cat([torch.arange(s.shape[1]) for s in sequences])[None]}
    got = ek.hf.causal_lm_logprob_entropy(model, packed, **options)
    alone = [ek.hf.causal_lm_logprob_entropy(model, sequence) for sequence in sequences]
    for i in range(2):
        torch.testing.assert_close(got[i], torch.cat([outputs[i] for outputs in alone], 1), rtol=1e-5, atol=1e-5)
    assert got.logprob[0, [4, 5, 14]].abs().sum() == 0


class TestNextTokens:
    def test_one_row(self) -> None:
        assert ek.hf.next_tokens(torch.tensor([5, 6, 7])).tolist() == [6, 7, -100]

    def test_padding_on_either_side(self) -> None:
        mask = torch.tensor([[0, 0, 1, 1, 1, 0]])
        target = ek.hf.next_tokens(torch.tensor([[9, 9, 5, 6, 7, 9]]), attention_mask=mask)
        assert target.tolist() == [[-100, -100, 6, 7, -100, -100]]

    @pytest.mark.parametrize("ends", [[0, 2, 5, 7], [0, 2, 2, 5, 7, 7], [0, 2, 5]], ids=str)
    def test_cu_seqlens(self, ends: list[int]) -> None:
        """Empty sequences count for nothing; what no sequence holds is padding."""
        target = ek.hf.next_tokens(torch.arange(7), cu_seqlens=torch.tensor(ends, dtype=torch.int32))
        want = [1, -100, 3, 4, -100, 6, -100]
        if ends[-1] == 5:
            want[5:] = [-100, -100]
        assert target.tolist() == want

    def test_position_ids(self) -> None:
        target = ek.hf.next_tokens(torch.arange(6)[None], position_ids=torch.tensor([[0, 1, 2, 0, 0, 1]]))
        assert target.tolist() == [[1, 2, -100, -100, 5, -100]]

    def test_nothing(self) -> None:
        assert ek.hf.next_tokens(torch.empty(2, 0, dtype=torch.int64)).shape == (2, 0)

    def test_errors(self) -> None:
        with pytest.raises(TypeError, match=r"input_ids: expected a tensor of integers, got torch\.float32"):
            ek.hf.next_tokens(torch.zeros(3))
        with pytest.raises(ValueError, match="attention_mask: expected input_ids's shape"):
            ek.hf.next_tokens(torch.arange(3), attention_mask=torch.ones(4))
        with pytest.raises(ValueError, match="cu_seqlens: expected"):
            ek.hf.next_tokens(torch.ones(2, 3, dtype=torch.int64), cu_seqlens=torch.tensor([0, 3]))


def test_models_that_do_not_fit() -> None:
    model = make("llama")
    with pytest.raises(TypeError, match="model: expected a transformers causal language model"):
        ek.hf.causal_lm_logprob_entropy(model.model, ids(1, 4))
    with pytest.raises(TypeError, match="model: expected a transformers causal language model"):
        ek.hf.causal_lm_logprob_entropy(torch.nn.Linear(3, 3), ids(1, 4))
    with pytest.raises(ValueError, match="input_ids: expected"):
        ek.hf.causal_lm_logprob_entropy(model, ids(4))

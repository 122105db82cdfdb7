"""Hugging Face models: our op in place of the head against the model's own logits; packed sequences leak no label."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import entropy_kernels as ek
from entropy_kernels.integrations import hf

pytest.importorskip("transformers")

from hf_models import EXPERTS, FAMILIES, IMAGES, OTHERS, SIZES, make, transformers


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
    for family, attribute, neutral in (
        ("gemma2", "final_logit_softcapping", None),
        ("recurrent-gemma", "logits_soft_cap", 1e9),
        ("granite", "logits_scaling", 1.0),
        ("hyperclovax", "logits_scaling", 1.0),
        ("falcon-h1", "lm_head_multiplier", 1.0),
        ("inkling", "logits_mup_width_multiplier", 1.0),
    ):
        model, input_ids = make(family), ids(2, 7)
        want = expected(model, input_ids, ek.hf.next_tokens(input_ids))
        setattr(model.config, attribute, neutral)
        got = ek.hf.causal_lm_logprob_entropy(model, input_ids)
        assert (got.entropy.double() - want[1]).abs().max() > 1e-3


class Adapted(torch.nn.Module):
    """A head with an adapter beside it, whose ``weight`` is, as PEFT's, that of the layer it wraps."""

    def __init__(self, base: torch.nn.Linear) -> None:
        super().__init__()
        self.base, self.out_features = base, base.out_features
        self.down = torch.nn.Linear(base.in_features, 3, bias=False)
        self.up = torch.nn.Linear(3, base.out_features, bias=False)

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    def forward(self, hidden: Tensor) -> Tensor:
        return self.base(hidden) + self.up(self.down(hidden))


def test_an_adapter_on_the_head_is_not_passed_over() -> None:
    model, input_ids = make("llama"), ids(2, 7)
    model.lm_head = Adapted(model.lm_head)
    other = copy.deepcopy(model)
    got = ek.hf.causal_lm_logprob_entropy(model, input_ids)
    want = expected(other, input_ids, ek.hf.next_tokens(input_ids))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)
    weigh(got).backward()
    weigh(want).backward()
    for (name, a), b in zip(model.lm_head.named_parameters(), other.lm_head.parameters(), strict=True):
        assert a.grad is not None, name
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=2e-5)


def assert_parts_make_the_logits(model: Any) -> None:
    input_ids = ids(2, 7).clamp(max=90)  # no image tokens
    parts = ek.hf.causal_lm_parts(model)
    hidden = parts.backbone(input_ids, use_cache=False)[0] * parts.scale
    if isinstance(parts.weight, Tensor):
        logits = torch.nn.functional.linear(hidden, parts.weight, parts.bias)
    else:
        logits = parts.weight(hidden)
    if parts.softcap is not None:
        logits = parts.softcap * torch.tanh(logits / parts.softcap)
    torch.testing.assert_close(logits, model(input_ids, use_cache=False).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", [*FAMILIES, *OTHERS])
def test_parts_make_the_logits(family: str) -> None:
    assert_parts_make_the_logits(make(family))


@pytest.mark.parametrize("family", ["granite", "hyperclovax", "minicpm3", "inkling", "gemma2"])
def test_a_head_with_a_bias_beside_a_scale(family: str) -> None:
    """A factor of the logits is one of the bias, too; a factor of the hidden states is not."""
    model = make(family)
    model.lm_head.bias = torch.nn.Parameter(torch.randn(97))
    assert_parts_make_the_logits(model)
    input_ids, other = ids(2, 7), copy.deepcopy(model)
    weigh(ek.hf.causal_lm_logprob_entropy(model, input_ids)).backward()
    weigh(expected(other, input_ids, ek.hf.next_tokens(input_ids))).backward()
    torch.testing.assert_close(model.lm_head.bias.grad, other.lm_head.bias.grad, rtol=1e-4, atol=2e-5)
    model.lm_head = Adapted(model.lm_head)
    assert_parts_make_the_logits(model)


REFUSED = {
    "BertLMHeadModel": ("BertConfig", {**SIZES, "is_decoder": True}, "which has cls.predictions.transform"),
    "RobertaForCausalLM": ("RobertaConfig", {**SIZES, "is_decoder": True}, "which has lm_head.dense.weight beside"),
    "ElectraForCausalLM": ("ElectraConfig", {**SIZES, "is_decoder": True, "embedding_size": 32}, "which has generator"),
    "ProphetNetForCausalLM": (
        "ProphetNetConfig",
        {"vocab_size": 97, "hidden_size": 32, "num_decoder_layers": 1, "num_decoder_attention_heads": 4,
         "decoder_ffn_dim": 48},
        "with streams of its own that predict",
    ),
    "Llama4ForConditionalGeneration": (
        "Llama4Config",
        {"text_config": {**SIZES, **EXPERTS}, "vision_config": {**IMAGES, "vision_output_dim": 16}},
        r"got Llama4ForConditionalGeneration; for text alone take model.language_model",
    ),
    "LlamaForTokenClassification": ("LlamaConfig", SIZES, "with an output head .* got LlamaForTokenClassification"),
    "BartForConditionalGeneration": (
        "BartConfig",
        {"vocab_size": 97, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
         "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48},
        "expected a causal language model without an encoder",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_make_their_logits_otherwise(name: str) -> None:
    config, options, message = REFUSED[name]
    model = getattr(transformers, name)(getattr(transformers, config)(**options))
    with pytest.raises(TypeError, match=f"model: .*{message}"):
        ek.hf.causal_lm_parts(model)


class Unnamed(transformers.LlamaForCausalLM):
    """Whose class has another name for its backbone."""

    base_model_prefix = "decoder"

    def get_output_embeddings(self) -> Any:
        return self.lm_head


class Plain(torch.nn.Module):
    """Takes ids alone, and returns a tensor."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.inner(input_ids)[0]


def test_parts_are_found_whatever_they_are_called() -> None:
    model, input_ids = make("llama"), ids(2, 7)
    want = ek.hf.causal_lm_logprob_entropy(model, input_ids)
    model.__class__ = Unnamed
    model.v_head = torch.nn.Linear(32, 1)
    torch.testing.assert_close(ek.hf.causal_lm_logprob_entropy(model, input_ids), want)
    model.model = Plain(model.model)
    torch.testing.assert_close(ek.hf.causal_lm_logprob_entropy(model, input_ids), want)
    model.get_output_embeddings = lambda: None
    with pytest.raises(TypeError, match="with an output head after its backbone, got Unnamed"):
        ek.hf.causal_lm_parts(model)
    del model.get_output_embeddings
    with pytest.raises(ValueError, match="position_ids: expected None for Unnamed, whose backbone takes no position_"):
        ek.hf.causal_lm_logprob_entropy(model, input_ids, position_ids=torch.arange(7)[None])


def test_a_loss_of_experts_is_not_dropped_without_a_word() -> None:
    model, input_ids = make("mixtral"), ids(1, 7)
    want = ek.hf.causal_lm_logprob_entropy(model, input_ids, output_router_logits=False)
    with pytest.raises(TypeError, match=r"output_router_logits: expected none .* from model\(\.\.\.\)"):
        ek.hf.causal_lm_logprob_entropy(model, input_ids, output_router_logits=True)
    model.config.output_router_logits = True
    with pytest.warns(UserWarning, match="balancing loss of its experts is not computed here") as caught:
        torch.testing.assert_close(ek.hf.causal_lm_logprob_entropy(model, input_ids), want)
    assert caught[0].filename == __file__


def test_attributes_that_change_logits_otherwise() -> None:
    for name, value, neutral in (
        ("mup_width_multiplier", 8.0, 1.0),
        ("output_multiplier_scale", 0.5, 1),
        ("mup_output_alpha", 2.2, None),
        ("scale_logits", True, False),
        ("dim_model_base", 8, 32),
    ):
        model = make("llama")
        setattr(model.config, name, neutral)
        ek.hf.causal_lm_parts(model)
        setattr(model.config, name, value)
        with pytest.raises(TypeError, match=f"are known here, got LlamaForCausalLM with {name}={value}"):
            ek.hf.causal_lm_parts(model)
    model = make("inkling")
    model.config.unpadded_vocab_size = 90
    assert model(ids(1, 3).clamp(max=80)).logits.shape[-1] == 90
    with pytest.raises(TypeError, match="got InklingForCausalLM with unpadded_vocab_size=90"):
        ek.hf.causal_lm_parts(model)


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


@pytest.mark.parametrize("given", ["cu_seqlens", "(1, L)", "(4, 1, L)", "cu_seqlens beside (3, 1, L)"])
def test_packed_sequences_with_positions_in_three_axes(given: str) -> None:
    """Only positions of the text keep sequences apart there."""
    model = make("qwen2.5, images")
    sequences = [ids(1, length).clamp(max=90) for length in (5, 1, 9)]
    on = torch.cat([torch.arange(s.shape[1]) for s in sequences])[None]
    cu_seqlens = torch.tensor([0, 5, 6, 15])
    options = {
        "cu_seqlens": {"cu_seqlens": cu_seqlens},
        "(1, L)": {"position_ids": on},
        "(4, 1, L)": {"position_ids": on.expand(4, 1, -1)},
        "cu_seqlens beside (3, 1, L)": {"cu_seqlens": cu_seqlens, "position_ids": on.expand(3, 1, -1)},
    }[given]
    got = ek.hf.causal_lm_logprob_entropy(model, torch.cat(sequences, 1), **options)
    alone = [ek.hf.causal_lm_logprob_entropy(model, sequence) for sequence in sequences]
    for i in range(2):
        torch.testing.assert_close(got[i], torch.cat([outputs[i] for outputs in alone], 1), rtol=1e-5, atol=1e-5)


def test_positions_in_three_axes_as_the_model_takes_them() -> None:
    model, input_ids = make("qwen2.5, images"), ids(2, 9).clamp(max=90)
    image = torch.tensor([[0, 1, 2, 2, 2, 2, 4, 5, 6], [0, 1, 2, 2, 3, 3, 4, 5, 6], [0, 1, 2, 3, 2, 3, 4, 5, 6]])
    positions = torch.stack([image, torch.arange(9).expand(3, 9)], 1)  # (3, 2, 9)
    got = ek.hf.causal_lm_logprob_entropy(model, input_ids, position_ids=positions)
    want = expected(model, input_ids, ek.hf.next_tokens(input_ids), position_ids=positions)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["mpt, unused scale", "falcon-h1", "recurrent-gemma", "opt"])
def test_models_that_would_let_packed_sequences_see_each_other(family: str) -> None:
    model, packed = make(family), ids(1, 9)
    with pytest.raises(ValueError, match=r"cu_seqlens: expected None for \w+, whose .* rows of their own"):
        ek.hf.causal_lm_logprob_entropy(model, packed, cu_seqlens=torch.tensor([0, 4, 9]))


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

    def test_positions_of_all_rows(self) -> None:
        target = ek.hf.next_tokens(torch.arange(8).view(2, 4), position_ids=torch.tensor([[0, 1, 0, 1]]))
        assert target.tolist() == [[1, -100, 3, -100], [5, -100, 7, -100]]

    def test_positions_in_three_axes(self) -> None:
        """Text, an image of 2 × 2, text; a sequence of one token; one that begins with two frames of 1 × 2."""
        time = [0, 1, 2, 2, 2, 2, 4, 0, 0, 0, 1, 1, 2]
        height = [0, 1, 2, 2, 3, 3, 4, 0, 0, 0, 0, 0, 2]
        width = [0, 1, 2, 3, 2, 3, 4, 0, 0, 1, 0, 1, 2]
        axes, packed = torch.tensor([time, height, width])[:, None], torch.arange(13)[None]
        want = [[1, 2, 3, 4, 5, 6, -100, -100, 9, 10, 11, 12, -100]]
        assert ek.hf.next_tokens(packed, position_ids=axes).tolist() == want
        text = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 0, 0, 1, 2, 3, 4]])
        assert ek.hf.next_tokens(packed, position_ids=torch.cat([text[None], axes])).tolist() == want

    def test_nothing(self) -> None:
        assert ek.hf.next_tokens(torch.empty(2, 0, dtype=torch.int64)).shape == (2, 0)

    def test_errors(self) -> None:
        with pytest.raises(TypeError, match=r"input_ids: expected a tensor of integers, got torch\.float32"):
            ek.hf.next_tokens(torch.zeros(3))
        with pytest.raises(ValueError, match="attention_mask: expected input_ids's shape"):
            ek.hf.next_tokens(torch.arange(3), attention_mask=torch.ones(4))
        with pytest.raises(ValueError, match="attention_mask: expected a mask of 0 and 1, got 2"):
            ek.hf.next_tokens(torch.arange(3), attention_mask=torch.tensor([1, 1, 2]))  # numbers of packed sequences
        with pytest.raises(ValueError, match="cu_seqlens: expected"):
            ek.hf.next_tokens(torch.ones(2, 3, dtype=torch.int64), cu_seqlens=torch.tensor([0, 3]))
        for shape in ((4,), (2, 3), (5, 3)):
            with pytest.raises(ValueError, match=r"position_ids: expected input_ids's shape \(3,\), or 3 or 4 times"):
                ek.hf.next_tokens(torch.arange(3), position_ids=torch.zeros(shape, dtype=torch.int64))
        for wrong in (torch.empty(0, dtype=torch.int64), torch.tensor([False, True])):
            with pytest.raises(ValueError, match=r"cu_seqlens: expected \(S \+ 1,\) int"):
                ek.hf.next_tokens(torch.arange(3), cu_seqlens=wrong)

    @pytest.mark.parametrize(
        ("ends", "got"),
        [
            ([0, 2, 8], "0 to 8"),
            ([1, 2, 7], "1 to 7"),
            ([-1, 2, 7], "-1 to 7"),
            ([0, 5, 2, 7], "5 before 2"),
            ([0, 9, 7], "9 before 7"),
        ],
        ids=str,
    )
    def test_numbers_that_bound_no_sequences(self, ends: list[int], got: str, monkeypatch: pytest.MonkeyPatch) -> None:
        cu_seqlens, packed = torch.tensor(ends, dtype=torch.int32), torch.arange(7)[None]
        message = f"cu_seqlens: expected numbers from 0 to at most L = 7 that never fall, got {got}"
        with pytest.raises(ValueError, match=message):
            ek.hf.next_tokens(packed, cu_seqlens=cu_seqlens)
        with pytest.raises(ValueError, match=message):
            ek.hf.causal_lm_logprob_entropy(make("llama"), packed, cu_seqlens=cu_seqlens, target=packed)
        monkeypatch.setattr(hf, "values_are_checked", lambda tensor: False)  # as on a GPU, where it would cost a sync
        ek.hf.next_tokens(packed, cu_seqlens=cu_seqlens)

    def test_packed_sequences_in_a_compiled_graph(self) -> None:
        compiled = torch.compile(ek.hf.next_tokens, fullgraph=True, backend="aot_eager")
        arguments = {"input_ids": torch.arange(7), "cu_seqlens": torch.tensor([0, 2, 5, 7])}
        assert compiled(**arguments).tolist() == ek.hf.next_tokens(**arguments).tolist()


def test_models_that_do_not_fit() -> None:
    model = make("llama")
    with pytest.raises(TypeError, match="model: expected a transformers causal language model"):
        ek.hf.causal_lm_parts(model.model)
    with pytest.raises(TypeError, match="model: expected a transformers causal language model"):
        ek.hf.causal_lm_logprob_entropy(torch.nn.Linear(3, 3), ids(1, 4))
    with pytest.raises(ValueError, match="input_ids: expected"):
        ek.hf.causal_lm_logprob_entropy(model, ids(4))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temprature": 0.1}, "temprature: expected .* did you mean temperature"),
        ({"labels": torch.zeros(1, 7)}, "labels: expected an option of causal_lm_logprob_entropy"),
        ({"mask": torch.ones(1, 7)}, "mask: expected .* did you mean attention_mask"),
        ({"loss_mask": torch.ones(1, 7)}, "loss_mask: expected .* did you mean attention_mask"),
        ({"shift_labels": torch.zeros(1, 7)}, "shift_labels: expected .* did you mean target"),
        ({"label": torch.zeros(1, 7)}, "label: expected .* did you mean target"),
        ({"adapter_names": ["a"]}, r"adapter_names: expected none, .* model\.set_adapter"),
        ({"use_cache": True}, "use_cache: expected"),
        ({"softcap": 3.0}, "softcap: expected"),
        ({"cu_seqlens": [0, 7]}, "cu_seqlens: expected a torch.Tensor, got list"),
    ],
)
def test_options_that_would_be_swallowed(options: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        ek.hf.causal_lm_logprob_entropy(make("llama"), ids(1, 7), **options)


def test_a_mask_beside_packed_sequences() -> None:
    """transformers would let the sequences see each other."""
    input_ids = ids(1, 7)
    with pytest.raises(ValueError, match="attention_mask: expected None beside cu_seqlens"):
        ek.hf.causal_lm_logprob_entropy(
            make("llama"), input_ids, cu_seqlens=torch.tensor([0, 3, 7]), attention_mask=torch.ones_like(input_ids)
        )


def test_a_value_head_beside_the_head_is_nobodys_business() -> None:
    model, input_ids = make("llama"), ids(1, 7)
    want = ek.hf.causal_lm_logprob_entropy(model, input_ids)
    model.v_head = torch.nn.Linear(model.config.hidden_size, 1)
    torch.testing.assert_close(ek.hf.causal_lm_logprob_entropy(model, input_ids), want)
    model.transform = torch.nn.Linear(3, 3)
    with pytest.raises(TypeError, match=r"comes right after its backbone, .* transform\.weight beside them"):
        ek.hf.causal_lm_logprob_entropy(model, input_ids)

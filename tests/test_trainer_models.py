"""Any causal language model under the trainer: how it reads prompts, where completions end, adapters, exports."""

from __future__ import annotations

import dataclasses
import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors  # noqa: E402

from entropy_kernels.trainer import causal_lm, ppo, start  # noqa: E402
from entropy_kernels.trainer.config import TrainerConfig  # noqa: E402
from entropy_kernels.trainer.critic import critic_of  # noqa: E402
from entropy_kernels.trainer.data import Row, data_task  # noqa: E402
from entropy_kernels.trainer.encoding import Encoder, end_ids_of  # noqa: E402
from entropy_kernels.trainer.model import Policy  # noqa: E402
from entropy_kernels.trainer.start import build_policy, load_model, load_policy, word_tokenizer  # noqa: E402
from entropy_kernels.trainer.tasks import Prompt  # noqa: E402
from hf_models import make  # noqa: E402
from trainer_setup import (  # noqa: E402, F401
    SHORT,
    TINY,
    EasyTask,
    assert_same_state,
    config,
    easy,
    policy_weights,
    rows_without_times,
    trained,
)

# --- tokenizers as models have them, over bytes ----------------------------------------------------------------------

LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content | trim }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + LLAMA3
)
DEAF = LLAMA3.replace("messages %}", "messages if m.role != 'system' %}")
TURNS = ["<|system|>", "<|user|>", "<|assistant|>"]


def tokenizer_of(
    adds: str | None, *, chat: str | None = None, bos: str | None = "<s>", eos: str | None = "</s>"
) -> Any:
    """Every byte is a token; ``adds`` is what is put around a text: "<s> $A", "<s> $A </s>", or nothing."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(text, normalized=False) for text in ("<s>", "</s>", "<|eot|>", *TURNS)])
    if adds is not None:
        special = [(text, inner.token_to_id(text)) for text in ("<s>", "</s>")]
        inner.post_processor = processors.TemplateProcessing(single=adds, special_tokens=special)
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, bos_token=bos, eos_token=eos)
    made.chat_template = chat
    return made


def read(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids))


@pytest.mark.parametrize(
    ("adds", "text", "expected"),
    [
        ("<s> $A", "a b", "<s>a b"),  # Llama
        ("<s> $A", "<s>a b", "<s>a b"),
        ("<s> $A </s>", "a b", "<s>a b"),  # add_eos_token
        (None, "a b", "a b"),  # GPT-2, Qwen
        (None, "<s>a b", "<s>a b"),
        ("<s> $A", "", "<s>"),
    ],
)
def test_a_begin_token_comes_once_and_where_the_tokenizer_puts_it(adds: str | None, text: str, expected: str) -> None:
    tokenizer = tokenizer_of(adds)
    encoder = Encoder(tokenizer, end_ids=[tokenizer.eos_token_id])
    assert read(tokenizer, encoder.prompt_ids(text)) == expected
    assert read(tokenizer, encoder.completion_ids("c d")) == "c d</s>"


def test_a_prompt_without_a_token_is_an_error() -> None:
    with pytest.raises(ValueError, match="prompt: expected text of at least one token, got ''"):
        Encoder(tokenizer_of(None)).prompt_ids("")


def test_chats() -> None:
    tokenizer = tokenizer_of("<s> $A", chat=LLAMA3)
    encoder = Encoder(tokenizer, end_ids=tokenizer.convert_tokens_to_ids(["<|eot|>", "</s>"]))
    encoder.check()

    def shown(encoder: Encoder, prompt: Any) -> str:
        return read(tokenizer, encoder.prompt_ids(prompt))

    turns = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "yo"},
        {"role": "user", "content": "?"},
    ]
    asked = "<s><|user|>hi<|eot|><|assistant|>"
    assert shown(encoder, "hi") == asked
    assert shown(encoder, turns) == asked + "yo<|eot|><|user|>?<|eot|><|assistant|>"
    assert read(tokenizer, encoder.completion_ids("yo")) == "yo<|eot|>"
    told = Encoder(tokenizer, system_prompt="Be brief.")
    told.check()
    assert shown(told, "hi") == "<s><|system|>Be brief.<|eot|>" + asked.removeprefix("<s>")
    own = [{"role": "system", "content": "Sing."}, *turns[:1]]
    assert shown(told, own) == "<s><|system|>Sing.<|eot|>" + asked.removeprefix("<s>")
    assert shown(Encoder(tokenizer, chat_template=False), "hi") == "<s>hi"
    assert turns[0] == {"role": "user", "content": "hi"} and len(own) == 2  # not changed


@pytest.mark.parametrize(
    ("chat", "options", "prompt", "message"),
    [
        (NO_SYSTEM, {"system_prompt": "x"}, None, r"system_prompt: expected .* refuses \(System role not supported\)"),
        (DEAF, {"system_prompt": "x"}, None, r"system_prompt: .* got one that leaves it out"),
        (None, {"system_prompt": "x"}, None, r"system_prompt: expected a model whose tokenizer has a chat template"),
        (
            LLAMA3,
            {"system_prompt": "x", "chat_template": False},
            None,
            r"system_prompt: expected .*chat_template = True",
        ),
        ("{{ bos_token }}", {}, None, r"model: expected a chat template that shows the user's turn, got .*'<s>'"),
        ("{{ nothing.at.all }}", {}, None, r"prompt: expected turns that the model's chat template takes, got user \("),
        (None, {}, [{"role": "user", "content": "hi"}], r"prompt: expected text, as .*no chat template"),
        (NO_SYSTEM, {}, [{"role": "system", "content": "hi"}], r"prompt: expected turns .* got system \(System role"),
        (LLAMA3, {}, [], r"prompt: expected text or a list of messages, got \[\]"),
        (LLAMA3, {}, [{"role": "user"}], r'prompt: expected messages as \{"role": "user"'),
        (LLAMA3, {}, 3, r"prompt: expected text or a list of messages, got 3"),
    ],
)
def test_what_a_chat_template_does_not_take(chat: str | None, options: Any, prompt: Any, message: str) -> None:
    encoder = Encoder(tokenizer_of("<s> $A", chat=chat), **options)
    with pytest.raises(ValueError, match=message):
        encoder.check() if prompt is None else encoder.prompt_ids(prompt)


# --- where completions end -------------------------------------------------------------------------------------------


class Ends:
    """A model, as far as its end tokens go."""

    def __init__(self, eos: Any, rows: int = 400) -> None:
        self.generation_config = transformers.GenerationConfig(eos_token_id=eos)
        self.rows = rows

    def get_input_embeddings(self) -> Any:
        return torch.nn.Embedding(self.rows, 1)


def test_all_end_tokens() -> None:
    def ends(model: Ends, *, chat_template: bool = True, **options: Any) -> list[str]:
        tokenizer = tokenizer_of("<s> $A", **options)
        found = end_ids_of(model, tokenizer, chat_template=chat_template)
        return list(tokenizer.convert_ids_to_tokens(found))

    eos, turn = tokenizer_of(None).convert_tokens_to_ids(["</s>", "<|eot|>"])
    assert ends(Ends(None)) == ["</s>"]
    assert ends(Ends(turn)) == ["</s>", "<|eot|>"]
    assert ends(Ends([turn, eos, turn])) == ["</s>", "<|eot|>"]
    assert ends(Ends([eos, turn]), chat=LLAMA3) == ["<|eot|>", "</s>"]  # a demonstration ends as a turn does
    assert ends(Ends([eos, turn]), chat=LLAMA3, chat_template=False) == ["</s>", "<|eot|>"]
    assert ends(Ends(eos), chat=LLAMA3) == ["</s>"]  # generate() would not stop at it either
    assert ends(Ends([turn, 4000, -1]), eos=None) == ["<|eot|>"]  # rows that are not there
    assert ends(Ends(None), eos=None) == []


class Uneven(EasyTask):
    """Prompts of one to four words, and completions that may end early."""

    fixed_length = False
    max_new_tokens = 9

    def prompts(self, count: int, *, seed: int, split: str) -> list[Prompt]:  # type: ignore[override]
        rng = random.Random(f"{seed} {split}")
        return [Prompt(" ".join(str(rng.randrange(90)) for _ in range(1 + i % 4))) for i in range(count)]


WORDS = [str(i) for i in range(94)]  # with pad, begin and end the 97 rows of hf_models


def policy_of(family: str = "llama", **changes: Any) -> Policy:
    model = make(family)
    model.generation_config.eos_token_id = [2, 96]
    settings = dataclasses.replace(TINY, model=".", **changes)
    return start._finish(model, word_tokenizer(WORDS, end=True), settings, Uneven())


def sampled(policy: Policy, **options: Any) -> Any:
    prompts = policy.encode(["1 2", "3", "4 5 6 7"] * 20)
    return policy.sample(
        prompts, **{"max_new_tokens": 40, "temperature": 1.0, "generator": torch.Generator().manual_seed(0), **options}
    )


def test_completions_end_at_any_end_token() -> None:
    policy = policy_of()
    assert policy.end_ids == (96, 2)
    drawn = sampled(policy)
    last = drawn.ids[torch.arange(60), drawn.mask.sum(1) - 1]
    assert {96, 2} <= {*last.tolist()}
    assert torch.equal(drawn.ended, (last == 2) | (last == 96)) and 0 < drawn.ended.sum() < 60
    before = drawn.mask & (torch.arange(drawn.ids.shape[1]) < drawn.mask.sum(1)[:, None] - 1)
    assert not torch.isin(drawn.ids[before], torch.tensor(policy.end_ids)).any()
    assert bool((drawn.logprob[~drawn.mask] == 0).all())


def test_padding_with_an_end_token_masks_no_end() -> None:
    policy, other = policy_of(), policy_of()
    other.encoder.pad_id = 96
    drawn, again = sampled(policy), sampled(other)
    assert torch.equal(drawn.mask, again.mask) and torch.equal(drawn.logprob, again.logprob)
    assert policy.decode(drawn) == other.decode(again)
    ids, mask = other.encode_completions(["5 6", "7"])
    assert ids.tolist() == [[7, 8, 96], [9, 96, 96]] and mask.tolist() == [[True] * 3, [True, True, False]]


def test_a_tokenizer_and_an_embedding_of_different_sizes() -> None:
    tokenizer = word_tokenizer(WORDS, end=True)
    tokenizer.add_special_tokens({"pad_token": "[PAD]", "additional_special_tokens": ["<new>"]})  # 97 and 98
    model = make("llama")
    settings = dataclasses.replace(TINY, model=".")
    policy = start._finish(model, tokenizer, settings, Uneven())
    assert policy.encoder.pad_id == 96 and policy.encode(["1 2", "3"]).ids.max() < 97
    for make_ids in (lambda: policy.encode(["1", "2 <new>"]), lambda: policy.encode_completions(["<new>"])):
        with pytest.raises(ValueError, match=r"model: expected a row .*got 97 rows, and '<new>', token 98 of the tok"):
            make_ids()


def test_rows_that_no_token_has_are_no_text() -> None:
    few = transformers.ByT5Tokenizer(extra_ids=0)  # a slow one, which raises for ids beyond its own
    encoder = Encoder(few, end_ids=[1])
    ids = torch.tensor([[75, 76, 300, 77, 1]])
    assert encoder.decode(ids, torch.ones_like(ids).bool()) == ["HIJ"]


def test_a_tokenizer_without_an_end_token() -> None:
    settings = dataclasses.replace(TINY, model=".")
    policy = start._finish(make("llama"), word_tokenizer(WORDS), settings, Uneven())
    assert policy.end_ids == (2,)
    model = make("llama")
    model.generation_config.eos_token_id = None
    with pytest.raises(
        ValueError, match="model: expected an end token, of its tokenizer or generation config, for walk"
    ):
        start._finish(model, word_tokenizer(WORDS), settings, Uneven())
    assert build_policy(TINY, EasyTask()).end_ids == ()
    tiny = build_policy(TINY, Uneven())  # of words, with an end token
    assert tiny.tokenizer.convert_ids_to_tokens(tiny.end_ids) == ["<eos>"]


def test_a_prompt_longer_than_the_model_is_an_error() -> None:
    policy = policy_of()
    long = " ".join(["7"] * 55)
    sampled_of = policy.encode(["1", long])  # 56 tokens with the begin token; 64 positions
    options = {"temperature": 1.0, "generator": torch.Generator().manual_seed(0)}
    policy.sample(sampled_of, max_new_tokens=8, **options)
    message = (
        r"prompt: expected at most 55 tokens, as the model has 64 positions and .* 9 \(max_new_tokens\), got 56 in '"
    )
    with pytest.raises(ValueError, match=message + "<bos> 7 7"):
        policy.sample(sampled_of, max_new_tokens=9, **options)


class Chats(Uneven):
    """Prompts that are chats."""

    def prompts(self, count: int, *, seed: int, split: str) -> list[Prompt]:  # type: ignore[override]
        return [Prompt([{"role": "user", "content": "7" * (1 + i % 3)}]) for i in range(count)]  # type: ignore[arg-type]


def test_a_rollout_of_chats(tmp_path: Path) -> None:
    tokenizer = tokenizer_of("<s> $A", chat=LLAMA3)
    begin, turn = tokenizer.convert_tokens_to_ids(["<s>", "<|eot|>"])
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    llama = transformers.LlamaConfig(
        vocab_size=len(tokenizer), **shape, eos_token_id=[0, turn], initializer_range=0.001
    )
    transformers.LlamaForCausalLM(llama).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    settings = dataclasses.replace(TINY, model=str(tmp_path / "base"), system_prompt="Be brief.", prompts_per_step=4)
    policy = build_policy(settings, Chats())
    assert policy.end_ids == (turn, tokenizer.eos_token_id, 0)
    rollout = ppo.collect(policy, Chats(), settings, step=0, generator=torch.Generator().manual_seed(0))
    assert rollout.sampling_gap < 1e-5
    rows = [ids[mask] for ids, mask in zip(rollout.prompts.ids, rollout.prompts.mask.bool(), strict=True)]
    assert all(ids[0] == begin and (ids == begin).sum() == 1 for ids in rows)
    assert read(tokenizer, rows[8].tolist()) == "<s><|system|>Be brief.<|eot|><|user|>777<|eot|><|assistant|>"


# --- adapters --------------------------------------------------------------------------------------------------------

LORA: dict[str, Any] = {**SHORT, "lora_rank": 2, "warm_steps": 2, "warm_batch": 4, "save_every": 1}


@pytest.fixture(scope="module")
def lora_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory, **{**LORA, "steps": 2, "measure_memory": True})


def adapted(run: Path) -> Policy:
    """The policy at the end of a run."""
    policy = build_policy(TrainerConfig.from_json(run), EasyTask())
    policy.load_state_dict(policy_weights(run))
    return policy


def logits_of(model: Any) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(torch.tensor([[1, 5, 6, 7, 9], [1, 9, 8, 7, 20]])).logits
    return logits


def test_only_the_adapter_is_trained_and_checkpointed(lora_run: Path) -> None:
    saved = policy_weights(lora_run)
    assert all(".lora_" in name or name == "frozen_weights" for name in saved) and len(saved) == 2 * 7 + 1
    row = rows_without_times(lora_run)[0]
    assert row["head_gap"] < 1e-5 and row["grad_norm"] > 0  # type: ignore[operator]
    policy, base = adapted(lora_run), build_policy(TINY, EasyTask()).model
    assert {name for name, p in policy.model.named_parameters() if p.requires_grad} == {*saved} - {"frozen_weights"}
    assert not torch.equal(logits_of(policy.model), logits_of(base))
    with policy.model.disable_adapter():
        assert torch.equal(logits_of(policy.model), logits_of(base))


def test_the_export_is_the_merged_model_and_the_adapter_stands_beside_it(lora_run: Path) -> None:
    files = [path for path in (lora_run / "model").rglob("*") if path.is_file()]
    assert len({path.stat().st_mode for path in files}) == 1, "readable by whom its folder is"
    wanted = logits_of(adapted(lora_run).model)
    loaded, report = transformers.AutoModelForCausalLM.from_pretrained(lora_run / "model", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    torch.testing.assert_close(logits_of(loaded), wanted, rtol=0, atol=1e-5)
    base = build_policy(TINY, EasyTask()).model
    assert (logits_of(base) - wanted).abs().max() > 1e-4
    again = peft.PeftModel.from_pretrained(base, lora_run / "model" / "adapter")
    assert torch.equal(logits_of(again), wanted)


def test_saving_leaves_every_bit_and_what_is_trained_as_it_was(lora_run: Path, tmp_path: Path) -> None:
    policy = adapted(lora_run)
    before = {name: (p.clone(), p.requires_grad) for name, p in policy.model.named_parameters()}
    for _ in range(2):
        policy.save(tmp_path / "model")
    for name, p in policy.model.named_parameters():
        assert torch.equal(p, before[name][0]) and p.requires_grad == before[name][1], name
    assert policy.model.active_adapters == ["default"]
    with pytest.raises(OSError), pytest.MonkeyPatch.context() as patch:
        patch.setattr(policy._base, "save_pretrained", lambda *a, **b: (_ for _ in ()).throw(OSError("full")))
        policy.save(tmp_path / "model")
    assert all(torch.equal(p, before[name][0]) for name, p in policy.model.named_parameters())


def test_a_run_with_adapters_resumes_bit_for_bit(lora_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "halves"
    ppo.train(config(out, **{**LORA, "steps": 1, "measure_memory": True}))
    ppo.train(config(out, **{**LORA, "steps": 2, "measure_memory": True, "resume": True}))
    assert rows_without_times(out)[1:] == rows_without_times(lora_run)[1:]
    assert_same_state(lora_run, out)


def test_an_adapter_is_not_put_onto_another_model(lora_run: Path) -> None:
    saved = policy_weights(lora_run)
    for changes in ({"lora_rank": 0}, {"lora_rank": 3}, {"warm_seed": 1}, {"lora_targets": ("q_proj",)}):
        other = build_policy(dataclasses.replace(TrainerConfig.from_json(lora_run), **changes), EasyTask())  # type: ignore
        with pytest.raises(RuntimeError):
            other.load_state_dict(saved)


def test_a_start_with_an_adapter_is_a_model_for_another(lora_run: Path, tmp_path: Path) -> None:
    settings = dataclasses.replace(TrainerConfig.from_json(lora_run), warm_start_from=lora_run / "model")
    policy = load_policy(lora_run / "model", settings, EasyTask())
    torch.testing.assert_close(logits_of(policy.model), logits_of(adapted(lora_run).model), rtol=0, atol=1e-5)
    assert policy.parameters() and all(not p.any() for n, p in policy.model.named_parameters() if "lora_B" in n)


def test_an_adapters_folder_is_its_model_with_the_adapter_merged(tmp_path: Path) -> None:
    saved(make("llama").bfloat16(), tmp_path / "base")
    settings = dataclasses.replace(TINY, model=str(tmp_path / "base"), lora_rank=2)
    policy = build_policy(settings, Uneven())
    for p in policy.parameters():
        p.data.normal_(std=0.2)
    policy.save(tmp_path / "out")
    model, tokenizer = load_model(str(tmp_path / "out" / "adapter"))
    torch.testing.assert_close(logits_of(model), logits_of(policy.model), rtol=0, atol=1e-5)
    assert tokenizer.get_vocab() == policy.tokenizer.get_vocab()
    assert not any("lora" in name for name, _ in model.named_parameters())
    (tmp_path / "out" / "adapter" / "adapter_model.safetensors").write_bytes(b"{}")
    with pytest.raises(
        ValueError, match=r"model: expected an adapter that can be merged into its model, got .*adapter"
    ):
        load_model(str(tmp_path / "out" / "adapter"))


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("llama", {"lora_targets": ("q_proj", "v_prj")}, r"lora_targets: .* got 'v_prj'.*did you mean v_proj"),
        ("llama", {"lora_targets": ("norm",)}, r"lora_targets: expected layers that peft can put an adapter into \("),
        ("llama, tied", {"lora_targets": ("lm_head",)}, r"lora_targets: expected layers with a weight of their own"),
        (
            "llama, tied",
            {"lora_targets": ("embed_tokens",)},
            r"lora_targets: expected layers with a weight of their own",
        ),
    ],
)
def test_layers_that_no_adapter_fits(family: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        policy_of(family, lora_rank=2, **changes)


def test_an_adapter_of_the_head(tmp_path: Path) -> None:
    policy = policy_of("llama", lora_rank=2, lora_alpha=8.0, lora_targets=("lm_head", "q_proj"))
    assert policy.model.peft_config["default"].lora_alpha == 8
    for p in policy.parameters():
        p.data.normal_(std=0.2)
    policy.save(tmp_path / "model")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    torch.testing.assert_close(logits_of(loaded), logits_of(policy.model), rtol=0, atol=1e-5)


def test_without_peft_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"lora_rank > 0 needs peft, which is not installed: pip install .*peft"):
        build_policy(dataclasses.replace(TINY, lora_rank=2), EasyTask())


# --- families: one step each -----------------------------------------------------------------------------------------

#: Arguments, positions, caches and layers of different kinds; tests/integrations has more of them.
KINDS = ["llama, tied", "gpt2", "bloom", "opt", "gemma3, window", "mixtral", "mpt, unused scale"]


def saved(model: Any, folder: Path) -> None:
    model.save_pretrained(folder)
    word_tokenizer(WORDS, end=True).save_pretrained(folder)


def gradients_of(policy: Policy, recomputed: Callable[[], None] = lambda: None) -> list[Tensor]:
    policy.model.zero_grad()
    prompts = policy.encode(["1 2", "3", "4 5 6 7"])
    ids, mask = policy.encode_completions(["1 2 3", "4 5 6", "7 8 9"])
    outputs = policy.outputs(prompts, ids, mask)
    recomputed()
    outputs.square().sum().backward()
    return [p.grad.clone() for p in policy.parameters() if p.grad is not None]


@pytest.mark.parametrize("lora_rank", [0, 2])
@pytest.mark.parametrize("family", KINDS)
def test_a_step_of_every_kind_of_model(family: str, lora_rank: int, tmp_path: Path) -> None:
    plain, policy = (policy_of(family, lora_rank=lora_rank, gradient_checkpointing=on) for on in (False, True))
    # layers are run again in the backward pass, for the same bits
    calls: list[Any] = []
    layers = [m for m in policy._base.modules() if getattr(m, "gradient_checkpointing", False)]
    inner = [next(m for m in layer.modules() if "Attention" in type(m).__name__) for layer in layers]
    for module in inner:
        module.register_forward_hook(lambda *_: calls.append(1))
    forward: list[int] = []
    gradients = gradients_of(policy, lambda: forward.append(len(calls)))
    assert len(calls) == 2 * forward[0] > 0
    assert all(map(torch.equal, gradients, gradients_of(plain)))
    # a step: sampling and scoring agree, the update is finite, and what is saved is what was trained
    settings = dataclasses.replace(TINY, model=".", minibatches=1)
    rollout = ppo.collect(policy, Uneven(), settings, step=0, generator=torch.Generator().manual_seed(0))
    assert rollout.sampling_gap < 1e-5 and rollout.mask.sum(1).unique().numel() > 1
    before = logits_of(policy.model)
    rows = torch.arange(len(rollout.ids))
    made = ppo.update(policy, torch.optim.SGD(policy.parameters(), 0.1), rollout, rows, settings, None, seed=0)
    assert 0 < made.grad_norm < float("inf")
    after = logits_of(policy.model)
    assert torch.isfinite(after).all() and not torch.equal(before, after)
    policy.save(tmp_path / "model")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", attn_implementation="eager")
    torch.testing.assert_close(logits_of(loaded), after, rtol=0, atol=1e-5 if lora_rank else 0)


@pytest.mark.parametrize(("critic", "head"), [("shared", "linear"), ("separate", "logits")])
def test_a_critic_of_a_network_that_projects_its_states(critic: str, head: str) -> None:
    sizes = {"hidden_size": 32, "word_embed_proj_dim": 16, "ffn_dim": 48, "num_attention_heads": 2, "vocab_size": 97}
    model = transformers.OPTForCausalLM(  # as OPT-350m is
        transformers.OPTConfig(**sizes, num_hidden_layers=1, do_layer_norm_before=False, eos_token_id=2)
    )
    settings = dataclasses.replace(TINY, model=".", advantage="gae", critic=critic, head=head)
    policy = start._finish(model, word_tokenizer(WORDS, end=True), settings, Uneven())
    made = critic_of(settings, policy)
    assert made is not None and made.head.in_features == 16
    generator = torch.Generator().manual_seed(0)
    rollout = ppo.collect(policy, Uneven(), settings, step=0, generator=generator, critic=made)
    assert rollout.values is not None and rollout.values.shape == rollout.ids.shape


def test_a_critic_of_a_model_without_a_network_of_its_own_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = policy_of(head="logits")
    monkeypatch.setattr(policy.model, "get_output_embeddings", lambda: None)
    told = r"advantage: expected, for gae, a model whose network can be told from its head, got Llama.* \(.*output head"
    with pytest.raises(ValueError, match=told):
        critic_of(dataclasses.replace(TINY, advantage="gae", head="logits"), policy)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("mamba", {}, r"model: expected one that samples with a DynamicCache of transformers, got MambaForCausalLM"),
        (
            "recurrent-gemma",
            {},
            r"model: expected (log-probs that padding before|one that samples with a D).*, got Recurrent",
        ),
        (
            "falcon-h1",
            {"lora_rank": 2},
            r"lora_targets: expected layers that peft can put an adapter into \(.*out_proj",
        ),
    ],
)
def test_what_cannot_be_trained_is_refused_before(family: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        policy_of(family, **changes)


def test_a_model_whose_logits_make_no_head_is_trained_by_them(monkeypatch: pytest.MonkeyPatch) -> None:
    def headless(**changes: Any) -> Policy:
        model = make("llama")
        monkeypatch.setattr(model, "get_output_embeddings", lambda: None)
        settings = dataclasses.replace(TINY, model=".", **changes)
        return start._finish(model, word_tokenizer(WORDS, end=True), settings, Uneven())

    with pytest.raises(ValueError, match=r"model: expected .* an output head .*; head = logits takes the model's own"):
        headless()
    assert headless(head="logits").head_name == "logits"


def test_a_cache_or_padding_that_changes_log_probs_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    original = causal_lm.call

    def positions_from_zero(module: Any, **inputs: Any) -> Any:
        return original(module, **{**inputs, "position_ids": torch.arange(inputs["input_ids"].shape[1])[None]})

    for name in ("entropy_kernels.trainer.causal_lm.call", "entropy_kernels.trainer.model.call"):
        monkeypatch.setattr(name, positions_from_zero)
    with pytest.raises(
        ValueError, match=r"model: expected log-probs that (the cache|padding before a prompt) does not"
    ):
        policy_of("gpt2")


def test_arguments_that_a_forward_does_not_have() -> None:
    class Older(torch.nn.Module):
        """num_logits_to_keep, as it was called; positions from the mask."""

        def forward(self, input_ids: Tensor, num_logits_to_keep: int = 0) -> Any:
            return transformers.modeling_outputs.CausalLMOutput(logits=input_ids[:, -num_logits_to_keep:, None])

    class Oldest(torch.nn.Module):
        def forward(self, input_ids: Tensor) -> Any:
            return transformers.modeling_outputs.CausalLMOutput(logits=input_ids[..., None])

    ids = torch.arange(5)[None]
    for model in (Older(), Oldest()):
        assert causal_lm.last_logits(model, 2, input_ids=ids, position_ids=ids).flatten().tolist() == [3, 4]


def test_gradient_checkpointing_that_does_nothing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ValueError, match=r"gradient_checkpointing: expected a model that supports it \(.*does not support"
    ):
        model = make("llama")
        monkeypatch.setattr(type(model), "supports_gradient_checkpointing", False)
        causal_lm.enable_checkpointing(model)
    monkeypatch.undo()
    policy = policy_of()
    with pytest.raises(ValueError, match="gradient_checkpointing: expected a model whose layers do it, got LlamaFor"):
        causal_lm.check_policy(policy, checkpointing=True)


# --- precision, and what is exported ---------------------------------------------------------------------------------


def test_weights_saved_in_bfloat16_are_trained_and_exported_in_float32(tmp_path: Path) -> None:
    saved(make("llama, tied").bfloat16(), tmp_path / "base")
    policy = build_policy(dataclasses.replace(TINY, model=str(tmp_path / "base")), Uneven())
    assert {p.dtype for p in policy.model.parameters()} == {torch.float32}
    with torch.no_grad():
        policy.parameters()[0].add_(1e-4)  # lost in bfloat16
    policy.save(tmp_path / "model")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert loaded.dtype == torch.float32 and torch.equal(logits_of(loaded), logits_of(policy.model))
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight  # still one


def test_an_export_keeps_tokenizer_template_and_generation_config(tmp_path: Path) -> None:
    make("llama").save_pretrained(tmp_path / "base")
    tokenizer_of("<s> $A", chat=LLAMA3).save_pretrained(tmp_path / "base")
    path = tmp_path / "base" / "generation_config.json"
    given = {"eos_token_id": [2, 96], "do_sample": False, "temperature": 0.3, "top_p": 0.5}  # no valid pair
    path.write_text(json.dumps(given))
    settings = dataclasses.replace(TINY, model=str(tmp_path / "base"), chat_template=False)
    build_policy(settings, Uneven()).save(tmp_path / "model")
    kept = transformers.GenerationConfig.from_pretrained(tmp_path / "model").to_dict()
    assert {name: kept[name] for name in given} == given
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    assert tokenizer.chat_template == LLAMA3 and tokenizer.pad_token is None
    assert tokenizer("a")["input_ids"] == tokenizer_of("<s> $A")("a")["input_ids"]


def test_prompts_of_data_are_measured_before_training(tmp_path: Path) -> None:
    class Data(Uneven):
        def known(self) -> list[Prompt]:  # type: ignore[override]
            return [Prompt("1 2"), Row(" ".join(["7"] * 60), {}, "rows.jsonl, line 3")]

    settings = dataclasses.replace(TINY, model=".", max_new_tokens=4)
    with pytest.raises(ValueError, match=r"at most 60 tokens, .* got 61 in '<bos> 7 .* \(rows.jsonl, line 3\)"):
        start._finish(make("llama"), word_tokenizer(WORDS, end=True), settings, Data())
    start._finish(
        make("llama"), word_tokenizer(WORDS, end=True), dataclasses.replace(settings, max_new_tokens=3), Data()
    )
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    task = data_task(dataclasses.replace(TINY, data=str(tmp_path / "rows.jsonl"), reward="exact"))
    assert sorted(prompt.text for prompt in task.known()) == ["a", "b"]


def test_a_critic_on_adapters_is_checkpointed_without_the_weights_below(tmp_path: Path) -> None:
    policy = policy_of(lora_rank=2)
    critic = critic_of(dataclasses.replace(TINY, advantage="gae", critic="separate"), policy)
    assert critic is not None
    saved = critic.state_dict()
    assert all("lora_" in name or name.startswith("head.") or name == "frozen_weights" for name in saved)
    critic.load_state_dict({name: value.clone() for name, value in saved.items()})
    with pytest.raises(RuntimeError, match="other weights"):
        critic.load_state_dict({**saved, "frozen_weights": saved["frozen_weights"] + 1})

"""Tiny GRPO runs of the real TRL on a CPU, without a network: models, words, prompts, rewards, a call for a run."""

from __future__ import annotations

import contextlib
import functools
import io
import tempfile
import warnings
from typing import Any, NamedTuple

import torch
import transformers
import trl
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor

from entropy_kernels.integrations.trl import GRPOConfig, GRPOTrainer

WORDS = 120
SIZES = {
    "vocab_size": WORDS, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
FAMILIES = {
    "llama": (transformers.LlamaConfig, {}),
    "qwen2": (transformers.Qwen2Config, {"tie_word_embeddings": True}),
    "mixtral": (
        transformers.MixtralConfig,
        {"num_local_experts": 4, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.05},
    ),
}


class Run(NamedTuple):
    trainer: Any
    log: list[dict[str, Any]]  # one entry a step
    weights: dict[str, Tensor]


@functools.cache
def tokenizer() -> transformers.PreTrainedTokenizerFast:
    words = ["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(WORDS - 3))]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


@functools.cache
def folder(family: str) -> str:
    """A saved model: TRL loads the reference by its name. Its head is sharp enough that entropies differ."""
    config, more = FAMILIES[family]
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(config(**{**SIZES, **more}))
    with torch.no_grad():
        for name, x in model.named_parameters():
            if "embed" in name or "lm_head" in name:
                x *= 12
    made = tempfile.mkdtemp()
    model.save_pretrained(made)
    tokenizer().save_pretrained(made)
    return made


def prompts(n: int = 64) -> Dataset:
    return Dataset.from_dict({"prompt": [" ".join(f"w{(7 * i + j) % 90}" for j in range(2 + i % 3)) for i in range(n)]})


def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """The share of even words, and length."""
    return [sum(x % 2 == 0 for x in ids) / len(ids) + 0.02 * len(ids) for ids in completion_ids]


def settings(output_dir: Any, **given: Any) -> dict[str, Any]:
    return {
        "output_dir": str(output_dir), "use_cpu": True, "bf16": False, "report_to": [], "logging_steps": 1,
        "per_device_train_batch_size": 8, "num_generations": 4, "max_completion_length": 8, "max_steps": 4,
        "learning_rate": 3e-3, "gradient_checkpointing": False, "save_strategy": "no", "disable_tqdm": True,
        "lr_scheduler_type": "constant", **given,
    }  # fmt: skip


OURS = ("method", "method_options", "preset", "target_entropy", "target_method", "target_observe", "plan_from",
        "fused_head")  # fmt: skip


def run(family: str = "llama", stock: bool = False, kind: Any = None, resume: Any = None, **given: Any) -> Run:
    """Train; ``stock``: by TRL's own classes, without the fields that are ours."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder(family), dtype=torch.float32)
    given.setdefault("output_dir", tempfile.mkdtemp())
    if stock:
        given = {name: value for name, value in given.items() if name not in OURS}
    config, trainer = (trl.GRPOConfig, trl.GRPOTrainer) if stock else (GRPOConfig, GRPOTrainer)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        made = (kind or trainer)(
            model=model, reward_funcs=reward, args=config(**settings(**given)), train_dataset=prompts(),
            processing_class=tokenizer(),
        )  # fmt: skip
        made.train(resume_from_checkpoint=resume)
    log = [entry for entry in made.state.log_history if "grad_norm" in entry]
    return Run(made, log, {name: x.detach().clone() for name, x in made.model.state_dict().items()})


TIMES = ("step_time",)


def differences(mine: Run, theirs: Run) -> list[str]:
    """Names of what is not equal, bit for bit: what TRL logs of each step, and the weights after."""
    found = []
    assert len(mine.log) == len(theirs.log) > 0
    for step, (x, y) in enumerate(zip(mine.log, theirs.log, strict=True)):
        found += [f"{k} of step {step}: {x.get(k)} {y[k]}" for k in y if k not in TIMES and x.get(k) != y[k]]
    return found + [name for name, x in theirs.weights.items() if not torch.equal(mine.weights[name], x)]

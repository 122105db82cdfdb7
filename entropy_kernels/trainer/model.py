"""The policy: a causal language model of transformers with its tokenizer, and the head that makes tokens' statistics.

A :class:`Policy` (start.py makes one) encodes prompts, left-padded, samples completions with a key-value cache, and
scores them. Sampling and scoring use one distribution: softmax(logits / temperature), with no truncation.
A head takes the statistics of completion tokens from hidden states (``linear``), from the model's logits (``logits``),
or from these without this library's kernels (``torch``). The gradient's graph is cut between its ``outputs``, what the
model gives at the positions that predict completion tokens, and their statistics (``ppo.backward``).
"""

from __future__ import annotations

import copy
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import entropy_kernels as ek
from entropy_kernels.losses import LOSSES
from entropy_kernels.trainer import lora
from entropy_kernels.trainer.causal_lm import (
    base_of,
    call,
    in_training_mode,
    last_logits,
    longest_of,
    new_cache,
    save_model,
    vocab_size_of,
)
from entropy_kernels.trainer.encoding import Encoder, Messages
from entropy_kernels.trainer.files import OwnFiles, as_opened, scratch_of, writing

if TYPE_CHECKING:
    from entropy_kernels.trainer.tasks import Prompt

#: Label of masked tokens: the ops return 0 for them and do not read what the model gives there.
IGNORE = -100
#: More tokens than a chat template puts around a prompt, a system prompt not counted.
_OF_TEMPLATE = 400


@dataclass
class Encoded:
    """A left-padded batch of prompts: `ids` (B, P) int64, `mask` (B, P) int64, 1 on prompt tokens."""

    ids: Tensor
    mask: Tensor

    def __getitem__(self, rows: slice | Tensor) -> Encoded:
        return Encoded(self.ids[rows], self.mask[rows])


@dataclass
class Completions:
    """Sampled completions: `ids` (B, L) int64 and `mask` (B, L) bool, True up to and including the end token; `logprob`
    and `entropy` (B, L) float32, of the distributions the tokens were drawn from, in nats, 0 where masked; `ended` (B,)
    bool, False for those that were cut off at the longest length: of completions of fixed length, none."""

    ids: Tensor
    mask: Tensor
    logprob: Tensor
    entropy: Tensor
    ended: Tensor


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
        If it has a chat template, prompts are turns of a chat.
    end_ids, system_prompt, chat_template
        As in :class:`~entropy_kernels.trainer.encoding.Encoder`.
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
        end_ids: Iterable[int] = (),
        system_prompt: str | None = None,
        chat_template: bool = True,
        head: str = "linear",
        memory_budget: int | None = None,
        mixed: bool = False,
    ) -> None:
        self.model = model
        self.encoder = Encoder(
            tokenizer, end_ids=end_ids, system_prompt=system_prompt, chat_template=chat_template,
            rows=vocab_size_of(base_of(model)),
        )  # fmt: skip
        self.mixed = mixed
        self._memory_budget = memory_budget
        self._base = base_of(model)  # an adapter is in its layers
        self._take(head)

    @property
    def tokenizer(self) -> Any:
        """That of the encoder."""
        return self.encoder.tokenizer

    @property
    def end_ids(self) -> tuple[int, ...]:
        """The tokens that end a completion; none for completions of fixed length."""
        return self.encoder.end_ids

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    @property
    def vocab_size(self) -> int:
        """Of the model's head: the logarithm of it is the largest entropy."""
        return int(self._base.config.get_text_config().vocab_size)

    def parameters(self) -> list[torch.nn.Parameter]:
        """Those that are trained: all, or the adapter's."""
        return [p for p in self.model.parameters() if p.requires_grad]

    def state_dict(self) -> dict[str, Tensor]:
        """What a checkpoint holds of the model."""
        return lora.trained_state(self.model)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of :meth:`state_dict`. Raises RuntimeError for the state of another model."""
        lora.load_trained_state(self.model, state)

    @property
    def backend(self) -> str:
        """Of this library's selection, which has torch's own operations as one of its backends."""
        return "torch" if self.head_name == "torch" else "auto"

    def with_head(self, head: str) -> Policy:
        """The same model under another head, with a clock of its own."""
        other = copy.copy(self)
        other._take(head)
        return other

    def _take(self, head: str) -> None:
        self.head_name = head
        self._head = HEADS[head](self._base, self._memory_budget)
        # sampling has the logits of one position, whatever the head
        self._sampled = HEADS["torch" if head == "torch" else "logits"](self._base, self._memory_budget)
        self.clock = OpClock(self.device)

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

    def encode(self, prompts: Sequence[str | Messages]) -> Encoded:
        """Prompts, text or chats, as left-padded ids: see :class:`~entropy_kernels.trainer.encoding.Encoder`."""
        rows = [self.encoder.prompt_ids(prompt) for prompt in prompts]
        length = max(map(len, rows))
        ids = torch.tensor([[self.encoder.pad_id] * (length - len(row)) + row for row in rows])
        lengths = torch.tensor([len(row) for row in rows])
        mask = (torch.arange(length) >= length - lengths[:, None]).long()
        return Encoded(ids.to(self.device), mask.to(self.device))

    def encode_completions(self, completions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Completions as right-padded ids (B, L) and mask (B, L) bool, with the end token where there is one."""
        rows = [self.encoder.completion_ids(text) for text in completions]
        length = max(map(len, rows))
        ids = torch.tensor([row + [self.encoder.pad_id] * (length - len(row)) for row in rows])
        lengths = torch.tensor([len(row) for row in rows])
        mask = torch.arange(length) < lengths[:, None]
        return ids.to(self.device), mask.to(self.device)

    def decode(self, completions: Completions) -> list[str]:
        """Text of completions, without special tokens."""
        return self.encoder.decode(completions.ids, completions.mask)

    def check_lengths(self, prompts: Iterable[Prompt], max_new_tokens: int) -> None:
        """Raise ValueError for the first prompt that leaves too little room for a completion."""
        longest = longest_of(self._base)
        for prompt in prompts:
            # a token is a byte at least, and a character has four at most: most need not be encoded
            if (
                longest is not None
                and 4 * len(f"{self.encoder.system_prompt}{prompt.text}") + _OF_TEMPLATE > longest - max_new_tokens
            ):
                self._check_room(self.encode([prompt.text]), max_new_tokens, getattr(prompt, "place", ""))

    def _check_room(self, prompts: Encoded, max_new_tokens: int, place: str = "") -> None:
        """Raise ValueError if a prompt and its completion would be longer than what the model was made for."""
        longest, lengths = longest_of(self._base), prompts.mask.sum(1)
        if longest is not None and prompts.ids.shape[1] + max_new_tokens > longest:
            row = int(lengths.argmax())
            text = self.tokenizer.decode(prompts.ids[row][prompts.mask[row].bool()])
            raise ValueError(
                f"prompt: expected at most {longest - max_new_tokens} tokens, as the model has {longest} positions and "
                f"completions up to {max_new_tokens} (max_new_tokens), got {int(lengths[row])} in "
                f"{text!r:.80}{place and f' ({place})'}"
            )

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
        with self.precision(), in_training_mode(self._base):
            return self._head.outputs(ids.shape[1], **model_inputs(prompts, ids, mask))

    @torch.no_grad()
    def sample(
        self, prompts: Encoded, *, max_new_tokens: int, temperature: float, generator: torch.Generator
    ) -> Completions:
        """Draw one completion per row from softmax(logits / temperature).

        `generator` must be on the model's device. Sampling ends early when every row has drawn an end token.
        """
        self._check_room(prompts, max_new_tokens)
        rows, cache = prompts.ids.shape[0], new_cache(self._base)
        attention, full = prompts.mask, bool(prompts.mask.all())
        positions = (attention.cumsum(1) - 1).clamp_min(0)
        step_ids, alive = prompts.ids, torch.ones(rows, dtype=torch.bool, device=prompts.ids.device)
        ends = torch.tensor(self.end_ids, dtype=torch.long, device=prompts.ids.device)
        ids, masks, logprobs, entropies = [], [], [], []
        for _ in range(max_new_tokens):
            with self.precision():
                logits = last_logits(
                    self._base,
                    1,
                    input_ids=step_ids,
                    attention_mask=None if full else attention,
                    position_ids=positions,
                    use_cache=True,
                    **cache,
                )[:, -1]  # (B, V)
            probabilities = torch.softmax(logits.float() / temperature, dim=-1)
            # a row with a NaN or infinity among its logits has no finite one: some token is drawn, and log-probs tell
            probabilities.masked_fill_(probabilities[:, :1].isnan(), 1.0)
            drawn = torch.multinomial(probabilities, 1, generator=generator)  # (B, 1)
            if self.end_ids:
                drawn = torch.where(alive[:, None], drawn, self.encoder.pad_id)
            with self.clock:
                scored = self._sampled.logprob_entropy(logits, _target(drawn[:, 0], alive), temperature)
            ids.append(drawn)
            masks.append(alive)
            logprobs.append(scored.logprob)
            entropies.append(scored.entropy)
            if self.end_ids:
                alive = alive & ~torch.isin(drawn[:, 0], ends)
                if not bool(alive.any()):
                    break
            attention = torch.cat([attention, masks[-1][:, None].to(attention.dtype)], dim=1)
            full = full and not self.end_ids
            positions = positions[:, -1:] + 1
            step_ids = drawn
        logprob, entropy = torch.stack(logprobs, dim=1), torch.stack(entropies, dim=1)
        ended = ~alive if self.end_ids else alive
        return Completions(torch.cat(ids, dim=1), torch.stack(masks, dim=1), logprob, entropy, ended)

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

        An adapter is merged into the weights that are written, and stands for itself in ``adapter/`` within.
        All are written before the first is replaced, and while they are there is no config.json: what is left if the
        process dies then does not pass for a model.
        """
        files.tidy()
        files.claim("config.json")
        scratch = scratch_of(files.folder / "config.json")
        shutil.rmtree(scratch, ignore_errors=True)
        try:
            with writing(files.folder):
                self._export(scratch)
            names = {str(path.relative_to(scratch)) for path in scratch.rglob("*") if path.is_file()}
            files.claim(*names)
            files.remove("config.json", *(files.names - names))
            for name in sorted(names, key=lambda name: name == "config.json"):
                (files.folder / name).parent.mkdir(parents=True, exist_ok=True)
                as_opened(scratch / name)
                os.replace(scratch / name, files.folder / name)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def _export(self, folder: Path) -> None:
        """Model and tokenizer, by their own means."""
        if self._base is self.model:
            save_model(self.model, folder)
        else:
            with lora.merged(self.model) as state:
                save_model(self._base, folder, state)
            # False: the hub is not asked whether the vocabulary has grown
            self.model.save_pretrained(folder / "adapter", save_embedding_layers=False)
        self.tokenizer.save_pretrained(folder)


def model_inputs(prompts: Encoded, ids: Tensor, mask: Tensor) -> dict[str, Tensor | None]:
    """What a model of transformers takes for prompts with their completions, `ids` and `mask` (B, L)."""
    attention = torch.cat([prompts.mask, mask.to(prompts.mask.dtype)], dim=1)
    return {
        "input_ids": torch.cat([prompts.ids, ids], dim=1),
        # a mask of ones is left out: attention then takes its causal fast path
        "attention_mask": None if bool(attention.all()) else attention,
        "position_ids": (attention.cumsum(1) - 1).clamp_min(0),
    }


def _target(ids: Tensor, mask: Tensor) -> Tensor:
    return ids.masked_fill(~mask, IGNORE)


def loss_of_stats(stats: ek.LogprobEntropy | ek.TokenStats, method: str, **options: Any) -> ek.PolicyLoss:
    """The loss named as in :func:`entropy_kernels.linear_policy_loss`, of statistics that are there already."""
    return LOSSES[method](stats.logprob, entropy=stats.entropy, **options)


class LogitsHead:
    """The model's own logits (B, L, V), raw and in its dtype. `target` (B, L): token ids, -100 where there is none."""

    def __init__(self, model: Any, memory_budget: int | None) -> None:
        self._model = model
        self._memory_budget = memory_budget

    def outputs(self, length: int, **inputs: Any) -> Tensor:
        """What the model gives at the positions that predict the last `length` tokens of its inputs: (B, L, ...)."""
        # the last position predicts nothing: a view that skips it
        return last_logits(self._model, length + 1, **inputs, use_cache=False)[:, :-1]

    def logprob_entropy(self, outputs: Tensor, target: Tensor, temperature: float) -> ek.LogprobEntropy:
        """Log-prob and entropy, differentiable; the backward pass may overwrite `outputs`."""
        return ek.logprob_entropy(outputs, target, temperature=temperature, inplace_backward=True)

    def token_stats(self, outputs: Tensor, target: Tensor, temperature: float) -> ek.TokenStats:
        """All four statistics."""
        return ek.token_stats(outputs, target, temperature=temperature)

    def policy_loss(self, outputs: Tensor, target: Tensor, temperature: float, **options: Any) -> ek.PolicyLoss:
        """The loss of `options`, see :func:`loss_of_stats`; the backward pass may overwrite `outputs`."""
        return loss_of_stats(self.logprob_entropy(outputs, target, temperature), **options)


class LinearHead(LogitsHead):
    """Hidden states (B, L, H), and this library's ops in place of the model's head: logits exist within a budget."""

    def outputs(self, length: int, **inputs: Any) -> Tensor:
        parts = ek.hf.causal_lm_parts(self._model)
        hidden = call(parts.backbone, **inputs, use_cache=False)[0][:, -length - 1 : -1]
        return hidden if parts.scale == 1 else hidden * parts.scale

    def logprob_entropy(self, outputs: Tensor, target: Tensor, temperature: float) -> ek.LogprobEntropy:
        return ek.linear_logprob_entropy(outputs, target=target, temperature=temperature, **self._head())

    def token_stats(self, outputs: Tensor, target: Tensor, temperature: float) -> ek.TokenStats:
        return ek.linear_token_stats(outputs, target=target, temperature=temperature, **self._head())

    def policy_loss(self, outputs: Tensor, target: Tensor, temperature: float, **options: Any) -> ek.PolicyLoss:
        return ek.linear_policy_loss(outputs, target=target, temperature=temperature, **self._head(), **options)

    def _head(self) -> dict[str, Any]:
        parts = ek.hf.causal_lm_parts(self._model)
        names = ("weight", "bias", "vocab_size", "softcap")
        return {"memory_budget": self._memory_budget, **{name: getattr(parts, name) for name in names}}


class TorchHead(LogitsHead):
    """The model's logits, and torch's own operations on them: what a trainer without this library does."""

    def logprob_entropy(self, outputs: Tensor, target: Tensor, temperature: float) -> ek.LogprobEntropy:
        return ek.LogprobEntropy(*self._first(self._logp(outputs, temperature), target))

    def token_stats(self, outputs: Tensor, target: Tensor, temperature: float) -> ek.TokenStats:
        logp = self._logp(outputs, temperature)
        logprob, entropy = self._first(logp, target)
        p, ignored = logp.exp(), target < 0
        collision = (p * p).sum(-1)
        covariance = logprob.exp() * (logprob + entropy) - ((p * p * logp).sum(-1) + entropy * collision)
        return ek.TokenStats(logprob, entropy, collision.masked_fill(ignored, 0), covariance.masked_fill(ignored, 0))

    @staticmethod
    def _logp(outputs: Tensor, temperature: float) -> Tensor:
        wide = outputs.to(torch.promote_types(outputs.dtype, torch.float32))
        return torch.log_softmax(wide / temperature, dim=-1)  # (B, L, V)

    @staticmethod
    def _first(logp: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        ignored = target < 0
        logprob = logp.gather(-1, target.clamp_min(0)[..., None])[..., 0]
        return logprob.masked_fill(ignored, 0), (-(logp.exp() * logp).sum(-1)).masked_fill(ignored, 0)


#: By the configuration's names.
HEADS = {"linear": LinearHead, "logits": LogitsHead, "torch": TorchHead}

"""Text and token ids: prompts as a model was taught to read them, completions with their end, and text again.

Everything that is asked of a tokenizer is asked here. With a chat template prompts are turns of a conversation, and all
special tokens are the template's. Without one they are continued as plain text, behind what the tokenizer itself puts
before a text (its begin token, if it has that habit), and never with an end token.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

from torch import Tensor

from entropy_kernels._console import one_line
from entropy_kernels.trainer.causal_lm import vocab_size_of

#: A chat, a dictionary with role and content per turn.
Messages: TypeAlias = Sequence[dict[str, Any]]

#: Stands for an answer, to see what a chat template puts behind one.
_ANSWER = "An answer: 7"


class Encoder:
    """A tokenizer, with what a policy asks of it.

    Parameters
    ----------
    tokenizer : transformers.PreTrainedTokenizerBase
        Its padding is not used.
    end_ids : sequence of int
        The tokens that end a completion, as :func:`end_ids_of` finds them; the first is put behind demonstrations. None
        for completions of fixed length.
    system_prompt : str, optional
        Text of a system turn for chats that have none.
    chat_template : bool
        False: the tokenizer's is not used.
    rows : int, optional
        Of the model's embedding, which a tokenizer may have more tokens than; None: it has not.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        end_ids: Iterable[int] = (),
        system_prompt: str | None = None,
        chat_template: bool = True,
        rows: int | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self._rows = math.inf if rows is None else rows
        self._known = 1 + max(tokenizer.get_vocab().values())  # a model may have more rows than that
        self.chats = chat_template and bool(tokenizer.chat_template)
        self.end_ids = tuple(end_ids)
        self.system_prompt = system_prompt
        #: Fills what is masked: any token of the model does.
        self.pad_id = next((i for i in (tokenizer.pad_token_id, *self.end_ids) if i is not None and i < self._rows), 0)

    def check(self) -> None:
        """Raise ValueError, with the reason, for a chat template that does not take a prompt or the system prompt."""
        if not self.chats:
            if self.system_prompt is not None:
                raise ValueError(
                    "system_prompt: expected a model whose tokenizer has a chat template, and chat_template = True, "
                    "got none; put it into the prompts"
                )
            return
        question = "A question: 7"
        shown = self._template([{"role": "user", "content": question}])
        if question not in shown:
            raise ValueError(
                f"model: expected a chat template that shows the user's turn, got one that makes {shown!r:.99} of it; "
                "chat_template = False continues prompts as plain text"
            )
        if self.system_prompt is not None and self.system_prompt.strip() not in shown:
            raise ValueError(
                "system_prompt: expected a chat template that shows the system's turn, got one that leaves it out; put "
                "it into the prompts"
            )

    def prompt_ids(self, prompt: str | Messages) -> list[int]:
        """The ids of a prompt: text, or the turns of a chat up to the one that the model is to write."""
        if self.chats:
            messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            return self._of_model([int(i) for i in self._template(messages, tokenize=True)])
        if not isinstance(prompt, str):
            raise ValueError(
                "prompt: expected text, as the model's tokenizer has no chat template or chat_template is False, got "
                f"messages ({prompt!r:.80}); give text, or take a model with a chat template"
            )
        plain = self._ids(prompt)
        begin = self._begin(prompt, plain)
        ids = plain if plain[: len(begin)] == begin else begin + plain
        if not ids:
            raise ValueError(f"prompt: expected text of at least one token, got {prompt!r}")
        return self._of_model(ids)

    def completion_ids(self, text: str) -> list[int]:
        """The ids of a completion, with the end token if there is one."""
        return self._of_model(self._ids(text)) + list(self.end_ids[:1])

    def decode(self, ids: Tensor, mask: Tensor) -> list[str]:
        """The text of completions (B, L), without special tokens."""
        kept = mask & (ids < self._known)  # rows that fill up an embedding have no text
        rows = [row[there].tolist() for row, there in zip(ids.cpu(), kept.cpu(), strict=True)]
        texts: list[str] = self.tokenizer.batch_decode(rows, skip_special_tokens=True)
        return texts

    def _of_model(self, ids: list[int]) -> list[int]:
        """The ids; ValueError for one that the model's embedding has no row for."""
        beyond = max(ids, default=0)
        if beyond >= self._rows:
            raise ValueError(
                f"model: expected a row of the embedding for every token, got {self._rows} rows, and "
                f"{self.tokenizer.convert_ids_to_tokens(beyond)!r}, token {beyond} of the tokenizer, in "
                f"{self.tokenizer.decode(ids)!r:.80}; resize the embedding, or take the token out"
            )
        return ids

    def _ids(self, text: str) -> list[int]:
        try:
            return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        except Exception as error:  # of the tokenizers library, of no narrower class
            raise ValueError(
                f"model: expected text that its tokenizer takes (the words of the task, for the tiny model), got "
                f"{text!r:.80} ({one_line(error)})"
            ) from error

    def _begin(self, text: str, plain: list[int]) -> list[int]:
        """What the tokenizer puts before a text by itself; what it may put behind it is no part of a prompt."""
        full = list(self.tokenizer(text, add_special_tokens=True)["input_ids"])
        starts = (i for i in range(len(full) - len(plain) + 1) if full[i : i + len(plain)] == plain)
        if plain:
            return full[: next(starts, 0)]
        return [i for i in full[:1] if i == self.tokenizer.bos_token_id]

    def _template(self, messages: Messages, *, tokenize: bool = False) -> Any:
        """The chat template's text, or its ids, up to where the model goes on."""
        turns = [_turn(turn) for turn in messages] if isinstance(messages, (list, tuple)) else []
        if not turns:
            raise ValueError(f"prompt: expected text or a list of messages, got {messages!r:.80}")
        given = all(turn["role"] not in ("system", "developer") for turn in turns) and self.system_prompt is not None
        if given:
            turns.insert(0, {"role": "system", "content": self.system_prompt})
        try:
            return self.tokenizer.apply_chat_template(
                turns, tokenize=tokenize, add_generation_prompt=True, return_dict=False
            )
        except Exception as error:  # whatever the template's author raises
            reason = one_line(error)
            if given:
                raise ValueError(
                    f"system_prompt: expected a chat template that takes a system turn, got one that refuses ({reason}"
                    "); put it into the prompts"
                ) from error
            roles = ", ".join(str(turn["role"]) for turn in turns)
            raise ValueError(
                f"prompt: expected turns that the model's chat template takes, got {roles} ({reason}); "
                "chat_template = False continues text as it is"
            ) from error


def _turn(turn: Any) -> dict[str, Any]:
    if isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str):
        return turn
    raise ValueError(f'prompt: expected messages as {{"role": "user", "content": "..."}}, got {turn!r:.80}')


def end_ids_of(model: Any, tokenizer: Any, *, chat_template: bool = True) -> tuple[int, ...]:
    """All tokens that end a completion: those of the generation config, and the tokenizer's end-of-sequence token.

    First the one that the chat template, if it is used, puts behind an answer, if it is among them; else the
    tokenizer's.
    """
    named = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    found = [tokenizer.eos_token_id, *(named if isinstance(named, (list, tuple)) else [named])]
    rows = vocab_size_of(model)
    ids = list(dict.fromkeys(int(i) for i in found if i is not None and 0 <= int(i) < rows))
    turn = next((i for i in _behind_an_answer(tokenizer) if chat_template and i in ids), None)
    return tuple(ids if turn is None else [turn, *(i for i in ids if i != turn)])


def _behind_an_answer(tokenizer: Any) -> list[int]:
    if not tokenizer.chat_template:
        return []
    chat = [{"role": "user", "content": "A question"}, {"role": "assistant", "content": _ANSWER}]
    try:
        text = tokenizer.apply_chat_template(chat, tokenize=False, return_dict=False)
    except Exception:  # Encoder.check tells of a template that takes no prompt
        return []
    return list(tokenizer(text.rpartition(_ANSWER)[2], add_special_tokens=False)["input_ids"])

"""samples.jsonl: what the policy answers to the first prompts of each validation, a JSON object per completion."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from entropy_kernels.trainer.files import append, write_bytes
from entropy_kernels.trainer.scoring import Unscored
from entropy_kernels.trainer.tasks import Prompt

#: In the directory of a run.
SAMPLES = "samples.jsonl"
#: Of each validation: so many prompts, the same ones every time, and at most so many completions of each.
PROMPTS, COMPLETIONS = 8, 4


@dataclass
class Answers:
    """The completions of one prompt, an entry each."""

    prompt: Prompt
    texts: Sequence[str]
    scores: Sequence[float]  # of the task's verifier
    rewards: Sequence[float]  # by these: 0 or 1, or the score itself under partial_credit
    lengths: Sequence[int]  # tokens, the end token included
    truncated: Sequence[bool]  # cut off at max_new_tokens

    def lines(self) -> Iterator[dict[str, Any]]:
        """What is kept of them."""
        answers = zip(self.texts, self.scores, self.rewards, self.lengths, self.truncated, strict=True)
        for text, score, reward, length, truncated in itertools.islice(answers, COMPLETIONS):
            unscored = {"unscored": score.reason} if isinstance(score, Unscored) else {}
            yield {
                "prompt": self.prompt.text, "completion": text, "score": float(score), "reward": float(reward),
                **unscored, "length": length, "truncated": truncated,
            }  # fmt: skip


@dataclass
class Samples:
    """Those of one validation, collected as it goes on: a callable for :func:`rollout.evaluate`."""

    step: int
    validation: str  # val or final, as in the names of the log
    lines: list[dict[str, Any]] = field(default_factory=list)
    _prompts: int = 0

    def __call__(self, answers: Answers) -> None:
        if self._prompts < PROMPTS:
            about = {"step": self.step, "validation": self.validation, "prompt_number": self._prompts}
            self.lines += [{**about, **line} for line in answers.lines()]
        self._prompts += 1

    def append_to(self, path: Path) -> None:
        """Add them to a file. What a prompt holds beside text and what JSON has is written as Python shows it."""
        append(path, "".join(json.dumps(line, default=repr) + "\n" for line in self.lines))


def keep_before(path: Path, step: int) -> None:
    """Leave in a file of samples, if it is there, those of validations before `step`, which the run writes no more.

    Lines that are none stay, but for what a killed process left of its last one.
    """
    if not path.exists():
        return
    kept = [
        line for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n") and _before(line, step)
    ]
    write_bytes(path, b"".join(kept))


def _before(line: bytes, step: int) -> bool:
    try:
        at = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return True
    return type(at) is not int or at < step

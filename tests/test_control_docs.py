"""docs/control.md has the tables of the code, and its examples run."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import torch

import entropy_kernels as ek
from entropy_kernels import target_entropy
from entropy_kernels.control import METRICS
from entropy_kernels.methods import method_table

TEXT = (Path(__file__).parents[1] / "docs" / "control.md").read_text()


def test_tables() -> None:
    assert method_table() in TEXT
    for name, definition in (METRICS | target_entropy.METRICS).items():
        assert f"| `{name}` | {definition} |" in TEXT
    assert all(f"| `{name}` |" in TEXT for name in ek.methods())


def test_examples() -> None:
    examples = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    logits = torch.randn(2, 5, 11, generator=torch.Generator().manual_seed(0)).requires_grad_()
    target, advantages = torch.randint(11, (2, 5)), torch.randn(2, 1)
    old = ek.token_stats(logits.detach(), target, temperature=0.9)
    part = SimpleNamespace(
        old_logprob=old.logprob, entropy=old.entropy, vocab_covariance=old.vocab_covariance, advantages=advantages,
        mask=torch.ones(2, 5), coefficient=torch.full((2,), 0.1),
    )  # fmt: skip
    names = {
        "ek": ek, "logits": logits, "target": target, "old_logprob": old.logprob, "advantages": advantages,
        "mask": torch.ones(2, 5), "log": lambda metrics: None, "group": None, "micro_batches": [],
        "rollouts": [[part, part]], "update": lambda minibatch, control: None, "entropy_now": lambda x: x.entropy,
    }  # fmt: skip
    for example in examples:
        exec(example, names)
    assert isinstance(names["decided"], ek.Control) and isinstance(names["row"], ek.Method)
    assert names["controller"].state_dict()["calls"] == 1

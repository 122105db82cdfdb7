"""Batches as verl's workers get them, from lists of lengths: nested as its trainer v1 sends them, or padded."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor
from verl.utils import tensordict_utils as tu
from verl.workers.utils.padding import left_right_2_no_padding

VOCAB = 61


def rows(number: int, seed: int = 0, prompt: int = 4, response: int = 12, like: Any = None) -> list[dict[str, Tensor]]:
    """Rows of a rollout: a prompt, a response, and what was computed of its tokens."""
    generator = torch.Generator().manual_seed(seed)

    def length(most: int) -> int:
        return int(torch.randint(2, most + 1, (), generator=generator))

    made = []
    for i in range(number):
        n = response if i == 0 else length(response)  # the same width in every split
        mask = torch.rand(n, generator=generator) < 0.85
        mask[0] = True
        made.append({
            "prompts": torch.randint(1, VOCAB, (length(prompt),), generator=generator),
            "responses": torch.randint(1, VOCAB, (n,), generator=generator),
            "response_mask": mask.long(),
            "old_log_probs": -3 * torch.rand(n, generator=generator),
            "advantages": torch.randn(n, generator=generator),
            "ek_entropy": 2 * torch.rand(n, generator=generator),
            "ek_vocab_covariance": torch.randn(n, generator=generator),
        })  # fmt: skip
    return made


def nested(made: list[dict[str, Tensor]], **data: Any) -> TensorDict:
    """As verl's trainer v1 sends it."""
    made = [{**row, "input_ids": torch.cat([row["prompts"], row["responses"]])} for row in made]
    made = [
        {**row, "position_ids": torch.arange(len(row["input_ids"])), "loss_mask": row["response_mask"]} for row in made
    ]
    fields = {name: torch.nested.as_nested_tensor([row[name] for row in made], layout=torch.jagged) for name in made[0]}
    return tu.assign_non_tensor(TensorDict(fields, batch_size=[len(made)]), **data)


def unprocessed(made: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """In the driver of trainer v0: prompts on the left, responses on the right of the padding."""
    prompt, response = (max(len(row[name]) for row in made) for name in ("prompts", "responses"))

    def left(x: Tensor) -> Tensor:
        return torch.nn.functional.pad(x, (prompt - len(x), 0))

    def right(x: Tensor) -> Tensor:
        return torch.nn.functional.pad(x, (0, response - len(x)))

    found = {name: torch.stack([(left if name == "prompts" else right)(row[name]) for row in made]) for name in made[0]}
    found["input_ids"] = torch.cat([found["prompts"], found["responses"]], -1)
    ones = [(torch.ones_like(row["prompts"]), torch.ones_like(row["responses"])) for row in made]
    found["attention_mask"] = torch.stack([torch.cat([left(p), right(r)]) for p, r in ones])
    found["position_ids"] = (found["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    return found


def padded(made: list[dict[str, Tensor]], **data: Any) -> TensorDict:
    """As trainer v0 sends it to the workers."""
    batch = left_right_2_no_padding(TensorDict(unprocessed(made), batch_size=[len(made)]))
    return tu.assign_non_tensor(batch, **data)


def output(made: list[dict[str, Tensor]], values: list[Tensor]) -> Tensor:
    """Values of the responses' tokens where a model's output has them: one to the left, in whole sequences."""
    parts = []
    for row, value in zip(made, values, strict=True):
        before = value.new_zeros(len(row["prompts"]) - 1)
        parts.append(torch.cat([before, value, value.new_zeros(1)]))
    flat = torch.cat(parts)
    offsets = torch.tensor([0, *(len(part) for part in parts)]).cumsum(0)
    return torch.nested.nested_tensor_from_jagged(flat, offsets)

"""The runs of ``test_trl_ranks.py``, on as many processes as this is launched on: fixed completions, what came of them.

``python trl_ranks.py FOLDER CASES``: CASES is JSON, name -> configuration.
"""

from __future__ import annotations

import json
import os
import random
import sys
from typing import Any

import torch
from trl_runs import WORDS, run

from entropy_kernels.integrations.trl import GRPOTrainer

ROWS = 8  # of a rollout, on all processes


class Recorded(GRPOTrainer):
    """Keeps which tokens of which rows have lost their gradient, or are penalised."""

    def __init__(self, *args: Any, **named: Any) -> None:
        self.dropped: list[list[tuple[int, int]]] = []
        super().__init__(*args, **named, rollout_func=rollout)

    def _compute_loss(self, model: Any, inputs: Any) -> Any:
        loss = super()._compute_loss(model, inputs)
        if "ek_advantages" in inputs:
            gone = inputs["advantages"] == 0
            gone = inputs["ek_penalty"] != 0 if "ek_penalty" in inputs else gone
            gone = gone & (inputs["ek_advantages"][:, None] != 0) & (inputs["completion_mask"] != 0)
            self.dropped.append([(int(inputs["ek_row"][i]), int(j)) for i, j in gone.nonzero().tolist()])
        return loss


def rollout(prompts: list[str], trainer: Any) -> dict[str, Any]:
    """The completions of a row are those of its number and the step, whoever makes them; of unequal lengths."""
    first = trainer.accelerator.process_index * len(prompts)
    completions = []
    for row in range(first, first + len(prompts)):
        draw = random.Random(1000 * trainer.state.global_step + row)
        completions.append([draw.randrange(3, WORDS) for _ in range(2 + draw.randrange(6) + row // 3)])
    ids = trainer.processing_class(list(prompts))["input_ids"]
    return {"prompt_ids": ids, "completion_ids": completions, "logprobs": None}


def trained(folder: str, **given: Any) -> dict[str, Any]:
    rows = ROWS // int(os.environ.get("WORLD_SIZE", "1")) // given.get("gradient_accumulation_steps", 1)
    done = run(
        kind=Recorded, optim="sgd", learning_rate=0.5, max_steps=6, output_dir=f"{folder}/run",
        per_device_train_batch_size=rows, **given,
    )  # fmt: skip
    return {"weights": done.weights, "log": done.log, "dropped": done.trainer.dropped}


def main(folder: str, cases: str) -> None:
    found = {name: trained(folder, **given) for name, given in json.loads(cases).items()}
    torch.save(found, f"{folder}/{os.environ.get('RANK', '0')}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])

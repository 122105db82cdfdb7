"""What the Triton kernels of the policy loss have of their own; their values: test_policy_loss_op.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from calls import same_bits
from conftest import on_gpu
from entropy_kernels.backends.triton import policy_loss as kernels
from test_policy_loss_op import CASES, batch, check

# the interpreter is numpy, which warns of the NaN that these tests ask for
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [on_gpu("triton", "policy_loss")] if DEVICE == "cuda" else []


@pytest.mark.parametrize("tokens", [7, 5000])
@pytest.mark.parametrize("name", ["ppo", "clip-cov, quantile", "kl-cov, k3+"])
def test_sizes(name: str, tokens: int) -> None:
    check(kernels.policy_loss, CASES[name], tokens, "", DEVICE)


def test_more_blocks_than_a_program_adds_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "TOTALS_BLOCK", 2)
    check(kernels.policy_loss, CASES["clip-cov, verl"], 5000, "overflow", DEVICE)


def test_inputs_stay_and_runs_are_equal() -> None:
    case, data = CASES["clip-cov, verl"], {name: value.to(DEVICE) for name, value in batch(3000, 1, "overflow").items()}
    before = {name: value.clone() for name, value in data.items()}

    def run() -> tuple[Any, ...]:
        inputs = [data[name] for name in ("logprob", "old_logprob", "advantages", "mask")]
        return kernels.policy_loss(*inputs, *case.arguments(data))

    first, second = run(), run()
    assert all(same_bits(data[name], before[name]) for name in data)
    assert all(same_bits(a, b) for a, b in zip(first, second, strict=True))

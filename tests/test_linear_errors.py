"""Errors of the functions on hidden states: each names the argument, what was expected and what came."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.autograd import forward_ad

import entropy_kernels as ek

N, H, V = 4, 6, 11


def call(**changes: Any) -> Any:
    arguments = {"hidden": torch.randn(N, H), "weight": torch.randn(V, H), "target": torch.arange(N)} | changes
    return ek.linear_logprob_entropy(**arguments)


# name -> (what is passed, exception, argument that must be named, what must be said of what came)
ERRORS: dict[str, tuple[dict[str, Any], type[Exception], str, str]] = {
    "hidden a list": ({"hidden": [[1.0]]}, TypeError, "hidden", "list"),
    "hidden of integers": ({"hidden": torch.ones(N, H, dtype=torch.int64)}, TypeError, "hidden", "int64"),
    "hidden 0-d": ({"hidden": torch.tensor(1.0), "target": torch.tensor(0)}, ValueError, "hidden", r"\(\)"),
    "weight a list": ({"weight": [[1.0]]}, TypeError, "weight", "list"),
    "weight 1-d": ({"weight": torch.randn(H)}, ValueError, "weight", r"\(6,\)"),
    "weight transposed": ({"weight": torch.randn(H, V)}, ValueError, "weight", r"\(6, 11\)"),
    "weight of another dtype": (
        {"weight": torch.randn(V, H).bfloat16()}, TypeError, "weight", "bfloat16; cast .* torch.autocast",
    ),
    "no vocabulary": ({"weight": torch.empty(0, H)}, ValueError, "weight", "0"),
    "weight on meta": ({"weight": torch.randn(V, H, device="meta")}, ValueError, "weight", "meta"),
    "bias a number": ({"bias": 1.0}, TypeError, "bias", "float"),
    "bias too long": ({"bias": torch.randn(V + 1)}, ValueError, "bias", r"\(12,\)"),
    "bias (1, V)": ({"bias": torch.randn(1, V)}, ValueError, "bias", r"\(1, 11\)"),
    "bias of another dtype": ({"bias": torch.randn(V).double()}, TypeError, "bias", "float64"),
    "target too short": ({"target": torch.arange(N - 1)}, ValueError, "target", r"\(3,\)"),
    "target float": ({"target": torch.zeros(N)}, TypeError, "target", "float32"),
    "label V": ({"target": torch.tensor([0, V, 1, 2])}, IndexError, "target", "11"),
    "label -1": ({"target": torch.tensor([0, -1, 1, 2])}, IndexError, "target", "-1"),
    "label in the padding": ({"target": torch.tensor([0, 7, 1, 2]), "vocab_size": 7}, IndexError, "target", "7"),
    "temperature 0": ({"temperature": 0.0}, ValueError, "temperature", "0"),
    "temperature tensor with 0": ({"temperature": torch.tensor([1.0, 0, 1, 1])}, ValueError, "temperature", "0"),
    "temperature requires grad": (
        {"temperature": torch.ones((), requires_grad=True)}, ValueError, "temperature", "requires_grad=True",
    ),
    "softcap 0": ({"softcap": 0.0}, ValueError, "softcap", "0"),
    "ignore_index float": ({"ignore_index": 1.5}, TypeError, "ignore_index", "float"),
    "vocab_size beyond the weight": ({"vocab_size": V + 1}, ValueError, "vocab_size", "12"),
    "vocab_start without a group": ({"vocab_start": 3}, ValueError, "vocab_start", "3"),
    "vocab_group a number": ({"vocab_group": 2}, TypeError, "vocab_group", "int"),
    "logits_dtype fp64": ({"logits_dtype": torch.float64}, TypeError, "logits_dtype", "float64"),
    "logits_dtype a string": ({"logits_dtype": "fp32"}, TypeError, "logits_dtype", "fp32"),
    "logits_dtype an array": ({"logits_dtype": np.ones(2)}, TypeError, "logits_dtype", "1. 1."),
    "memory_budget negative": ({"memory_budget": -1}, ValueError, "memory_budget", "-1"),
    "memory_budget float": ({"memory_budget": 1e9}, TypeError, "memory_budget", "float"),
    "memory_budget too small": ({"memory_budget": 100}, ValueError, "memory_budget", "100"),
    "backend unknown": ({"backend": "numpy"}, ValueError, "backend", "numpy"),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_error_names_argument_expected_and_got(name: str) -> None:
    changes, exception, argument, got = ERRORS[name]
    with pytest.raises(exception, match=rf"(?s){argument}.*expected.*got.*{got}|{argument}.*{got}") as caught:
        call(**changes)
    assert "expected" in str(caught.value) and "got" in str(caught.value)


def test_options_are_keyword_only() -> None:
    with pytest.raises(TypeError):
        ek.linear_logprob_entropy(torch.randn(N, H), torch.randn(V, H), torch.arange(N), None, 0.7)  # type: ignore[misc]


def test_the_smallest_budget_that_is_named_works() -> None:
    for grad in (False, True):
        hidden = torch.randn(40, H, requires_grad=grad)
        weight = torch.randn(2000, H, requires_grad=grad)
        with pytest.raises(ValueError, match="memory_budget") as caught:
            call(hidden=hidden, weight=weight, target=torch.arange(40), memory_budget=100)
        least = int(str(caught.value).split("at least ")[1].split()[0])
        call(hidden=hidden, weight=weight, target=torch.arange(40), memory_budget=least)
        with pytest.raises(ValueError, match=f"got {least - 1}"):
            call(hidden=hidden, weight=weight, target=torch.arange(40), memory_budget=least - 1)


def test_no_second_derivatives() -> None:
    hidden = torch.randn(N, H, requires_grad=True)
    (gradient,) = torch.autograd.grad(call(hidden=hidden).entropy.sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match=r"linear_logprob_entropy.*double backward"):
        gradient.square().sum().backward()


@pytest.mark.parametrize("name", ("hidden", "weight", "bias", "head", "loss"))
def test_no_functional_derivatives(name: str) -> None:
    tensors = {"hidden": torch.randn(N, H), "weight": torch.randn(V, H), "bias": torch.randn(V)}
    module, batch = torch.nn.Linear(H, V), (torch.zeros(N), torch.ones(N), torch.ones(N, dtype=torch.bool))

    def by(value: torch.Tensor) -> torch.Tensor:
        if name == "head":
            return call(hidden=value, weight=module).entropy.sum()
        if name == "loss":
            target = torch.zeros(N, dtype=torch.int64)
            return ek.linear_policy_loss(value, tensors["weight"], target, *batch, method="ppo").loss
        return call(**(tensors | {name: value})).entropy.sum()

    with pytest.raises(NotImplementedError, match=r"linear_\w+.*: torch\.func's derivatives"):
        torch.func.grad(by)(tensors.get(name, tensors["hidden"]))


@pytest.mark.parametrize("name", ("hidden", "weight", "bias"))
def test_no_forward_mode(name: str) -> None:
    tensors = {"hidden": torch.randn(N, H), "weight": torch.randn(V, H), "bias": torch.randn(V)}
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(tensors[name], torch.ones_like(tensors[name]))
        with pytest.raises(NotImplementedError, match="forward-mode"):
            call(**(tensors | {name: dual}))

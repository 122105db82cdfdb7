"""Grad mode, requires_grad, inference mode, checkpoint and autocast, for every public function.

A function that is asked for no gradient gives the same values, and saves and computes nothing for one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import entropy_kernels as ek
from calls import same_bits
from entry_points import ENTRIES, Entry, H, V, tensors

pytestmark = pytest.mark.filterwarnings("ignore:entropy. expected a tensor that requires grad")
every_entry = pytest.mark.parametrize("name", ENTRIES)
every_differentiable = pytest.mark.parametrize("name", [n for n, entry in ENTRIES.items() if entry.differentiable])
every_precision = pytest.mark.parametrize("autocast", (False, True))


def given(entry: Entry, tracked: Sequence[str] = ()) -> dict[str, Any]:
    made = tensors()
    return {name: made[name].requires_grad_(name in tracked) for name in entry.arguments}


def flat(outputs: tuple[list[Tensor], list[Tensor]]) -> list[Tensor]:
    return [*outputs[0], *outputs[1]]


def upstream(outputs: Sequence[Tensor]) -> list[Tensor]:
    return [torch.linspace(-1, 2, output.numel()).view(output.shape) for output in outputs]


def gradients(entry: Entry, arguments: dict[str, Any], tracked: Sequence[str]) -> dict[str, Tensor]:
    outputs = entry.call(**arguments)
    assert all(output.requires_grad for output in outputs[0])
    assert not any(output.requires_grad for output in outputs[1])
    found = torch.autograd.grad(outputs[0], [arguments[name] for name in tracked], upstream(outputs[0]))
    return dict(zip(tracked, found, strict=True))


def precision(autocast: bool) -> Any:
    return torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext()


def assert_equal(actual: Sequence[Tensor], expected: Sequence[Tensor], what: str) -> None:
    assert len(actual) == len(expected)
    assert all(same_bits(a.detach(), b) for a, b in zip(actual, expected, strict=True)), what


@every_entry
@every_precision
def test_values_do_not_depend_on_the_grad_mode(name: str, autocast: bool) -> None:
    entry = ENTRIES[name]
    floats = [argument for argument in entry.arguments if tensors()[argument].is_floating_point()]
    saved: list[torch.Size] = []
    with (
        precision(autocast),
        torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.shape) or x, lambda x: x),
    ):
        expected = flat(entry.call(**given(entry)))
        for mode in (torch.no_grad, torch.inference_mode):
            for tracked in ((), floats):  # nobody can ask for a gradient, of a constant neither
                arguments = given(entry, tracked)
                with mode():
                    outputs = flat(entry.call(**arguments))
                assert_equal(outputs, expected, mode.__name__)
                assert not any(output.requires_grad for output in outputs)
            with mode(), torch.enable_grad():  # inside of inference mode there are no gradients either
                outputs = flat(entry.call(**given(entry)))
            assert_equal(outputs, expected, f"enable_grad in {mode.__name__}")
        assert not any(output.requires_grad for output in expected)
        assert not saved


@every_differentiable
@every_precision
def test_each_gradient_alone_equals_it_among_all(name: str, autocast: bool) -> None:
    entry = ENTRIES[name]
    with precision(autocast):
        expected = flat(entry.call(**given(entry)))
        arguments = given(entry, entry.differentiable)
        values = [output.detach() for output in flat(entry.call(**arguments))]
        torch.testing.assert_close(values, expected, rtol=1e-5, atol=1e-6)  # its tiles may be others
        together = gradients(entry, arguments, entry.differentiable)
        for argument in entry.differentiable:
            alone = gradients(entry, given(entry, [argument]), [argument])[argument]
            assert alone.dtype == tensors()[argument].dtype
            torch.testing.assert_close(alone, together[argument], rtol=1e-5, atol=1e-7, msg=argument)


@every_differentiable
@every_precision
@pytest.mark.parametrize("use_reentrant", (False, True))
def test_a_checkpoint_gives_the_same_gradients(name: str, use_reentrant: bool, autocast: bool) -> None:
    entry = ENTRIES[name]
    with precision(autocast):
        expected = gradients(entry, given(entry, entry.differentiable), entry.differentiable)
    arguments = given(entry, entry.differentiable)

    def call(*values: Tensor) -> tuple[Tensor, ...]:
        return tuple(entry.call(**dict(zip(arguments, values, strict=True)))[0])

    with precision(autocast):
        outputs = checkpoint(call, *arguments.values(), use_reentrant=use_reentrant)
    torch.autograd.backward(outputs, upstream(outputs))
    for argument, gradient in expected.items():
        torch.testing.assert_close(arguments[argument].grad, gradient, rtol=1e-5, atol=1e-7, msg=argument)


@every_entry
def test_tensors_of_inference_mode_stand_beside_tracked_ones(name: str) -> None:
    """Each alone, and all but one differentiable argument."""
    entry = ENTRIES[name]
    with torch.inference_mode():
        frozen = given(entry)
    assert_equal(flat(entry.call(**frozen)), expected := flat(entry.call(**given(entry))), "nothing tracked")
    if not entry.differentiable:
        return
    whole = gradients(entry, given(entry, entry.differentiable), entry.differentiable)
    cases = [([n for n in entry.differentiable if n != argument], [argument]) for argument in entry.arguments]
    cases += [([n], [a for a in entry.arguments if a != n]) for n in entry.differentiable]
    for tracked, inferred in cases:
        arguments = given(entry, tracked) | {argument: frozen[argument] for argument in inferred}
        module = name.endswith(("module", "function")) and {"weight", "bias"} & {*inferred} and tracked
        if module:
            with pytest.raises(ValueError, match=r"weight: expected a head whose parameters .*inference_mode"):
                entry.call(**arguments)
            continue
        assert_equal(flat(entry.call(**arguments)), expected, f"values, {inferred}")
        found = gradients(entry, arguments, tracked) if tracked else {}
        for argument, gradient in found.items():
            torch.testing.assert_close(gradient, whole[argument], rtol=1e-5, atol=1e-7, msg=f"{argument}, {inferred}")


@pytest.mark.parametrize("mode", (torch.no_grad, torch.inference_mode))
def test_a_head_is_called_once_for_each_tile_where_no_gradient_is_asked_for(mode: Any) -> None:
    """Also one that uses what its parameters() do not yield: no gradient is lost here."""
    made, calls = tensors(), []
    weight, hidden = made["weight"].requires_grad_(), made["hidden"].requires_grad_()

    def part(h: Tensor, start: int, stop: int) -> Tensor:
        calls.append((start, stop))
        return h @ weight[start:stop].t()

    with mode():
        found = ek.linear_logprob_entropy(hidden, part, made["target"], vocab_size=V)
    expected = ek.linear_logprob_entropy(hidden.detach(), weight.detach(), made["target"])
    torch.testing.assert_close(found, expected)
    assert calls == [(0, V)]
    with mode():
        torch.testing.assert_close(ek.linear_logprob_entropy(hidden, nn.Linear(H, V), made["target"])[0].shape, (3, 5))


@pytest.mark.parametrize("mode", (torch.no_grad, torch.inference_mode))
def test_results_of_a_head_that_lets_no_gradient_through_require_none(mode: Any) -> None:
    """As of logits that such a head gives; a gradient of 0 would be one that nobody notices."""
    made, linear = tensors(), nn.Linear(H, V)

    class Silent(nn.Module):
        out_features = V

        def forward(self, hidden: Tensor) -> Tensor:
            with mode():
                return linear(hidden)

    for hidden in (made["hidden"].requires_grad_(), made["hidden"].detach()):
        found = ek.linear_logprob_entropy(hidden, Silent(), made["target"])
        torch.testing.assert_close(found, ek.logprob_entropy(linear(hidden.detach()), made["target"]))
        assert not any(output.requires_grad for output in found)


def test_a_counter_made_in_inference_mode_counts_outside_of_it() -> None:
    with torch.inference_mode():
        criterion = ek.ClipCovLoss(seed=3)
    seeds = [criterion.seeds() for _ in range(2)]
    with torch.inference_mode():
        seeds.append(criterion.seeds())
    assert [int(seed) for seed in seeds] == [3, 4, 5]


def test_masks_selected_in_inference_mode_serve_a_loss_with_gradients() -> None:
    made, batch = tensors(), ek.SelectionBatch()
    with torch.inference_mode():
        batch.add(made["logprob"].clone(), made["advantages"], made["mask"].clone())
        (dropped,) = batch.clip_cov(seed=1, ratio=0.4, low=-9.0, high=9.0)
    (again,) = batch.clip_cov(seed=1, ratio=0.4, low=-9.0, high=9.0)
    assert dropped.any() and torch.equal(dropped, again)
    logprob = made["logprob"].requires_grad_()
    ek.clip_cov_loss(logprob, made["old_logprob"], made["advantages"], made["mask"], dropped=dropped).loss.backward()
    assert logprob.grad is not None and not logprob.grad[dropped].any()

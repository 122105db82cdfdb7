"""SelectionBatch: the same tokens for every split into micro-batches and, with token_index, for every padding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import entropy_kernels as ek
import reference_selection as reference
from conftest import BackendDevice

ROWS, LENGTH = 16, 50
SELECTIONS: list[tuple[str, dict[str, Any]]] = [
    ("clip_cov", {"seed": 2, "ratio": 0.01, "low": 0.2, "high": 3.0}),
    ("clip_cov", {"seed": 2, "k": 20, "low": 0.5, "high": 0.99, "band": "quantile", "closed": True}),
    ("kl_cov", {"ratio": 0.02}),
    ("kl_cov", {"k": 7}),
]


def rows(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    length = torch.randint(1, LENGTH, (ROWS, 1), generator=generator)
    return {
        "logprob": -2 * torch.rand(ROWS, LENGTH, generator=generator),
        "advantages": torch.randn(ROWS, 1, generator=generator),
        "mask": torch.arange(LENGTH) < length,
        "exclude": torch.rand(ROWS, LENGTH, generator=generator) < 0.1,
        "token_index": torch.arange(ROWS)[:, None] * 4096 + torch.arange(LENGTH),
    }


def collect(parts: list[dict[str, Tensor]], with_index: bool, backend: str = "auto") -> ek.SelectionBatch:
    selection = ek.SelectionBatch(backend=backend)
    for part in parts:
        index = part["token_index"] if with_index else None
        selection.add(part["logprob"], part["advantages"], part["mask"], index, exclude=part["exclude"])
    return selection


@pytest.mark.parametrize("micro_batches", [1, 2, 4, 8])
@pytest.mark.parametrize("with_index", [False, True])
def test_micro_batches(selection_on: BackendDevice, micro_batches: int, with_index: bool) -> None:
    if selection_on.interpreted and micro_batches not in (1, 4):
        pytest.skip("the interpreter takes a third of a second for each call")
    whole = {name: value.to(selection_on.device) for name, value in rows().items()}
    chunks = {name: value.chunk(micro_batches) for name, value in whole.items()}
    parts = [{name: chunks[name][i] for name in whole} for i in range(micro_batches)]
    selection = collect(parts, with_index, selection_on.backend)
    assert len(selection) == micro_batches
    covariance = ek.token_covariance(whole["logprob"], whole["advantages"], whole["mask"], backend="torch").cpu()
    assert torch.equal(torch.cat(selection.covariance()).cpu(), covariance)
    for method, options in SELECTIONS:
        masks = getattr(selection, method)(**options)
        assert [m.shape for m in masks] == [p["mask"].shape for p in parts]
        expected = getattr(reference, method)(
            covariance,
            whole["mask"].cpu(),
            exclude=whole["exclude"].cpu(),
            token_index=whole["token_index"].cpu() if with_index else None,
            **options,
        )
        assert int(expected.sum()) > 1 and torch.equal(torch.cat(masks).cpu(), expected)


def repad(part: dict[str, Tensor], left: int, width: int) -> dict[str, Tensor]:
    """The same tokens behind `left` columns of padding and before more, filled with what must not matter."""

    def wide(value: Tensor, fill: float) -> Tensor:
        out = value.new_full((value.shape[0], width), fill)
        out[:, left : left + value.shape[1]] = value
        return out

    fills = {"logprob": float("nan"), "mask": False, "exclude": True, "token_index": 0}
    return {n: v if n == "advantages" else wide(v, fills[n]) for n, v in part.items()}


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_split_order_and_padding(data: st.DataObject) -> None:
    whole = rows(seed=1)
    order = data.draw(st.permutations(range(ROWS)))
    cuts = sorted(data.draw(st.sets(st.integers(1, ROWS - 1), max_size=7)))
    groups = [order[a:b] for a, b in zip([0, *cuts], [*cuts, ROWS], strict=True)]
    parts = []
    for members in groups:
        width = int(whole["mask"][members].sum(1).max())  # padding to the longest of the micro-batch
        part = {n: v[members] if n == "advantages" else v[members, :width] for n, v in whole.items()}
        left = data.draw(st.integers(0, 9))
        parts.append(repad(part, left, width + left + data.draw(st.integers(0, 9))))
    base, split = collect([whole], True), collect(parts, True)
    for method, options in SELECTIONS:
        expected = whole["token_index"][getattr(base, method)(**options)[0]].sort().values
        masks = getattr(split, method)(**options)
        got = torch.cat([part["token_index"][mask] for part, mask in zip(parts, masks, strict=True)]).sort().values
        assert torch.equal(got, expected)


def test_micro_batches_of_other_shapes_and_dtypes() -> None:
    selection = ek.SelectionBatch()
    parts = [torch.randn(3, 4), torch.randn(7).bfloat16(), torch.randn(0, 5), torch.randn(2, 2, 2)]
    masks = [torch.ones(3, 4), None, None, torch.tensor(1).expand(2, 2, 2)]
    for logprob, mask in zip(parts, masks, strict=True):
        selection.add(logprob, torch.full_like(logprob, len(selection)), mask)
    covariance = selection.covariance()
    flat = torch.cat([part.float().view(-1) for part in parts])
    advantages = torch.cat([torch.full((part.numel(),), float(i)) for i, part in enumerate(parts)])
    assert torch.equal(torch.cat([c.view(-1) for c in covariance]), ek.token_covariance(flat, advantages))
    assert [mask.shape for mask in selection.kl_cov(k=4)] == [part.shape for part in parts]
    assert sum(int(mask.sum()) for mask in selection.kl_cov(k=4)) == 4


def test_nothing_added() -> None:
    selection = ek.SelectionBatch()
    assert selection.clip_cov(seed=0) == [] and selection.kl_cov() == [] and selection.covariance() == []


def test_add_after_selecting() -> None:
    selection = ek.SelectionBatch()
    selection.add(torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([1.0, 0.0, -1.0]), None)
    first = selection.kl_cov(k=1)
    selection.add(torch.tensor([-9.0]), torch.tensor([-9.0]), None)
    second = selection.kl_cov(k=1)
    assert first[0].sum() == 1 and not second[0].any() and second[1].all()


def test_no_gradient_and_no_change() -> None:
    whole = rows()
    whole["logprob"].requires_grad_()
    before = {name: value.detach().clone() for name, value in whole.items()}
    selection = collect([whole], False)
    assert not selection.covariance()[0].requires_grad and not selection.kl_cov()[0].requires_grad
    assert all(torch.equal(value, before[name]) for name, value in whole.items())


def test_errors() -> None:
    selection = ek.SelectionBatch()
    logprob, index = torch.zeros(2, 3), torch.arange(6).view(2, 3)
    selection.add(logprob, logprob, None)
    with pytest.raises(ValueError, match=r"token_index: expected for all micro-batches or for none"):
        selection.add(logprob, logprob, None, index)
    with pytest.raises(ValueError, match=r"advantages: expected logprob's shape \(2, 3\).*got \(3, 2\)"):
        selection.add(logprob, torch.zeros(3, 2), None)
    with pytest.raises(TypeError, match=r"mask: expected a torch.Tensor or None, got list"):
        selection.add(logprob, logprob, [1])  # type: ignore[arg-type]
    assert len(selection) == 1  # what was refused is not half added
    with pytest.raises(TypeError, match="token_index: expected in add"):
        selection.kl_cov(token_index=index)
    with pytest.raises(TypeError, match="seed"):
        selection.clip_cov()  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="batch_group: expected a torch"):
        ek.SelectionBatch("world")

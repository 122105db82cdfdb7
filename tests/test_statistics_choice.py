"""Statistics by name: each of the table, alone and with others, against the definitions in float64 (reference.py)."""

from __future__ import annotations

import copy
import itertools
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

import entropy_kernels as ek
from calls import bound
from cases import CASES
from conftest import BackendDevice
from entropy_kernels import reference
from entropy_kernels._rows import STATISTICS, Statistic, bits, wanted
from sample import Case

V = 700
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "all": {"temperature": 0.7, "softcap": 3.0, "ignore_index": 5, "vocab_size": 600},
}
FREE = tuple(x.name for x in STATISTICS if not x.needs_target)


def batch(device: str = "cpu", shape: tuple[int, ...] = (2, 3)) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(*shape, V, generator=generator)
    target = torch.randint(6, 600, shape, generator=generator)
    target.view(-1)[0] = 5
    return logits.to(device), target.to(device)


def expected(logits: Tensor, target: Tensor | None, name: str, **options: Any) -> Tensor:
    """Of a label that is ignored reference.py gives 0, where ours does."""
    return reference.statistics(logits, target, names=[name], **options)[name]


@pytest.mark.parametrize("statistic", STATISTICS, ids=[x.name for x in STATISTICS])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_each_alone(statistic: Statistic, options: dict[str, Any], on: BackendDevice) -> None:
    name = statistic.name
    logits, target = batch(on.device)
    leaf = logits.clone().requires_grad_()
    found = ek.token_stats(leaf, target, statistics=[name], backend=on.backend, **options)
    assert found._fields == (name,)
    value = found[0]
    torch.testing.assert_close(value.double(), expected(logits, target, name, **options), rtol=2e-5, atol=2e-5)
    assert value.requires_grad == statistic.differentiable
    upstream = torch.randn(target.shape, generator=torch.Generator().manual_seed(1)).to(on.device)
    if statistic.differentiable:
        (grad,) = torch.autograd.grad(value, leaf, upstream)
        right = reference.gradient(logits, target, {name: upstream}, **options)
        torch.testing.assert_close(grad.double(), right, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        value.mul_(2)  # is the caller's


@pytest.mark.parametrize("case", CASES, ids=str)
def test_all_of_each_case(case: Case, on: BackendDevice) -> None:
    """Within the bound of what rounding alone can do, whatever the rows hold."""
    few = case.slow_dtypes
    if on.interpreted:  # where test_token_stats_cases.py has the others
        few = (torch.float32,) if torch.float32 in few else few
    for dtype in few if on.device == "cpu" else case.dtypes:
        sample = case.build(dtype, on.device)
        found = ek.token_stats(
            sample.logits, sample.target, statistics=ek.STATISTICS, backend=on.backend, **sample.kwargs
        )
        bound(sample).check_values(**found._asdict())


@pytest.mark.parametrize("statistic", STATISTICS, ids=[x.name for x in STATISTICS])
def test_a_row_of_nothing_but_minus_infinity(statistic: Statistic, on: BackendDevice) -> None:
    logits, target = batch(on.device)
    logits[0, 1] = -torch.inf
    logits[1, 0, 7] = torch.nan
    logits[1, 2, 7] = torch.inf
    (value,) = ek.token_stats(logits, target, statistics=[statistic.name], backend=on.backend)
    assert value.isnan().tolist() == [[False, True, False], [True, False, True]]


def test_in_the_order_asked_for(on: BackendDevice) -> None:
    logits, target = batch(on.device, (2,))
    every = ek.token_stats(logits, target, statistics=ek.STATISTICS, backend=on.backend)
    assert every._fields == ek.STATISTICS
    for names in itertools.permutations(ek.STATISTICS, 2):
        found = ek.token_stats(logits, target, statistics=names, backend=on.backend)
        assert found._fields == names
        for name in names:
            torch.testing.assert_close(getattr(found, name), getattr(every, name), rtol=1e-6, atol=1e-6)
        assert type(found) is type(ek.token_stats(logits, target, statistics=[*names], backend=on.backend))
    assert isinstance(ek.token_stats(logits, target, backend=on.backend), ek.TokenStats)


@pytest.mark.parametrize("shape", ((4,), (2, 3), (2, 2, 2), (0,)), ids=str)
def test_without_labels(shape: tuple[int, ...], on: BackendDevice) -> None:
    logits, _ = batch(on.device, shape) if 0 not in shape else (torch.zeros(0, V, device=on.device), None)
    for names in (FREE, ("entropy",)):
        found = ek.token_stats(logits, None, statistics=names, ignore_index=0, backend=on.backend)
        for name, value in found._asdict().items():
            assert value.shape == shape
            torch.testing.assert_close(value.double(), expected(logits, None, name), rtol=2e-5, atol=2e-5)


def test_entropy(on: BackendDevice) -> None:
    logits, target = batch(on.device)
    for options in ({}, {"temperature": 0.7, "softcap": 3.0, "vocab_size": 600}):
        leaf = logits.clone().requires_grad_()
        value = ek.entropy(leaf, backend=on.backend, **options)
        right = ek.logprob_entropy(logits, target, backend=on.backend, **options).entropy
        torch.testing.assert_close(value, right, rtol=1e-6, atol=1e-6)
        value.sum().backward()
        ones = {"entropy": torch.ones(target.shape, device=on.device)}
        expected_grad = reference.gradient(logits, None, ones, **options)
        assert leaf.grad is not None
        torch.testing.assert_close(leaf.grad.double(), expected_grad, rtol=1e-4, atol=1e-6)


def test_linear() -> None:
    generator = torch.Generator().manual_seed(2)
    hidden, weight = torch.randn(2, 3, 16, generator=generator), torch.randn(V, 16, generator=generator)
    target = batch()[1]
    logits = hidden.double() @ weight.double().t()

    def part(states: Tensor, start: int, stop: int) -> Tensor:
        return states @ weight[start:stop].t()

    for head, more in ((weight, {}), (part, {"vocab_size": V})):
        found = ek.linear_token_stats(hidden, head, target, statistics=ek.STATISTICS[::-1], **more)
        assert found._fields == ek.STATISTICS[::-1]
        for name, value in found._asdict().items():
            torch.testing.assert_close(value.double(), expected(logits, target, name), rtol=1e-4, atol=1e-4)
        free = ek.linear_token_stats(hidden, head, None, statistics=FREE, **more)
        for name, value in free._asdict().items():
            torch.testing.assert_close(value.double(), expected(logits, None, name), rtol=1e-4, atol=1e-4)


def test_compiled() -> None:
    logits, target = batch()
    for names, labels in ((ek.STATISTICS[::-1], target), (("mean_logit", "entropy"), None)):

        def call(z: Tensor, names: Any = names, labels: Any = labels) -> Any:
            return ek.token_stats(z, labels, statistics=names)

        leaf = logits.clone().requires_grad_()
        found = torch.compile(call, fullgraph=True, backend="aot_eager")(leaf)
        right = call(logits)
        assert type(found) is type(right)
        for a, b in zip(found, right, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)
        found.entropy.sum().backward()
        ones = {"entropy": torch.ones(target.shape)}
        right_grad = reference.gradient(logits, labels, ones)
        assert leaf.grad is not None
        torch.testing.assert_close(leaf.grad.double(), right_grad, rtol=1e-4, atol=1e-6)


def test_results_travel() -> None:
    """Between processes, and as copies."""
    found = ek.token_stats(*batch(), statistics=["p_max", "entropy"])
    for again in (pickle.loads(pickle.dumps(found)), copy.copy(found), copy.deepcopy(found)):
        assert type(again) is type(found)
        assert torch.equal(again.p_max, found.p_max) and torch.equal(again.entropy, found.entropy)


def test_errors() -> None:
    logits, target = batch()
    wrong = [
        ("entropy", TypeError, "statistics: expected None or a sequence of names, got str"),
        (3, TypeError, "statistics: .* got int"),
        ((), ValueError, "statistics: .* at least one of logprob, .* got none"),
        (["entropy", "perplexity"], ValueError, "statistics: expected names of logprob, .*, got 'perplexity'"),
        (["entropy", "p_max", "entropy"], ValueError, "statistics: .* got 'entropy' twice"),
    ]
    for names, kind, message in wrong:
        for function in (
            lambda names: ek.token_stats(logits, target, statistics=names),
            lambda names: ek.linear_token_stats(logits, logits[0], target, statistics=names),
        ):
            with pytest.raises(kind, match=message):
                function(names)
    for names in (None, ["logprob"], ["entropy", "vocab_covariance"]):
        with pytest.raises(TypeError, match=r"target: expected a tensor of labels, which .* need"):
            ek.token_stats(logits, None, statistics=names)
    with pytest.raises(TypeError, match=r"logits: expected a torch\.Tensor"):
        ek.entropy([[0.0, 1.0]])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"logits: expected at least one dimension, got .* \(\)"):
        ek.entropy(torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"temperature: .* to \(2, 3\), that of logits .* got \(5,\)"):
        ek.entropy(logits, temperature=torch.ones(5))
    with pytest.raises(TypeError, match="ignore_index"):
        ek.token_stats(logits, None, statistics=FREE, ignore_index=0.5)  # type: ignore[arg-type]


def test_what_the_table_says() -> None:
    assert tuple(x.name for x in STATISTICS) == ek.STATISTICS
    for want in range(1 << len(STATISTICS)):
        assert bits(*(x.name for x in wanted(want))) == want
    assert set(reference.FORMULAS) == set(ek.STATISTICS)
    assert set(reference.NEED_TARGET) == {x.name for x in STATISTICS if x.needs_target}

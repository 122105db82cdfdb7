"""Every case of SPEC §4 that concerns statistics, on every backend and dtype: values and gradients."""

from __future__ import annotations

import pytest
import torch

from calls import check, run
from cases import ALL, CASES, Case
from conftest import Place


@pytest.mark.parametrize("dtype", ALL, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("case", CASES, ids=str)
def test_case(case: Case, dtype: torch.dtype, place: Place) -> None:
    if dtype not in place.dtypes:
        pytest.skip(f"{dtype} is not promised on {place}")
    if dtype not in case.dtypes:
        pytest.skip(f"{case.name} does not exist in {dtype}: {case.reason}")
    sample = case.build(dtype, place.device)
    check(sample, place, "logprob", "entropy", "collision")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_logprob_entropy_equals_token_stats(case: Case, place: Place) -> None:
    """Asking for fewer statistics changes no bit of those that are left, nor of their gradient."""
    if torch.float32 not in case.dtypes:
        pytest.skip(case.reason)
    check(case.build(torch.float32, place.device), place, "logprob", "entropy", function="logprob_entropy")
    sample = case.build(torch.float32, place.device)
    more, _ = run(sample, place)
    fewer, _ = run(sample, place, "logprob_entropy")
    for name, value in fewer.items():
        torch.testing.assert_close(value, more[name], rtol=2e-6, atol=2e-6, equal_nan=True)


def test_entropy_of_a_certain_row_is_positive_zero(place: Place) -> None:
    sample = next(case for case in CASES if case.name == "one_finite").build(torch.float32, place.device)
    outputs, _ = run(sample, place)
    assert outputs["entropy"].tolist() == [0.0] * 4
    assert not torch.signbit(outputs["entropy"]).any()
    assert outputs["logprob"].tolist() == [0.0, 0.0, 0.0, -torch.inf]
    assert outputs["collision"].tolist() == [1.0] * 4

"""Every case of SPEC §4 that concerns statistics, on every backend and dtype: values and gradients."""

from __future__ import annotations

import pytest
import torch

from calls import check, run
from cases import CASES
from conftest import Place, places
from sample import Case


def everything() -> list:
    """(place, case, dtype): all that the contract promises; in Triton's interpreter the dtypes that add something."""
    params = []
    for param in places():
        place = param.values[0]
        for case in CASES:
            for dtype in case.slow_dtypes if place.interpreted else case.dtypes:
                if dtype in place.dtypes:
                    name = f"{place}-{case}-{str(dtype).removeprefix('torch.')}"
                    params.append(pytest.param(place, case, dtype, marks=param.marks, id=name))
    return params


@pytest.mark.parametrize(("place", "case", "dtype"), everything())
def test_case(place: Place, case: Case, dtype: torch.dtype) -> None:
    check(case.build(dtype, place.device), place, "logprob", "entropy", "collision")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_logprob_entropy(case: Case, place: Place) -> None:
    """The same cases through the function that asks for two statistics and keeps the smaller state."""
    dtype = torch.float32
    check(case.build(dtype, place.device), place, "logprob", "entropy", function="logprob_entropy")


def test_entropy_of_a_certain_row_is_positive_zero(place: Place) -> None:
    sample = next(case for case in CASES if case.name == "one_finite").build(torch.float32, place.device)
    outputs, _ = run(sample, place)
    assert outputs["entropy"].tolist() == [0.0] * 4
    assert not torch.signbit(outputs["entropy"]).any()
    assert outputs["logprob"].tolist() == [0.0, 0.0, 0.0, -torch.inf]
    assert outputs["collision"].tolist() == [1.0] * 4

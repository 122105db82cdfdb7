"""Every case of tests/cases.py that concerns statistics, on every backend and dtype: values and gradients."""

from __future__ import annotations

import pytest
import torch

from calls import check, run
from cases import CASES
from conftest import BackendDevice, backend_devices
from sample import Case


def everything() -> list:
    """(on, case, dtype): all that the contract promises; in Triton's interpreter the dtypes that add something, without
    fp32, in which the next test has each case, and test_statistics_choice.py all its statistics.
    """
    params = []
    for param in backend_devices():
        on = param.values[0]
        for case in CASES:
            slow = [dtype for dtype in case.slow_dtypes if dtype != torch.float32] or case.slow_dtypes
            for dtype in slow if on.interpreted else case.dtypes:
                if dtype in on.dtypes:
                    name = f"{on}-{case}-{str(dtype).removeprefix('torch.')}"
                    params.append(pytest.param(on, case, dtype, marks=param.marks, id=name))
    return params


@pytest.mark.parametrize(("on", "case", "dtype"), everything())
def test_case(on: BackendDevice, case: Case, dtype: torch.dtype) -> None:
    check(case.build(dtype, on.device), on, "logprob", "entropy", "collision")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_logprob_entropy(case: Case, on: BackendDevice) -> None:
    """The same cases through the function that asks for two statistics and keeps the smaller state."""
    dtype = torch.float32
    check(case.build(dtype, on.device), on, "logprob", "entropy", function="logprob_entropy")


def test_entropy_of_a_certain_row_is_positive_zero(on: BackendDevice) -> None:
    sample = next(case for case in CASES if case.name == "one_finite").build(torch.float32, on.device)
    outputs, _ = run(sample, on)
    assert outputs["entropy"].tolist() == [0.0] * 4
    assert not torch.signbit(outputs["entropy"]).any()
    assert outputs["logprob"].tolist() == [0.0, 0.0, 0.0, -torch.inf]
    assert outputs["collision"].tolist() == [1.0] * 4

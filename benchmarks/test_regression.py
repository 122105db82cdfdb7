"""Regression set: every implementation of ours that runs here, timed by pytest-benchmark at one size per op and device.

Not part of the test suite: ``make bench-save`` on a quiet machine, change the code, ``make bench-compare``. What is
compared are minima, which other load on the machine disturbs least.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks.cases import OPS, BatchShape, Case, HiddenShape, LogitsShape, Shape, TokensShape, make_inputs
from benchmarks.checks import check
from benchmarks.ours import Implementation, of_op

# Larger than the caches, small enough that the whole set takes well under a minute.
_SHAPES: dict[str, dict[type, Shape]] = {
    "cpu": {
        LogitsShape: LogitsShape(128, 151936),
        TokensShape: TokensShape(1 << 20),
        BatchShape: BatchShape(64, 128),
        HiddenShape: HiddenShape(256, 576, 32000),
    },
    "cuda": {
        LogitsShape: LogitsShape(4096, 128256),
        TokensShape: TokensShape(1 << 22),
        BatchShape: BatchShape(512, 128),
        HiddenShape: HiddenShape(4096, 4096, 128256),
    },
}
_DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)


def _entries() -> list:
    entries = []
    for device, op in itertools.product(_DEVICES, OPS):
        dtypes = (torch.float32, torch.bfloat16) if OPS[op] is LogitsShape else (torch.float32,)
        mine = [implementation for implementation in of_op(op) if implementation.role == "ours"]
        for implementation, dtype in itertools.product(mine, dtypes):
            case = Case(_SHAPES[device][OPS[op]], dtype, torch.device(device))
            if implementation.supports(case) is None:  # what cannot run here has no time to compare
                name = "-".join((op, implementation.name, case.dtype_name, *([] if device == "cpu" else [device])))
                entries.append(pytest.param(implementation, case, id=name))
    return entries


@pytest.mark.parametrize(("implementation", "case"), _entries())
def test_time(benchmark, implementation: Implementation, case: Case) -> None:
    inputs = make_inputs(case)
    prepared = implementation.make(case, inputs)
    benchmark.group = implementation.op

    def setup() -> None:
        if prepared.reset is not None:
            prepared.reset()

    setup()
    result = check(implementation, case, inputs, prepared.call())
    assert result.passed, result.failures
    call = prepared.call if case.device.type == "cpu" else _waited_for(prepared.call, case.device)
    benchmark.pedantic(call, setup=setup, rounds=15, warmup_rounds=2)


def _waited_for(call: Callable[[], Any], device: torch.device) -> Callable[[], None]:
    """Wall time of a call and its work: what the device does beside the host is not told apart here."""

    def waited() -> None:
        call()
        torch.cuda.synchronize(device)

    return waited

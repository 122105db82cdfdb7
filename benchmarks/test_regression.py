"""Regression set: every implementation of ours that runs here, timed by pytest-benchmark at one size per op.

Not part of the test suite: ``make bench-save`` on a quiet machine, change the code, ``make bench-compare``. What is
compared are minima, which other load on the machine disturbs least.
"""

from __future__ import annotations

import pytest
import torch

from benchmarks.checks import check
from benchmarks.implementations import OPS, SHAPE_OF, Implementation, of_op
from benchmarks.shapes import BatchShape, Case, LogitsShape, Shape, TokensShape, make_inputs

# Larger than the caches, small enough that the whole set takes well under a minute.
_SHAPES: dict[type, Shape] = {
    LogitsShape: LogitsShape(128, 151936),
    TokensShape: TokensShape(1 << 20),
    BatchShape: BatchShape(64, 128),
}


def _entries() -> list:
    entries = []
    for op in OPS:
        dtypes = (torch.float32, torch.bfloat16) if SHAPE_OF[op] is LogitsShape else (torch.float32,)
        for implementation in of_op(op):
            if implementation.role != "ours":
                continue
            for dtype in dtypes:
                case = Case(_SHAPES[SHAPE_OF[op]], dtype, torch.device("cpu"))
                reason = implementation.supports(case)
                if reason is None:  # what cannot run here has no time to compare
                    entries.append(
                        pytest.param(implementation, case, id=f"{op}-{implementation.name}-{case.dtype_name}")
                    )
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
    result = check(implementation.op, case, inputs, implementation.name, implementation.role, prepared.call())
    assert result.passed, result.failures
    benchmark.pedantic(prepared.call, setup=setup, rounds=15, warmup_rounds=2)

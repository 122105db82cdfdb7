"""A plugin of pytest, loaded through sitecustomize.py: what the fake GPU does not have is skipped."""

from __future__ import annotations

import json
import os

import pytest

#: Tests of what the fake GPU does not have: by a part of their name, with the reason.
LIMITS = {
    "opcheck": "torch's checks of an operator want to change its tensors' shape",
    "compile": "torch.compile is the identity",
    "test_no_kernel_uses_local_memory": "there are no kernels",
    "test_any_number_of_parts": "rows are not cut into parts",
    "4000003": "on a CPU, torch's own selection of so many tokens takes half a minute",
    "test_double_has_only_plain_loads[600]": "the C++ kernel adds doubles in longer chains than a GPU",
    "test_triton_takes_the_tilings": "nothing can be timed",
    "test_fake_tensors": "torch's fake tensors and ours do not mix",
    "test_nothing_is_computed_without_a_gradient": "a wrapper is no inference tensor",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Operations that are run again from Python: a few times will do. What is not there is skipped.

    A test that is to hang has a second: the limit of the others can then be one that no busy machine reaches.
    """
    hangs = [part for part, fault in json.loads(os.environ.get("FAKE_GPU_FAULTS", "{}")).items() if fault == "hang"]
    for item in items:
        if any(part in item.name for part in hangs):
            item.add_marker(pytest.mark.timeout(1))
        for reason in (reason for part, reason in LIMITS.items() if part in item.name):
            item.add_marker(pytest.mark.skip(reason=f"fake GPU: {reason}"))
    for module in {item.module for item in items if hasattr(item.module, "REPLAYS")}:
        module.REPLAYS = 2

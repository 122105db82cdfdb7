"""--reward math_verify with math-verify itself: what is right, and an answer that it never comes back from."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("math_verify")

from entropy_kernels.trainer.data import reward_source
from entropy_kernels.trainer.workers import Workers


def test_answers_are_judged_and_hangs_are_contained() -> None:
    assert Path(reward_source("math_verify").place).name == "rewards.py"
    cases = [
        ("so it is $42$", "42", 1.0),
        ("\\boxed{0.5}", "\\frac{1}{2}", 1.0),
        ("x = 3", "$x=3$", 1.0),
        ("1000", "1,000", 1.0),
        ("$8$", "\\boxed{7}", 0.0),
        ("", "7", 0.0),
    ]
    hang = "$\\boxed{9^{9^{9^{9}}}}$"
    workers = Workers(reward_source("math_verify"), count=1, seconds=3)
    try:
        scores = workers.ask([((), {"completion": said, "answer": right}) for said, right, _ in cases])
        assert scores == [score for *_, score in cases]
        late, after = workers.ask([((), {"completion": said, "answer": "42"}) for said in (hang, "42")])
        assert late.late and late.reason == "took longer than 3 s" and after == 1.0  # type: ignore[attr-defined]
        (unread,) = workers.ask([((), {"completion": "7", "answer": ""})])
        assert "math-verify finds no answer in ''" in unread.reason  # type: ignore[attr-defined]
    finally:
        workers.close()

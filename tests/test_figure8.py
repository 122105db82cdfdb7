"""benchmarks.figure8: its quantities by hand, its report from runs that are made up, and a short run of all of it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("scipy")
pytest.importorskip("matplotlib")
pytest.importorskip("transformers")

from benchmarks import figure8
from benchmarks.results import write
from entropy_kernels.trainer import ppo
from entropy_kernels.trainer.config import TrainerConfig
from entropy_kernels.trainer.probes import FirstOrder
from entropy_kernels.trainer.rollout import Rollout
from entropy_kernels.trainer.start import build_policy
from entropy_kernels.trainer.tasks import WalkTask
from trainer_setup import whole_rollout, with_task

SMALL: dict[str, Any] = {
    "method": "grpo", "minibatches": 1, "steps": 3, "warm_steps": 2, "warm_batch": 8, "hidden_size": 16,
    "intermediate_size": 24, "num_layers": 1, "num_heads": 2, "prompts_per_step": 4, "samples_per_prompt": 4,
    "eval_prompts": 4, "eval_samples": 2, "final_eval_prompts": 4, "final_eval_samples": 4,
}  # fmt: skip


def small_rollout(lengths: list[int]) -> Rollout:
    """Two prompts with two completions each, of these lengths."""
    generator = torch.Generator().manual_seed(1)
    mask = torch.arange(3) < torch.tensor(lengths)[:, None]
    draw = lambda: torch.where(mask, torch.randn(4, 3, generator=generator), torch.nan)  # noqa: E731
    advantages = torch.tensor([1.0, -1.0, 0.5, -0.5])[:, None].expand(4, 3).contiguous()
    return whole_rollout(
        mask, (-draw().abs(), draw().abs(), draw(), draw()), prompts=None, ids=torch.zeros(4, 3).long(),
        rewards=torch.tensor([[1.0, 0.0], [1.0, 1.0]]), advantages=advantages,
    )  # fmt: skip


def test_quantities_by_hand() -> None:
    rollout = small_rollout([3, 1, 2, 3])
    after = rollout.entropy - torch.arange(4)[:, None]  # row i loses i
    found = figure8.of_prompts(rollout, after, temperature=2.0)
    lengths, a, c = (3, 1, 2, 3), rollout.advantages.double(), rollout.vocab_covariance.double()
    lp = [float(rollout.old_logprob[i, :n].double().mean()) for i, n in enumerate(lengths)]
    for prompt, (i, j) in enumerate(((0, 1), (2, 3))):
        ai, aj = float(a[i, 0]), float(a[j, 0])
        # of two numbers each: a quarter of the product of their differences
        assert float(found["group"][prompt]) == pytest.approx((lp[i] - lp[j]) * (ai - aj) / 4)
        weighted = math.exp(lp[i]) * ai - math.exp(lp[j]) * aj
        assert float(found["literal"][prompt]) == pytest.approx((lp[i] - lp[j]) * weighted / 4)
        tokens = lengths[i] + lengths[j]
        exact = ai * float(c[i, : lengths[i]].sum()) + aj * float(c[j, : lengths[j]].sum())
        assert float(found["exact"][prompt]) == pytest.approx(exact / 4 / tokens)
        assert float(found["measured"][prompt]) == pytest.approx((i * lengths[i] + j * lengths[j]) / tokens, rel=1e-6)
    assert found["accuracy"].tolist() == [0.5, 1.0] and found["tokens"].tolist() == [4, 5]

    step = figure8.of_batch(rollout, found)
    valid = rollout.mask
    assert step["exact"] == pytest.approx(float((a * c)[valid].mean()) / 4)
    assert step["same"] == pytest.approx((0 * 3 + 1 * 1 + 2 * 2 + 3 * 3) / 9, rel=1e-6)
    assert step["group"] == pytest.approx(float(found["group"].mean()))
    x, y = rollout.old_logprob[valid].numpy(), rollout.advantages[valid].numpy()
    assert step["batch"] == pytest.approx(np.cov(x, y, ddof=0)[0, 1], rel=1e-5)

    sums = figure8.accuracy_sums(found, 2)
    assert sums["prompts"].tolist() == [0, 1, 1]
    assert sums["exact"].tolist() == [0, float(found["exact"][0]), float(found["exact"][1])]


def test_of_equal_lengths_the_papers_covariance_is_that_of_the_batch() -> None:
    rollout = small_rollout([3, 3, 3, 3])
    step = figure8.of_batch(rollout, figure8.of_prompts(rollout, rollout.entropy, 1.0))
    assert step["group"] == pytest.approx(step["batch"], rel=1e-6)
    rollout = small_rollout([3, 1, 2, 3])
    step = figure8.of_batch(rollout, figure8.of_prompts(rollout, rollout.entropy, 1.0))
    assert step["group"] != pytest.approx(step["batch"], rel=1e-3)


def test_plain_gradient_is_what_sgd_does(tmp_path: Path) -> None:
    config, task = TrainerConfig(out=tmp_path / "run", **SMALL), WalkTask()
    policy = build_policy(config, task)
    rollout = ppo.collect(policy, task, config, step=0, generator=torch.Generator().manual_seed(0))
    first = FirstOrder(policy, rollout, config)
    outputs = policy.outputs(rollout.prompts, rollout.ids, rollout.mask)
    policy.logprob_entropy(outputs, rollout.ids, rollout.mask, temperature=1.0).logprob.sum().backward()
    torch.optim.SGD(policy.model.parameters(), lr=0.25).step()
    assert first.change() != 0 and 0.25 * first.of_gradient() == pytest.approx(first.change(), rel=1e-3)


def test_statistics() -> None:
    assert figure8.window_means(np.array([1.0, 2, 3, 6]), 2).tolist() == [1.5, 2.5, 4.5]
    assert figure8.running_mean(np.array([2.0, 4.0]), 0.5) == pytest.approx([2.0, (4 + 0.5 * 2) / 1.5])
    assert figure8.running_mean(np.array([2.0, 4.0]), 0.0).tolist() == [2.0, 4.0]
    # t of 0.975 with two degrees of freedom is 4.302653
    assert figure8.interval([1.0, 2.0, 3.0]) == pytest.approx((2.0, 2 - 4.302653 / 3**0.5, 2 + 4.302653 / 3**0.5))
    mean, low, high = figure8.interval([0.5, 0.7], fisher=True)
    assert mean == pytest.approx(math.tanh((math.atanh(0.5) + math.atanh(0.7)) / 2)) and -1 < low < mean < high < 1
    assert math.isnan(figure8.interval([1.0])[1])


def test_without_course_a_straight_line_is_nothing() -> None:
    values = np.linspace(3.0, 5.0, 100)
    assert figure8.without_course(values)[10:-10] == pytest.approx(np.zeros(80), abs=1e-12)
    values[50] += 1.0
    assert figure8.without_course(values)[50] == pytest.approx(20 / 21)


def test_a_step_of_adamw() -> None:
    run = {
        "settings": {"adam_beta1": 0.5, "adam_beta2": 0.0, "grad_clip": 1.0},
        "columns": {"exact": [3.0, 8.0], "grad_norm": [0.5, 4.0]},
    }
    # clipped: 3 and 2, norms 0.5 and 1; averaged: 3 and (2 + 1.5)/1.5
    assert figure8.stepped(run, "exact") == pytest.approx([3 / 0.5, 3.5 / 1.5], rel=1e-5)


def made_up(variant: str, seed: int, steps: int = 80) -> dict[str, Any]:
    """A run whose measured change is that of `exact`, with noise on `group` and nothing of it in `literal`."""
    draw = np.random.default_rng(seed)
    exact = draw.normal(size=steps)
    columns = {name: draw.normal(size=steps) for name in ("entropy", "reward", "literal", "gradient")}
    columns |= {"exact": exact, "same": 3 * exact, "first order": exact, "next": exact + draw.normal(size=steps)}
    columns["group"] = exact + draw.normal(size=steps)
    columns |= {"batch": columns["group"], "grad_norm": np.ones(steps)}
    by_accuracy = {name: draw.normal(size=(8, 9)).tolist() for name in figure8.BY_ACCURACY}
    by_accuracy["group"][0][8] = None
    return {
        "variant": variant,
        "seed": seed,
        "settings": figure8.VARIANTS[variant],
        "columns": {name: values.tolist() for name, values in columns.items()},
        "by_accuracy": {"prompts": [[80] * 9] * 8, **by_accuracy},
    }


def test_report_of_made_up_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for variant in figure8.VARIANTS:
        for seed in range(3):
            write(tmp_path / f"{variant}-{seed}.json", made_up(variant, seed))
    figure8.main(["--report", "--out", str(tmp_path)])
    text = (tmp_path / "figure8.md").read_text()
    assert text.count("| A·C of tokens, exact | 1.000 [1.000, 1.000] |") == 3  # in short, and of each variant
    assert (tmp_path / "figure8.png").read_bytes().startswith(b"\x89PNG")
    runs = figure8.load(tmp_path)["adamw"]
    assert [run["seed"] for run in runs] == [0, 1, 2]
    found = figure8.correlations(runs, "same", "group")
    assert (
        all(0.5 < r < 0.9 for r in found["raw"])
        and max(map(abs, figure8.correlations(runs, "same", "literal")["raw"])) < 0.4
    )
    with pytest.raises(ValueError, match="expected runs, got none"):
        figure8.write_report(tmp_path / "nothing")


@pytest.mark.slow
def test_quick_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_task(monkeypatch)
    monkeypatch.setattr(figure8, "QUICK", SMALL)
    monkeypatch.setattr(figure8, "WINDOWS", (1, 2))
    monkeypatch.setattr(figure8, "BLOCK", 2)
    figure8.main(["--quick", "--out", str(tmp_path)])
    runs = figure8.load(tmp_path)
    assert [(variant, [run["seed"] for run in mine]) for variant, mine in runs.items()] == [
        ("adamw", [100, 101]),
        ("no-momentum", [100, 101]),
    ]
    run = runs["adamw"][0]
    assert {len(values) for values in run["columns"].values()} == {3}
    assert np.sum(run["by_accuracy"]["prompts"]) == 3 * 4 and len(run["by_accuracy"]["exact"]) == 2
    entropy, loss = run["columns"]["entropy"], run["columns"]["next"]
    assert entropy[0] - loss[0] == pytest.approx(entropy[1], rel=1e-4)
    # what is there is not run again; of other settings it is an error
    monkeypatch.setattr(figure8, "measure", None)
    figure8.main(["--quick", "--out", str(tmp_path)])
    monkeypatch.setattr(figure8, "QUICK", {**SMALL, "lr": 1e-3})
    with pytest.raises(ValueError, match=r"adamw-100.json: expected a run of .*'lr': 0.001"):
        figure8.main(["--quick", "--out", str(tmp_path)])


def test_committed_report_is_that_of_the_committed_runs() -> None:
    runs = figure8.load(figure8.OUT)
    assert [run["seed"] for run in runs["adamw"]] == list(figure8.SEEDS)
    assert all(run["settings"] == figure8.VARIANTS[variant] for variant, mine in runs.items() for run in mine)
    assert (figure8.OUT / "figure8.md").read_text() == figure8.report(runs)
    json.dumps(runs, allow_nan=False)
    table = figure8.correlation_table(runs["adamw"], "same", figure8.PREDICTORS, figure8.SHORT)
    assert f"<!-- figure8 -->\n{table}\n<!-- /figure8 -->" in (figure8.ROOT / "docs" / "control.md").read_text()

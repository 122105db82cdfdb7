"""The harness of benchmarks/control.py: its table, runs that go on, and a report on made-up runs."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import entropy_kernels as ek

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")
pytest.importorskip("scipy")

from benchmarks import control, control_numbers, control_report
from benchmarks.control import EQUAL, LOOP, PARTS, WITHOUT_FEEDBACK, Spec, table
from benchmarks.control_numbers import Run, beside, interval, read_at, targets
from benchmarks.control_report import Experiment
from benchmarks.seeds import holm
from entropy_kernels.trainer.config import TrainerConfig
from entropy_kernels.trainer.ppo import prepared

TINY = {
    "steps": 2, "warm_steps": 1, "hidden_size": 16, "intermediate_size": 24, "num_layers": 1, "num_heads": 2,
    "prompts_per_step": 4, "samples_per_prompt": 4, "minibatches": 2, "eval_prompts": 4,
}  # fmt: skip


def some(*names: str, seeds: tuple[int, ...] = (7,)) -> list[Spec]:
    return [spec for spec in control.equal_specs(seeds, TINY, all_strengths=False) if spec.name in names]


class Here(Executor):
    """In the place of the pool: runs take place in this process. Another one imports transformers for five seconds."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        pass

    def submit(self, function: Callable[..., Any], /, *arguments: Any, **keywords: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(function(*arguments, **keywords))
        except Exception as error:
            future.set_exception(error)
        return future


def run_all(specs: list[Spec], folder: Path, pool: type[Executor] = Here) -> list[str]:
    (folder / "work").mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(control, "ProcessPoolExecutor", pool)
        return control.run_all(specs, out=folder / "out", work=folder / "work", workers=1)


# --- the table --------------------------------------------------------------------------------------------------------


def test_every_run_of_the_table_is_one_that_the_trainer_takes(tmp_path: Path) -> None:
    specs = {json.dumps(spec.settings): spec for spec in table([*PARTS], quick=False)}
    for spec in specs.values():
        control.config_of(spec, tmp_path / "run", tmp_path).validate()


def test_common_settings_name_what_the_trainer_would_do_anyway() -> None:
    """So that a later default changes no run, and no key."""
    defaults = prepared(TrainerConfig())[0].to_dict()
    own = {"eval_prompts", "eval_samples", "device"}
    assert {k: v for k, v in control.COMMON.items() if defaults[k] != v and k not in own} == {}
    # what stands in no key: whoever changes such a default gives COMMON the old value
    assumed = {
        "chat_template": True, "gradient_checkpointing": False, "partial_credit": False, "max_new_tokens": None,
        "micro_batches": 1, "lr_schedule": None, "adam_beta1": 0.9, "adam_beta2": 0.999, "target_method": "exact_cov",
        "entropy_coef": 0.0, "cov_ratio": None, "cov_band": "absolute",
    }  # fmt: skip
    assert {name: defaults[name] for name in assumed} == assumed
    loop = ek.TargetEntropy(0.4)
    assert (loop._constants, control_numbers.WINDOW) == ({"kp": 0.2, "ki": 0.02, "max_change": 0.03}, 8)


def test_keys_tell_settings_and_seeds_apart_and_names_do_not() -> None:
    specs = table([*PARTS], quick=False)
    by_settings = {(s.seed, json.dumps([s.settings, s.second], sort_keys=True), s.validate_at) for s in specs}
    assert len({spec.key for spec in specs}) == len(by_settings)
    shared = {s.key for s in specs if s.name == "target"} & {s.key for s in specs if s.part == "loop"}
    assert len(shared) == 15, "targets of the comparison are runs of the closed loop"


def test_what_is_there_at_any_time_is_a_fair_comparison() -> None:
    specs = table(["equal"], quick=False)
    first = specs[: sum(spec.rank == 0 for spec in specs)]
    assert {(spec.name, spec.seed) for spec in first} == {(name, seed) for name in EQUAL for seed in control.SEEDS}
    middle = {name: str(method.strengths[len(method.strengths) // 2]) for name, method in EQUAL.items()}
    assert {s.strength for s in first if s.name not in control.REFERENCES} <= {*middle.values()}
    assert {s.strength for s in first if s.name == "clip_cov"} == {str(s) for s in EQUAL["clip_cov"].strengths}


# --- runs -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("control")
    assert run_all(some("grpo", "exact_cov", "target"), folder) == []
    return folder


def test_a_run_is_a_line_with_its_course_and_validations(ran: Path) -> None:
    records = control.read(ran / "out" / "runs.jsonl")
    grpo, exact, target = (records[spec.key] for spec in some("grpo", "exact_cov", "target"))
    assert len(grpo["steps"]["entropy"]) == 3 and grpo["steps"]["touched"] == [0.0, 0.0]
    assert [v["temperature"] for v in grpo["validations"] if v["step"] == 2] == [1.0, *control.HEATED]
    assert {v["step"] for v in grpo["validations"]} == {0, 1, 2}
    assert {*control_numbers.METRICS, "entropy"} <= {*exact["validations"][0]}
    assert exact["settings"]["method_options"] == {"ratio": EQUAL["exact_cov"].strengths[1]}
    assert {name: len(target["steps"][name]) for name in control.Course.PLAN} == dict.fromkeys(control.Course.PLAN, 2)
    assert [path.name for path in (ran / "work").glob("run-*")] == [], "what a run wrote is gone"


def test_what_is_there_is_not_run_again_and_what_is_missing_is(ran: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, specs = ran / "out" / "runs.jsonl", some("grpo", "exact_cov", "target")
    before = path.read_text()
    assert run_all(specs, ran) == []
    assert "3 of 3 runs are there" in capsys.readouterr().out
    assert path.read_text() == before
    lines = before.splitlines(keepends=True)
    path.write_text("".join(lines[:2]))  # the third was interrupted
    assert run_all(specs, ran) == []
    again = path.read_text().splitlines(keepends=True)
    assert again[:2] == lines[:2]
    kept = ("key", "validations", "steps")
    assert all(json.loads(again[2])[name] == json.loads(lines[2])[name] for name in kept), "the same bits"


def test_runs_of_another_start_are_not_put_beside(ran: Path) -> None:
    """Pairs share their start; another machine makes another one."""
    path, specs = ran / "out" / "runs.jsonl", some("grpo", "exact_cov", "target")
    before = path.read_text()
    records = [json.loads(line) for line in before.splitlines()]
    assert len({record["start"] for record in records}) == 1
    path.write_text("".join(json.dumps({**record, "start": "elsewhere"}) + "\n" for record in records[:2]))
    (failure,) = run_all(specs, ran)
    assert "expected the start that the runs of seed 7 have in common, elsewhere, got " in failure
    other = {**records[0], "key": "of other settings", "start": "elsewhere"}  # which have another start, too
    path.write_text("".join(json.dumps(record) + "\n" for record in (other, *records[:2])))
    assert run_all(specs, ran) == []
    path.write_text(before)


def test_what_a_call_without_words_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`make control`: both questions, and the report."""
    asked: list[Any] = []
    monkeypatch.setattr(control, "run_all", lambda specs, **_: asked.append({spec.part for spec in specs}) or [])
    monkeypatch.setattr(control, "write_report", lambda out, *_, **more: asked.append((out, more["quick"])))
    places = ["--out", str(tmp_path), "--work", str(tmp_path)]
    assert control.main(places) == control.main(["--quick", *places]) == control.main(["loop", *places]) == 0
    assert asked == [{"equal", "loop"}, (tmp_path, False), {"equal", "loop"}, (tmp_path, True), {"loop"}]


def test_a_change_at_half_time_is_one_run(tmp_path: Path) -> None:
    (spec,) = (s for s in control.loop_specs((7,), TINY) if s.name == "task")
    (tmp_path / "work" / "run-cut-off").mkdir(parents=True)
    assert run_all([spec], tmp_path) == []
    assert not (tmp_path / "work" / "run-cut-off").exists()
    (record,) = control.read(tmp_path / "out" / "runs.jsonl").values()
    assert len(record["steps"]["entropy"]) == 3 and len(record["steps"]["gain"]) == 2
    assert [v["step"] for v in record["validations"]] == [1, 2]


@pytest.mark.slow
def test_a_run_that_fails_is_told_and_the_others_go_on(tmp_path: Path) -> None:
    """In processes of their own, as ever but in these tests."""
    good, bad = some("clip_higher", "steer")
    broken = Spec(**{**vars(bad), "settings": {**bad.settings, "method_options": {"no": 1}}})
    (failure,) = run_all([broken, good], tmp_path, ProcessPoolExecutor)
    assert "steer" in failure and "no" in failure
    assert [*control.read(tmp_path / "out" / "runs.jsonl")] == [good.key]


# --- the report -------------------------------------------------------------------------------------------------------


def made_up(spec: Spec, end: Callable[[Spec], dict[str, float]]) -> dict[str, Any]:
    """A record in which a validation's metrics are functions of its entropy."""
    final, steps = end(spec), spec.settings["steps"]
    validations = [
        {"step": step, "temperature": 1.0, **metrics_at(0.9 - 0.7 * step / steps, spec.seed)}
        for step in spec.validate_at
    ]
    validations.append({"step": steps, "temperature": 1.0, **final})
    heated = [{"step": steps, "temperature": t, **metrics_at(0.2 * t, spec.seed, -0.1)} for t in spec.heated]
    course = [0.9 + (final["entropy"] - 0.9) * min(1.0, 3 * step / steps) for step in range(steps + 1)]
    return {
        "key": spec.key, "machine": "m", "commit": "c" * 40, "dirty": False, "versions": {"torch": "2"},
        "cpu_seconds": 36.0, "validations": validations + heated,
        "steps": {"entropy": course, "reward": [0.0] * (steps + 1), "touched": [0.01] * steps,
              "saturated": [1.0, 0.0] * (steps // 2)},
    }  # fmt: skip


def metrics_at(entropy: float, seed: int, above: float = 0.0) -> dict[str, float]:
    return {
        "entropy": entropy, "pass1": 0.4 - 0.2 * entropy + 0.01 * seed + above, "pass8": 0.5 + 0.4 * entropy + above,
        "pass32": 0.6 + 0.4 * entropy + above, "distinct": 1 + 6 * entropy + above,
    }  # fmt: skip


def end_of(spec: Spec) -> dict[str, float]:
    if spec.part == "loop" and LOOP[spec.name].target is None:
        return metrics_at(0.3 - 0.01 * spec.seed, spec.seed)
    if spec.part == "loop":
        return metrics_at(float(spec.settings["target_entropy"].rpartition(":")[2]), spec.seed)
    if spec.name == "grpo":
        return metrics_at(0.2, spec.seed)
    place = [str(s) for s in EQUAL[spec.name].strengths].index(spec.strength)
    # seeds differ in how much the method is worth: 0.03, 0.04, ...
    return metrics_at(0.25 + 0.15 * place, spec.seed, above=0.03 + 0.01 * spec.seed)


def runs_of(specs: list[Spec]) -> list[Run]:
    return [Run(spec, made_up(spec, end_of)) for spec in specs]


def test_a_paired_difference_is_the_one_computed_by_hand() -> None:
    specs = [s for s in table(["equal"], quick=False) if s.name in ("grpo", "exact_cov", "clip_cov") and s.seed < 4]
    runs = runs_of(specs)
    first, second, _ = map(str, EQUAL["exact_cov"].strengths)
    for metric in control_numbers.METRICS:
        for strength in (None, first):
            found = beside(runs, "GRPO on its way", "exact_cov", strength)
            assert found.differences(metric) == pytest.approx([0.04, 0.05, 0.06], abs=1e-9)
            assert len(found.runs) == (9 if strength is None else 3)
        assert beside(runs, "Clip-Cov", "exact_cov").differences(metric) == pytest.approx([0, 0, 0], abs=1e-9)
        # 0.04 above GRPO's way, and the heated one is 0.1 below it, from T = 1.25 on
        strong = beside(runs, "GRPO heated", "exact_cov", second)
        assert strong.differences(metric) == pytest.approx([0.14, 0.15, 0.16], abs=1e-9)
    # GRPO falls from 0.9 by 0.7 in 240 steps, and ends at 0.2; the first strength ends at 0.25, the second at 0.4
    found = beside(runs, "GRPO on its way", "exact_cov", second)
    assert [found.read(run, "step") for run in found.runs] == pytest.approx([0.5 / 0.7 * 240] * 3)
    ends = control_numbers.after_as_many_steps(runs, "pass8", "exact_cov", first)
    assert ends == pytest.approx([0.4 * 0.05 + above for above in (0.04, 0.05, 0.06)])
    # mean 0.04, standard deviation 0.01, Student's t of 2 degrees of freedom at 97.5 %: 4.302653
    reach = 4.302653 * 0.01 / math.sqrt(3)
    got = interval([0.03, 0.04, 0.05])
    assert (got.mean, got.low, got.high) == pytest.approx((0.04, 0.04 - reach, 0.04 + reach), abs=1e-6)


def test_a_strength_that_a_curve_does_not_reach_in_one_seed_is_left_out_in_all() -> None:
    specs = [s for s in table(["equal"], quick=False) if s.name in ("grpo", "exact_cov") and s.seed < 4]
    low, *_ = map(str, EQUAL["exact_cov"].strengths)

    def end(spec: Spec) -> dict[str, float]:
        return metrics_at(0.1, spec.seed) if (spec.strength, spec.seed) == (low, 2) else end_of(spec)

    runs = [Run(spec, made_up(spec, end)) for spec in specs]
    found = beside(runs, "GRPO on its way", "exact_cov")
    assert low not in found.strengths and len(found.strengths) == 2 and len(found.runs) == 6
    table_of = control_report.differences_table(runs, EQUAL, "GRPO on its way", by_strength=False)
    assert "| Exact covariance | 2 of 3 | 3 | 0.40 to 0.55 | 120 to 171 |" in table_of
    assert f"| Exact covariance | {low} |  | not on the curve |" in control_report.differences_table(
        runs, EQUAL, "GRPO on its way", by_strength=True
    )


def test_what_the_correction_for_many_comparisons_leaves() -> None:
    clear, likely, nothing = [1.0, 1.01, 0.99, 1.0], [1.0, 1.6, 1.3, 0.4], [1.0, -1.1, 0.9, -0.8]
    assert holm([clear, likely, nothing]) == [True, True, False]  # p 1e-7, 0.031 and 1.0
    assert holm([clear, likely, *[nothing] * 9]) == [True, *[False] * 10]
    assert holm([[], [1.0], clear, [2.0, 2.0]]) == [False, False, True, False]


def test_a_curve_is_read_between_its_points_and_not_beyond_its_ends() -> None:
    curve = [{"entropy": 0.6, "x": 3.0}, {"entropy": 0.2, "x": 1.0}]
    assert read_at(curve, 0.4, "x") == pytest.approx(2.0)
    assert read_at(curve, 0.195, "x") == 1.0
    assert read_at(curve, 0.1, "x") is None and read_at(curve, 0.7, "x") is None
    assert read_at(curve[:1], 0.6, "x") is None


def test_the_error_under_a_target_is_that_of_eight_step_means_over_the_second_half() -> None:
    falling = next(s for s in table(["loop"], quick=False) if s.name == "falling")
    assert targets(Run(falling, made_up(falling, end_of)))[[0, 120, 240]] == pytest.approx([0.8, 0.55, 0.3])
    spec = next(s for s in table(["loop"], quick=False) if s.name == "0.45")
    record = made_up(spec, end_of)
    course = [0.9] * 120 + [0.45] * 120 + [0.45 + 0.08]  # only the last step is off: a mean of eight is 0.01 off
    found = control_numbers.judged(Run(spec, {**record, "steps": {**record["steps"], "entropy": course}}))
    assert len(found) == 121 - 7
    assert found[-1] == pytest.approx(0.01) and abs(found[:-1]).max() < 1e-12


def test_the_noise_alone_of_a_run_that_is_on_its_target() -> None:
    spec = next(s for s in table(["loop"], quick=False) if s.name == "0.45-long")
    course = (0.45 + 0.016 * np.random.default_rng(0).normal(size=721)).tolist()
    run = Run(spec, {"steps": {"entropy": course}})
    assert control_numbers.noise(run) == pytest.approx(0.016 / math.sqrt(8) * math.sqrt(2 / math.pi), rel=0.1)
    assert abs(control_numbers.judged(run)).mean() == pytest.approx(control_numbers.noise(run), rel=0.15)


def test_a_disturbance_is_what_it_moved_against_the_same_seed_without() -> None:
    wanted = {"lr-up", "lr-up-free", "0.45", "clip_cov"}
    runs = runs_of([s for s in table([*PARTS], quick=False) if s.name in wanted])
    assert control_numbers.moved(runs, "lr-up", ("loop", "0.45", ""), "entropy") == pytest.approx([0] * 5)
    # Clip-Cov's second strength ends at 0.4, disturbed at 0.29, 0.28, 0.27
    assert control_numbers.moved(runs, "lr-up-free", ("equal", "clip_cov", "0.02"), "entropy") == pytest.approx(
        [-0.11, -0.12, -0.13]
    )
    text = control_report.disturbed_table(runs, LOOP, WITHOUT_FEEDBACK)
    assert "| H without feedback (Clip-Cov 0.02) |" in text
    assert "| lr x 2 at half-time | +0.000 [+0.000, +0.000] | -0.120 [-0.145, -0.095] |" in text


def test_a_report_says_how_much_of_it_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control_report, "save", lambda figure, path: path.touch())  # test_figures.py lays them out
    specs = table([*PARTS], quick=False)
    with pytest.raises(FileNotFoundError, match="expected runs"):
        control_report.write_report(tmp_path, Experiment(specs, {}, EQUAL, LOOP, WITHOUT_FEEDBACK))
    for there in (specs[:17], specs):
        records = {spec.key: made_up(spec, end_of) for spec in there}
        path = control_report.write_report(tmp_path, Experiment(specs, records, EQUAL, LOOP, WITHOUT_FEEDBACK))
        text = path.read_text()
        distinct = len({spec.key for spec in specs})
        assert ("are missing" in text) == (len(records) < distinct)
    assert "| Exact covariance | 3 of 3 | 5 | 0.25 to 0.55 | 120 to 223 | +0.060 [+0.040, +0.080] |" in text
    assert "| GRPO heated to T 1.5 |  | 5 | 0.300 ± 0.000 |" in text
    assert "| 0.45 | 0.000 ± 0.000 | 0.000 | 5 of 5 | 0.000 | +0.000, +0.000 |" in text
    assert "| 0.45, 720 steps | 5 | 0.488 ± 0.000 | 0.450 ± 0.000 | 0.450 ± 0.000 |" in text  # on its way until 240
    assert "| 1.0 % | 50 % | 0 % |" in text and "| task changed at half-time | +0.000" in text
    assert {path.name for path in tmp_path.iterdir()} == {"report.md", "entropy.png", "differences.png", "loop.png"}


def test_what_is_committed_is_made_of_the_runs_that_are_committed() -> None:
    found, docs = control.experiment(table([*PARTS], quick=False), control.OUT), control.ROOT / "docs" / "control.md"
    assert (control.OUT / "report.md").read_text() == control_report.report(found)
    equal = control_report.differences_table(found.runs("equal"), EQUAL, control_numbers.ON_THE_WAY, by_strength=False)
    for name, text in (("loop", control_report.loop_table(found.runs("loop"), LOOP)), ("equal entropy", equal)):
        assert f"<!-- {name} -->\n{text}\n<!-- /{name} -->" in docs.read_text(), name

"""The trainer's configuration, command line, sweeps, and report."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

pytest.importorskip("transformers")
pytest.importorskip("tyro")

import report_runs
from entropy_kernels._progress import ProgressBoard
from entropy_kernels.analysis import plots
from entropy_kernels.analysis.plot_style import styles
from entropy_kernels.trainer import ppo, sweep
from entropy_kernels.trainer.__main__ import PROG, main
from entropy_kernels.trainer.config import HEADS, TrainerConfig
from entropy_kernels.trainer.files import write_json
from entropy_kernels.trainer.log import COVARIANCE_COLUMNS, read_rows
from entropy_kernels.trainer.methods import METHODS, PAPER
from entropy_kernels.trainer.report import write_report
from entropy_kernels.trainer.report_numbers import PHASES, behind, courses, criteria, disturbance, over_seeds
from entropy_kernels.trainer.report_page import markdown
from entropy_kernels.trainer.report_text import dashed, label, limits, lines, look, verdict, verdict_lines
from trainer_setup import TINY, EasyTask, config, easy, rows_without_times, runs_here, without_drawing  # noqa: F401

# --- the command line -------------------------------------------------------------------------------------------------


def test_help_explains_every_field(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    for words, shown in (([], TrainerConfig()), *(([name], row.flags) for name, row in sweep.SWEEPS.items())):
        with pytest.raises(SystemExit) as stop:
            main([*words, "--help"])
        text = capsys.readouterr().out
        assert stop.value.code == 0 and text.startswith(f"usage: {' '.join([PROG, *words])} [-h]")
        assert max(map(len, text.splitlines())) <= 80 and "(default: )" not in text and "None)" not in text
        for field in dataclasses.fields(shown):
            flag = f"--{field.name.replace('_', '-')}"
            said = re.search(rf"^\W+{flag}\b(.*?)\(default:", text, re.M | re.S)
            assert said and re.search(r"\.\W*$", said[1]), f"{flag}: no help"


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_json(tmp_path / "request.json", config(tmp_path / "run", steps=1).to_dict())
    assert main(["from-config", str(tmp_path / "request.json")]) == 0
    assert (tmp_path / "run" / "metrics.jsonl").exists()
    assert main(["from-config", str(tmp_path / "request.json")]) == 2
    assert "expected a directory without a run" in capsys.readouterr().err
    # the configuration that a run leaves starts another one, whatever flags it was itself started with
    assert main(["from-config", str(tmp_path / "run" / "config.json"), "--resume", "--steps", "2"]) == 0
    assert main(["from-config", str(tmp_path / "run" / "config.json")]) == 2
    assert main(["from-config", str(tmp_path / "run" / "config.json"), "--out", str(tmp_path / "again")]) == 0
    assert rows_without_times(tmp_path / "again") == rows_without_times(tmp_path / "run")
    capsys.readouterr()
    assert main(["from-config", str(tmp_path / "missing.json")]) == 2
    for text, words in (("{", "expected JSON in"), ("[]", "expected a JSON object"), ('{"steps": "three"}', "steps")):
        (tmp_path / "bad.json").write_text(text)
        assert main(["from-config", str(tmp_path / "bad.json")]) == 2
        assert words in capsys.readouterr().err
    assert main(["from-config", "--steps", "2"]) == 2
    assert main(["--out", str(tmp_path / "y"), "--model", str(tmp_path / "no-model")]) == 2
    assert main(["nonsense"]) == 2
    assert main(["--out", str(tmp_path / "x"), "--temperature", "-1"]) == 2
    assert "temperature: expected a finite number > 0, got -1.0" in capsys.readouterr().err


# --- sweeps and report -----------------------------------------------------------------------------------------------


def test_report_is_whole_and_self_contained(tmp_path: Path) -> None:
    methods = ("grpo", "clip_cov", "random_dropped")
    board = ProgressBoard(enabled=False)
    start = sweep.supervised_start(dataclasses.replace(TINY, warm_steps=2, warm_batch=8), tmp_path / "start", board)
    stamp = os.stat(start / "model.safetensors").st_mtime_ns
    again = sweep.supervised_start(dataclasses.replace(TINY, warm_steps=2, warm_batch=8), tmp_path / "start", board)
    assert os.stat(again / "model.safetensors").st_mtime_ns == stamp, "an equal warm start was made anew"
    for method in methods:
        ppo.train(
            config(tmp_path / method, method=method, steps=2, eval_every=1, first_order_every=1, eval_samples=8,
                   final_eval_samples=8, measure_memory=True, warm_start_from=start)
        )  # fmt: skip
    logs = sweep.load_runs({method: tmp_path / method for method in methods})
    write_report(
        tmp_path / "report",
        {method: [log] for method, log in logs.items()},
        base=TINY,
        experiment=sweep.start_experiment(TINY, start),
        command="python -m entropy_kernels.trainer quickstart --seed 0",
        seeds=[0],
        seconds=61.0,
        workers=2,
        title="A <report>",
        kept=logs,
        picture="small.png",
    )
    page = (tmp_path / "report" / "report.html").read_text()
    assert "A &lt;report&gt;" in page
    assert "python -m entropy_kernels.trainer quickstart --seed 0" in page
    assert not re.search(r'(src|href)\s*=\s*"(?!data:)', page), "the page refers to something outside itself"
    assert len(re.findall(r'src(?:set)?="data:image/png;base64,iVBOR', page)) == 2 * 3
    for name in ("law", "entropy_change", "small"):
        assert (tmp_path / "report" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    record = json.loads((tmp_path / "report" / "summary.json").read_text())
    assert record["logits_as_parameters"]["correlation"] > 0.999
    assert set(record["methods"]) == set(methods)
    for text in ("What does not show at this scale", "torch", "pass@8", "straight line", "Clip-Cov"):
        assert text in page
    for head in HEADS:
        assert f'data-name="{head}, MB">{record["methods"]["grpo"][f"memory_{head}"]["mean"] / 1e6:.1f}<' in page
    assert "What a step costs" in page and "2 runs at the same time." in page and record["hardware"] in page
    text = markdown(record, picture="x.png")
    assert "| linear, MB |" in text and "# Walk, with random-token controls, 1 seed" in text and "tokens/s" in text
    assert "![policy entropy, pass@1 and pass@8 over training steps](x.png)" in text


def test_a_target_is_judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_drawing(monkeypatch)
    made = report_runs.logs(1)
    runs = {name: made[name] for name in ("grpo", "target")}
    (log,) = runs["target"]
    log["target_entropy"] = np.linspace(0.6, 0.56, len(log))
    nothing: dict[str, list[float]] = {"predicted": [], "measured": []}
    record = write_report(
        tmp_path / "report", runs, base=TINY, experiment=nothing, command="", seeds=[0], seconds=1.0, workers=1,
        title="", kept={"target": log},
    )  # fmt: skip
    gap = (log["entropy"] - log["target_entropy"]).to_numpy()[len(log) // 2 :]
    means = [abs(gap[i : i + 8].mean()) for i in range(len(gap) - 7)]
    values = {name: value["mean"] for name, value in record["methods"]["target"].items()}
    assert [values[name] for name in ("target_end", "target_off", "target_worst")] == pytest.approx(
        [0.56, sum(means) / len(means), max(means)]
    )
    claims = [check for check in record["criteria"] if "target entropy" in check["claim"]]
    assert [check["figure"] for check in claims] == [f"{sum(means) / len(means):.3f}", f"{max(means):.3f}"]
    page, note = ((tmp_path / "report" / name).read_text() for name in ("report.html", "report.md"))
    for text in (page, note):
        assert "lose their gradient (Target entropy)" in text
        assert re.search(r"Target entropy: the run was given a number, 0\.56 nats .* of the tokens dropped", text)
    assert "target_entropy" in (tmp_path / "report" / "csv" / "target.csv").read_text()
    missed = f"{values['target_off']:.2f} nats off its target"
    assert (
        (values["target_off"] > 0.02)
        == ("target missed" in lines(record)["rows"][1][-1])
        == (missed in verdict(record))
    )
    far = {**record["methods"], "target": {**record["methods"]["target"], "target_off": {"mean": 2.6, "seeds": [2.6]}}}
    assert "Target entropy is 2.60 nats off its target." in verdict({**record, "methods": far})
    assert label("target") == "Target entropy" and "target_off" not in record["methods"]["grpo"]


def test_every_method_has_a_look_of_its_own() -> None:
    looks = styles([label(run) for run in METHODS])
    assert len({(look.color, look.control) for look in looks.values()}) == len(METHODS)


def test_report_needs_the_baseline(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"runs: expected the baseline 'grpo' among them, got kl_cov"):
        write_report(
            tmp_path, {"kl_cov": []}, base=TINY, experiment={}, command="", seeds=[0], seconds=0.0, workers=1, title="",
            kept={},
        )  # fmt: skip


def test_runs_side_by_side_reports_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs_here(monkeypatch)  # one in a process of its own is in test_compare
    broken = config(tmp_path / "broken", warm_start_from=tmp_path / "nowhere")
    with pytest.raises(
        RuntimeError, match=r"run broken: expected exit code 0, got 2; [\s\S]*warm_start_from: expected"
    ):
        sweep.run_side_by_side({"broken": broken}, workers=1, board=ProgressBoard(enabled=False))


def test_report_of_a_policy_that_is_never_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plots, "png", lambda figure, **options: figure.draw_without_rendering() or b"a picture")
    log = pd.DataFrame(
        {
            "step": range(8),
            "entropy": [4.0 - 0.1 * i for i in range(8)],
            "tokens": 28,
            "reward": 0.0,
            "val_pass1": 0.0,
            "val_pass8": 0.0,
            "final_pass8": 0.0,
            "predicted_dh": 0.0,
            "measured_dh": 0.0,
            **dict.fromkeys(COVARIANCE_COLUMNS.values(), 0.0),
        }
    )
    write_report(
        tmp_path, {"grpo": [log]}, base=TINY, experiment={"predicted": [], "measured": []}, command="c", seeds=[0],
        seconds=1.0, workers=1, title="t", kept={},
    )  # fmt: skip
    page = (tmp_path / "report.html").read_text()
    assert "no token had an advantage" in page and "At the end no answer was right in any run" in page
    json.loads((tmp_path / "summary.json").read_text(), parse_constant=lambda text: pytest.fail(f"{text} is no JSON"))


def test_runs_that_ended_early_or_broke_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is missing has no sign, and the runs that it is missing of are named."""
    without_drawing(monkeypatch)
    runs = {run: found for run, found in report_runs.logs(1).items() if run in ("grpo", "clip_cov", "kl_cov")}
    (grpo,), (clip,), (kl,) = runs.values()
    clip.loc[clip["step"] > 100, [name for name in clip if name == "entropy" or name.startswith("val_")]] = np.nan
    runs["kl_cov"] = [kl[kl["step"] < 60].drop(columns=[name for name in kl if name.startswith("final_")])]

    def written(runs: dict[str, list[pd.DataFrame]]) -> dict[str, Any]:
        return write_report(
            tmp_path, runs, base=TrainerConfig(), experiment={"predicted": [], "measured": []}, command="c", seeds=[0],
            seconds=1.0, workers=1, title="t", kept={},
        )  # fmt: skip

    record = written(runs)
    assert "Clip-Cov has no entropy after step 100 of 240 and has 140 steps with an entropy that is" in verdict(record)
    assert "KL-Cov has no entropy after step 59 of 240. One seed" in verdict(record)
    assert "KL-Cov ends with more entropy." in verdict(record), "and nothing of pass@k"
    assert not re.search(r"\bnan\b", (tmp_path / "report.md").read_text())
    json.loads((tmp_path / "summary.json").read_text(), parse_constant=lambda text: pytest.fail(f"{text} is no JSON"))
    assert any(said.startswith("Clip-Cov: the paper's") for said in record["limits"])
    del runs["clip_cov"]
    assert not any("Clip-Cov" in said for said in written(runs)["limits"]), "of a method that did not run"
    early = written({"grpo": [grpo[:60]], "kl_cov": report_runs.logs(1)["kl_cov"]})
    assert "GRPO has no entropy after step 59 of 240" in verdict(early)
    with pytest.raises(ValueError, match="runs: expected finite entropies, got a log of 241 steps without one"):
        written({"grpo": [grpo.assign(entropy=np.nan)]})
    assert verdict(written({"grpo": [grpo.assign(entropy=0.0)], "kl_cov": [kl]})).startswith(
        "GRPO's entropy stays: 0.00 nats at the start, 0.00 at the end. KL-Cov ends with more entropy"
    )


def test_complete_runs_are_kept_and_others_continued(tmp_path: Path) -> None:
    settings = config(tmp_path / "run", steps=2)
    assert sweep.unfinished({"run": settings}) == {"run": settings}
    ppo.train(settings)
    longer = dataclasses.replace(settings, steps=3)
    assert sweep.unfinished({"run": settings}) == {}
    assert sweep.unfinished({"run": longer}) == {"run": longer}
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    del saved["ref_kl_coef"]  # a field that came later
    for text, kept in ((json.dumps(saved), True), ("{", False)):
        (tmp_path / "run" / "config.json").write_text(text)
        assert (sweep.unfinished({"run": settings}) == {}) is kept
    ppo.train(dataclasses.replace(settings, overwrite=True))
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    (tmp_path / "run" / "metrics.jsonl").write_text("\n".join(lines[:-1]) + "\n")
    assert sweep.unfinished({"run": settings}) == {"run": dataclasses.replace(settings, resume=True)}


def test_runs_from_a_start_that_was_made_anew_are_run_again(tmp_path: Path) -> None:
    def start() -> Path:
        made = dataclasses.replace(TINY, warm_steps=1, warm_batch=8)
        return sweep.supervised_start(made, tmp_path / "start", ProgressBoard(enabled=False))

    settings = config(tmp_path / "run", steps=1, warm_start_from=start())
    ppo.train(settings)
    start()
    assert sweep.unfinished({"run": settings}) == {}
    (tmp_path / "start" / "warm_start.json").unlink()
    start()
    assert sweep.unfinished({"run": settings}) == {"run": settings}


@pytest.mark.slow
def test_compare(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    without_drawing(monkeypatch)
    values = {**TINY.to_dict(), "warm_steps": 2, "warm_batch": 8, "dtype": "mixed", "steps": 4, "measure_memory": False}
    write_json(tmp_path / "tiny.json", {**values, "command": ["what a run adds"]})
    flags = ["compare", "--config", str(tmp_path / "tiny.json"), "--out", str(tmp_path / "out")]
    flags += ["--methods", "grpo", "kl_cov", "--torch-ops", "kl_cov", "--workers", "2", "--no-progress"]
    with monkeypatch.context() as patch:
        runs_here(patch)
        assert main([*flags, "--steps", "3"]) == 0
    out = tmp_path / "out"
    record = json.loads((out / "summary.json").read_text())
    assert set(record["methods"]) == {"grpo", "kl_cov", "kl_cov_torch_ops"}
    assert all(values[f"seconds_{name}"]["mean"] > 0 for values in record["methods"].values() for name in PHASES)
    assert "KL-Cov, torch ops" in (out / "report.html").read_text()
    assert {path.stem for path in (out / "csv").iterdir()} == set(record["methods"])
    assert (out / "curves.png").exists() and "| KL-Cov, torch ops |" in (out / "report.md").read_text()
    first = {name: read_rows(out / name / "metrics.jsonl")[0] for name in record["methods"]}
    assert first["kl_cov"]["entropy"] == pytest.approx(first["kl_cov_torch_ops"]["entropy"], abs=1e-3)
    assert json.loads((out / "kl_cov_torch_ops" / "config.json").read_text())["head"] == "torch"
    # a run that is complete stays as it is, and a method that was not asked for before is added
    before = (out / "grpo" / "metrics.jsonl").stat().st_mtime_ns
    assert main([*flags, "--steps", "3", "--reuse", "--progress", "--methods", "grpo", "clip_cov"]) == 0
    printed, checks = capsys.readouterr().out, json.loads((out / "summary.json").read_text())["criteria"]
    assert len(checks) >= 2
    assert all((f"\ndoes not hold: {check['claim']}: " in printed) != check["holds"] for check in checks), printed
    assert (out / "grpo" / "metrics.jsonl").stat().st_mtime_ns == before
    assert set(json.loads((out / "summary.json").read_text())["methods"]) == {"grpo", "clip_cov", "kl_cov_torch_ops"}
    capsys.readouterr()
    assert main(["compare", "--out", str(tmp_path / "none")]) == 2
    assert "error: --config: expected a JSON FILE of what the runs have in common" in capsys.readouterr().err
    assert main([*flags, "--methods", "kl_cov"]) == 2
    assert "error: --methods: expected 'grpo' among them" in capsys.readouterr().err


def test_claims_of_the_walk_are_not_made_of_other_tasks() -> None:
    summary = {"grpo": {"entropy_fall": {"mean": 0.1, "sd": None, "seeds": [0.1]}}}
    experiment = {"predicted": [1.0, 2.0, 3.0], "measured": [1.0, 2.0, 3.0]}
    assert len(criteria(summary, experiment)) == 3
    assert [check["holds"] for check in criteria(summary, experiment, walk=False)] == [True, True]


def test_sweeps_are_rows_of_a_table(tmp_path: Path) -> None:
    """Names of folders, overrides of runs and the recorded call, as the commands promise them."""
    reproduce = sweep.SWEEPS["reproduce"]
    flags = dataclasses.replace(reproduce.flags, out=tmp_path, seeds=(0, 7), torch_ops="kl_cov")
    rows = sweep.configurations(reproduce, flags, TINY)
    assert list(rows) == [*PAPER, "kl_cov_torch_ops"]
    assert [config.out.name for config in rows["clip_cov"]] == ["clip_cov-0", "clip_cov-7"]
    for name, (first, second) in rows.items():
        control = name in METHODS and METHODS[name].control_of is not None
        assert (first.seed, second.seed) == (0, 7) and first.warm_start_from == tmp_path / "warm_start"
        assert first.measure_entropy_change is not control and not second.measure_entropy_change
        assert (first.first_order_every == 0) is control and second.first_order_every == 0
        assert first.head == ("torch" if name.endswith("torch_ops") else "linear")
    quick = sweep.SWEEPS["quickstart"]
    flags = dataclasses.replace(quick.flags, out=tmp_path, control=False)
    rows = sweep.configurations(quick, flags, TINY)
    assert [config.out.name for row in rows.values() for config in row] == ["grpo", "clip_cov", "kl_cov", "target"]
    assert [config.target_entropy for row in rows.values() for config in row] == [None, None, None, "0.4"]
    assert sweep.command_line("quickstart", flags, dataclasses.replace(TINY, seed=5)) == (
        f"python -m entropy_kernels.trainer quickstart --out {tmp_path} --methods grpo clip_cov kl_cov random_dropped "
        "--target-entropy 0.4 --no-control --seed 5 --steps 3 --warm-steps 0 --eval-every 2 --workers 2"
    )
    compare = dataclasses.replace(sweep.SWEEPS["compare"].flags, out=tmp_path, torch_ops=None, reuse=True)
    assert " --torch-ops none " in sweep.command_line("compare", compare, TINY)
    assert sweep.command_line("compare", compare, TINY).endswith(" --reuse")
    assert {run: label(run) for run in ("kl_cov_torch_ops", "random_dropped")} == {
        "kl_cov_torch_ops": "KL-Cov, torch ops",
        "random_dropped": "Random tokens dropped",
    }
    # the configuration's target is the run's of that name and no other's, with its options; None leaves it out
    held = dataclasses.replace(TINY, target_entropy="0:0.6,9:0.3", target_method="weight", method_options={"kp": 0.3})
    rows = sweep.configurations(quick, dataclasses.replace(flags, target_entropy=None), held)
    assert (rows["target"][0].target_entropy, rows["target"][0].method_options) == ("0:0.6,9:0.3", {"kp": 0.3})
    assert {rows[name][0].target_entropy for name in ("grpo", "clip_cov", "kl_cov")} == {None}
    assert "target" not in sweep.configurations(quick, dataclasses.replace(flags, target_entropy=None), TINY)
    for changes in ({"methods": ("kl_cov",)}, {"workers": 0}, {"torch_ops": "nosuch"}, {"seeds": (0, 1, 0)}):
        with pytest.raises(ValueError, match=r"^(methods|torch_ops|workers|seeds): expected "):
            sweep.configurations(quick, dataclasses.replace(flags, **changes), TINY)


@pytest.mark.parametrize("command", list(sweep.SWEEPS))
def test_the_recorded_call_is_the_call(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[sweep.Flags] = []
    monkeypatch.setattr(sweep, "planned", lambda name, flags: seen.append(flags))
    monkeypatch.setattr(sweep, "run_sweep", lambda plan: 0)
    seed = "--seeds" if sweep.SWEEPS[command].flags.seeds else "--seed"
    asked = ["--out", str(tmp_path / "a b"), seed, "3", "--steps", "5", "--reuse", "--no-control"]
    assert main([command, *asked, "--torch-ops", "none"]) == 0
    assert main(shlex.split(sweep.command_line(command, seen[0], TrainerConfig(warm_steps=800)))[3:]) == 0
    assert seen[1] == dataclasses.replace(seen[0], warm_steps=800, eval_every=seen[0].eval_every or 8)


# --- what a report opens with ----------------------------------------------------------------------------------------


def opening(runs: dict[str, list[pd.DataFrame]]) -> dict[str, Any]:
    """What summary.json has of the runs that a report opens with."""
    summary = over_seeds(runs)
    nothing: dict[str, list[float]] = {"predicted": [], "measured": []}
    seeds = [*range(len(runs["grpo"]))]
    return {"methods": summary, "courses": courses(runs), "seeds": seeds, "criteria": criteria(summary, nothing)}


def course(entropy: float, pass1: float, pass8: float, speed: float = 1.0) -> pd.DataFrame:
    """A log that falls to an entropy, with a pass@1 that comes to its end after `pass1` less than half of the steps."""
    step = np.arange(41)
    rise = 0.4 + np.where(step < 24, pass1, 0.0) * (step > 0)
    return pd.DataFrame({
        "step": step, "entropy": entropy + (1 - entropy) * np.exp(-step / 4), "val_pass1": rise, "val_pass8": pass8,
        "final_pass1": 0.4, "final_pass8": pass8, "tokens": 100, "time/step": 1 / speed, "time/ops": 0.1,
        "time/sample": 0.2,
    })  # fmt: skip


def test_the_verdict_is_of_these_runs() -> None:
    runs = {"grpo": [course(0.1, 0.0, 0.6)], "clip_cov": [course(0.5, -0.05, 0.8, 0.9)]}
    record = opening(runs)
    said = verdict(record)
    assert said.startswith("GRPO's entropy collapses: 1.00 nats at the start, 0.10 at the end.")
    assert "Clip-Cov ends with more entropy and higher pass@8, and about GRPO's pass@1." in said
    _, (name, *cells) = lines(record)["rows"]
    assert (name, cells[0], cells[2]) == ("Clip-Cov", "0.500 (5.0 x)", "0.800 (+0.200)")
    assert cells[-1] == "pass@1 behind until step 25, by 0.046; tokens/s -10%"
    assert "pass@1, below GRPO's: Clip-Cov until step 25." in look(record)
    assert verdict_lines(record)[0] == said and verdict_lines(record)[1].startswith("Clip-Cov: entropy 0.500 (5.0 x); ")
    # the same words with the numbers the other way round would be wrong
    changed = verdict(opening({"grpo": runs["clip_cov"], "clip_cov": runs["grpo"]}))
    assert "GRPO's entropy falls: 1.00" in changed
    assert "Clip-Cov ends with lower entropy and lower pass@8, and about GRPO's pass@1." in changed
    still = opening({"grpo": [course(1.0, 0.0, 0.6)], "kl_cov": [course(1.0, 0.0, 0.6)]})
    assert "stays: 1.00" in verdict(still) and "KL-Cov ends with about GRPO's entropy, pass@8 and pass@1." in verdict(
        still
    )
    assert lines(still)["rows"][1][-1] == "nothing"


def test_the_committed_report_opens_with_what_its_logs_show() -> None:
    """Every word and number of verdict, courses and lines, and what does not show."""
    folder = report_runs.ROOT / "benchmarks" / "results" / "toy"
    runs = {run: [pd.read_csv(folder / "csv" / f"{run}-{seed}.csv") for seed in range(3)] for run in PAPER}
    claims = json.loads((folder / "summary.json").read_text())["criteria"]
    record = opening(runs)
    made = criteria(record["methods"], {"predicted": [-1.0, 0.0, 1.0], "measured": [-1.0, 0.0, 1.0]})
    assert [(c["holds"], c["figure"]) for c in made[:9]] == [(c["holds"], c["figure"]) for c in claims[:9]]
    record["criteria"] = claims
    note = (folder / "report.md").read_text()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in note.splitlines() if line[:2] == "| "]
    assert rows[2 : 2 + len(runs)] == lines(record)["rows"]
    for said in (verdict(record), *(f"- {line}" for line in (*look(record), *limits(record["methods"], TINY)))):
        assert f"\n{said}\n" in note
    assert (
        limits(record["methods"], TINY)[0]
        == "A gain in pass@1 at the end: Clip-Cov +0.004, KL-Cov -0.023 against GRPO."
    )
    claims[0]["holds"] = claims[3]["holds"] = False
    assert "10 of 12 claims hold." in verdict(record)


def test_a_claim_of_a_gain_needs_the_gap_and_every_seed() -> None:
    for mine, theirs, holds in (((0.7, 0.72), (0.5, 0.52), True), ((0.6, 1.0), (0.59, 0.59), False)):
        runs = {
            run: [course(0.3, 0.0, value) for value in values] for run, values in (("grpo", theirs), ("clip_cov", mine))
        }
        fall, _, gain, *_ = criteria(over_seeds(runs), {"predicted": [], "measured": []})
        assert (fall["holds"], gain["holds"]) == (False, holds) and "pass@8 is above the baseline's" in gain["claim"]
    runs["clip_cov"] = [
        course(0.3, 0.0, 0.5),
        course(0.3, 0.0, 0.65),
    ]  # above on average, by less than the seeds spread
    runs["grpo"] = [course(0.3, 0.0, 0.52)] * 2
    assert not criteria(over_seeds(runs), {"predicted": [], "measured": []})[2]["holds"]


def test_dashes_are_named_if_they_are_there() -> None:
    log = course(0.1, 0.0, 0.6)
    random, ops, target = "tokens chosen at random", "torch's own operations", "the entropy that a run is to hold"
    for run, named in (
        ("clip_cov", ()),
        ("random_dropped", (random,)),
        ("kl_cov_torch_ops", (ops,)),
        ("target", (target,)),
    ):
        held = log.assign(target_entropy=0.4) if run == "target" else log
        said = dashed(over_seeds({"grpo": [log], run: [held]}))
        assert [text for text in (random, ops, target) if text in said] == [*named]


def test_one_seed_has_no_spread_to_exceed() -> None:
    for seeds in (1, 3):
        runs = report_runs.logs(seeds)
        record = opening(runs)
        texts = [
            verdict(record),
            *limits(record["methods"], TINY),
            *(c["claim"] + c["figure"] for c in record["criteria"]),
        ]
        spread = [text for text in texts if "spread" in text and "were seen to spread" not in text]
        assert bool(spread) is (seeds > 1) and not any("0.000" in text for text in spread)
        assert ("One seed: differences in pass@k below 0.05" in texts[0]) is (seeds == 1)
        assert ("3 seeds: differences within their standard deviation" in texts[0]) is (seeds > 1)
        gains = [text for text in texts if "pass@1" in text and "gain" in text]
        assert len(gains) <= 1


def test_how_long_a_curve_is_behind() -> None:
    def of(*values: float) -> Any:
        return behind(pd.Series([0.0, *values], index=range(0, 10 * len(values) + 1, 10)))

    assert of(*[-0.03] * 10) == {"until": 100, "by": pytest.approx(0.03), "to_end": True}
    assert of(*[-0.03] * 6, *[0.05] * 4) == {"until": 70, "by": pytest.approx(0.13 / 7), "to_end": False}
    assert of(*[0.03] * 5, *[-0.03] * 5) is None, "behind at the end is the end's to tell"
    assert of(*[-0.005] * 10) is None, "as good as level"
    assert of(-0.1, -0.1) is None and of() is None and of(float("nan"), -0.1) is None, "too few to tell"


def test_a_machine_with_other_work_makes_no_method_slow() -> None:
    for sample, worse in ((0.4, "nothing"), (0.2, "tokens/s -50%")):
        slow = course(0.5, 0.0, 0.8, 0.5).assign(**{"time/sample": sample})
        record = opening({"grpo": [course(0.1, 0.0, 0.6)], "clip_cov": [slow]})
        assert lines(record)["rows"][1][-1] == worse
        assert disturbance(record["methods"], "clip_cov") == pytest.approx(sample / 0.2)

"""Logs as people have them: broken lines, several runs in a file, several files of a run, folders.

Right values come from float64 numpy.
"""

import gzip
import json
import math
import random
import string

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.tensorboard import SummaryWriter

from entropy_kernels import cli
from entropy_kernels.analysis import logs, report
from entropy_kernels.analysis.metric_names import LogError
from run_logs import check, course, fitted, jsonl, law, rows

# --- (a), (e): lines and values that are broken ----------------------------------------------------------------------


def test_broken_lines_in_the_middle_are_left_out_with_their_numbers(tmp_path):
    steps, h, r = course(range(40))
    entries = rows(steps, h, r)
    entries[10] = '{"step": 10, "entr\n'  # a crash while writing
    entries[11] = '{"step": 11, "entropy": 0.3}{"step": 11, "entropy": 0.3, "val_pass1": 0.1}\n'
    entries[12] = "[1, 2]\n"
    (fit,) = fitted(jsonl(tmp_path / "log.jsonl", entries))
    check(fit, np.delete(h, [10, 11, 12]), np.delete(r, [10, 11, 12]))
    assert "3 lines of log.jsonl are broken (no JSON object) and were left out: 11, 12, 13" in fit.notes
    (fit,) = fitted(jsonl(tmp_path / "log.jsonl", [*rows(steps, h, r), "[]\n"]))
    assert "line 41 of log.jsonl is broken (no JSON object) and was left out" in fit.notes


def test_lines_of_csv_of_another_width_are_left_out(tmp_path):
    steps, h, r = course(range(40))
    lines = [f"{s},{x!r},{y!r}" for s, x, y in zip(steps, h.tolist(), r.tolist(), strict=True)]
    lines[7], lines[8] = "7,0.", "8,0.5,0.3,9,0.5,0.3"
    path = tmp_path / "log.csv"
    # a run that was started again writes its header again
    path.write_text("\n".join(["step,entropy,val_pass1", *lines[:20], "step,entropy,val_pass1", *lines[20:]]) + "\n")
    (fit,) = fitted(path)
    check(fit, np.delete(h, [7, 8]), np.delete(r, [7, 8]))
    assert "2 lines of log.csv are broken (not 3 cells) and were left out: 9, 10" in fit.notes


def test_csv_quotes_ragged_and_trailing_separators(tmp_path):
    path = tmp_path / "log.csv"
    path.write_text('step,text,entropy\n0,"a, ""b""\nover two lines",0.5\n1,c,0.4\n2,"d",0.3\n')
    assert logs.read_log(path)["entropy"].tolist() == [0.5, 0.4, 0.3]
    path.write_text("step,entropy,val\n" + "".join(f"{s},0.{s}\n" for s in range(1, 9)) + "9,0.9,1\n")
    log = logs.read_log(path)  # a writer that leaves out empty cells at the end
    assert (len(log), log["val"].dropna().tolist()) == (9, [1.0])
    path.write_text("step,entropy\n1,0.5,\n2,0.4,\n3,0.3,\n")
    assert logs.read_log(path)["entropy"].tolist() == [0.5, 0.4, 0.3]


def test_a_stray_byte_semicolons_decimal_commas_and_packed_files(tmp_path):
    steps, h, r = course(range(30))
    lines = [f"{s};{x!r};{y!r};b\xe4".replace(".", ",") for s, x, y in zip(steps, h.tolist(), r.tolist(), strict=True)]
    path = tmp_path / "log.csv"
    path.write_bytes("\n".join(["step;entropy;val_pass1;text", *lines]).encode("latin-1"))
    (fit,) = fitted(path)
    check(fit, h, r)
    assert any("bytes that are not UTF-8 text were replaced" in note for note in fit.notes)
    assert "log.csv: commas were read as decimal points" in fit.notes
    text = "".join(json.dumps(row) + "\n" for row in rows(steps, h, r))
    (tmp_path / "log.jsonl").write_bytes(text.encode().replace(b'"step": 7', b'"step\xff": 7'))
    (fit,) = fitted(tmp_path / "log.jsonl")
    check(fit, np.delete(h, 7), np.delete(r, 7))
    assert "line 8 of log.jsonl: bytes that are not UTF-8 text were replaced" in fit.notes
    (tmp_path / "log.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    check(fitted(tmp_path / "log.jsonl.gz")[0], h, r)
    (tmp_path / "wide.jsonl").write_bytes(text.encode("utf-16"))  # as PowerShell's > writes
    check(fitted(tmp_path / "wide.jsonl")[0], h, r)
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(text.encode())[:-20])
    with pytest.raises(LogError, match="cannot be unpacked"):
        logs.read_logs([tmp_path / "cut.jsonl.gz"])


def test_zeros_of_a_power_failure_and_nesting_without_end(tmp_path):
    steps, h, r = course(range(30))
    lines = [json.dumps(row) for row in rows(steps, h, r)]
    lines[9] = lines[9][:12] + "\0" * 500
    lines[10] = "\0" * 500 + lines[10]
    path = tmp_path / "log.jsonl"
    path.write_text("\n".join(lines))
    (fit,) = fitted(path)
    check(fit, np.delete(h, 9), np.delete(r, 9))
    assert "lines 10, 11 of log.jsonl: bytes that are not UTF-8 text were replaced" in fit.notes
    path.write_text('{"step": 0, "x": ' + '{"x": ' * 20_000 + "1" + "}" * 20_001)
    with pytest.raises(LogError, match=r"nested too deeply|not JSON"):
        logs.read_logs([path])


def test_csv_with_a_header_in_quotes_and_commas_within_them(tmp_path):
    path = tmp_path / "log.csv"
    path.write_text('"step","text","entropy"\n0,"a","0,5"\n1,"b,c","0,4"\n2,"d"\n3,"e","0,3"\n')
    (run,) = logs.read_logs([path])
    assert run.frame.to_dict("list") == {"step": [0, 1, 3], "entropy": [0.5, 0.4, 0.3]}
    assert run.notes == ["line 4 of log.csv is broken (not 3 cells) and was left out"]


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_values_that_are_not_finite_are_left_out_with_their_steps(tmp_path, kind):
    steps, h, r = course(range(40))
    h[5], h[6], r[9] = np.inf, np.nan, -np.inf
    path = tmp_path / f"log.{kind}"
    if kind == "jsonl":
        jsonl(path, rows(steps, h, r))
    else:
        path.write_text(
            "step,entropy,val_pass1\n" + "".join(f"{s},{x},{y}\n" for s, x, y in zip(steps, h, r, strict=True))
        )
    (fit,) = fitted(path)
    kept = np.delete(np.arange(40), [9])
    # the evaluations of steps 5 and 6 have no entropy of their own, nor one since the evaluation before
    kept = np.delete(kept, [5, 6])
    check(fit, h[kept], r[kept])
    assert "entropy is infinite or NaN at step 5, 6: left out there" in fit.notes
    assert "val_pass1 is infinite or NaN at step 9: left out there" in fit.notes
    assert "2 evaluations have no entropy near them and were left out" in fit.notes


# --- (b): several runs in a file -------------------------------------------------------------------------------------


def test_two_runs_in_a_file_are_fitted_apart(tmp_path, capsys):
    first, second = course(range(0, 101, 5), 1, a=0.2), course(range(0, 61, 5), 2, a=0.1, b=0.4)
    path = jsonl(tmp_path / "log.jsonl", rows(*first) + rows(*second))
    one, two = fitted(path)
    assert (one.run, two.run) == ("log#1", "log#2")
    check(one, *first[1:])
    check(two, *second[1:])
    # what came of merging them: neither run's law
    merged = {**dict(zip(first[0].tolist(), zip(*first[1:], strict=True), strict=True)),
              **dict(zip(second[0].tolist(), zip(*second[1:], strict=True), strict=True))}  # fmt: skip
    assert abs(law(*zip(*merged.values(), strict=True))[0] - one.law.a) > 0.03
    note = "log.jsonl holds 2 runs: its steps start again, at 0; --run NAME chooses"
    assert note in one.notes
    assert note in two.notes
    assert [fit.run for fit in fitted(path, run="log#2")] == ["log#2"]
    assert len(fitted(path, run="*")) == 2
    with pytest.raises(LogError, match=r"--run: no run 'x' in the log; it has log#1, log#2"):
        fitted(path, run="x")
    assert cli.main(["fit", str(path)]) == 0
    out = capsys.readouterr().out
    assert "Entropy laws of 2 runs: val_pass1 against entropy" in out
    assert out.count(note) == 1
    assert (tmp_path / "log.entropy-law.png").exists()


def test_a_run_that_was_resumed_is_told_from_a_second_run(tmp_path):
    whole = course(range(101), 3)
    before = rows(*whole)[:61]
    for row in before[41:]:
        row["entropy"] += 0.2  # the abandoned end
    path = jsonl(tmp_path / "log.jsonl", before + rows(*whole)[40:])
    (fit,) = fitted(path)
    check(fit, *whole[1:])
    assert any("steps go back from 60 to 40: taken for a run that was resumed" in note for note in fit.notes)
    # resumed, then crashed before where it had been: the abandoned end is no part of it
    (fit,) = fitted(jsonl(path, before + rows(*whole)[40:50]))
    check(fit, *(values[:50] for values in whole[1:]))


def test_late_rows_are_no_second_run(tmp_path):
    steps, h, r = course(range(60))
    entries = []
    for s, x in zip(steps.tolist(), h.tolist(), strict=True):
        entries.append({"step": s, "entropy": x, "time": 1.0 * s})
        if s >= 3:  # evaluations that end three steps later
            entries.append({"step": s - 3, "val_pass1": float(r[s - 3]), "time": 1.0 * s})
    (run,) = logs.read_logs([jsonl(tmp_path / "log.jsonl", entries)])
    assert len(run.frame) == 60
    # evaluations of all checkpoints, after training
    train = [{"step": s, "entropy": x} for s, x in zip(steps.tolist(), h.tolist(), strict=True)]
    after = [{"step": s, "val_pass1": y} for s, y in zip(steps.tolist(), r.tolist(), strict=True)][::5]
    (fit,) = fitted(jsonl(tmp_path / "log.jsonl", train + after))
    check(fit, h[::5], r[::5])


def test_rows_in_any_order_are_one_run(tmp_path):
    steps, h, r = course(range(50))
    for order in (np.arange(50)[::-1], np.random.default_rng(0).permutation(50)):
        frame = pd.DataFrame({"step": steps, "entropy": h, "val_pass1": r}).iloc[order]
        frame.to_csv(tmp_path / "log.csv", index=False)
        check(fitted(tmp_path / "log.csv")[0], h, r)


def test_values_that_stand_twice_at_a_step_are_told(tmp_path):
    steps, h, r = course(range(30))
    entries = [row for row in rows(steps, h, r) for _ in range(2)]
    (fit,) = fitted(jsonl(tmp_path / "log.jsonl", entries))
    assert "60 values stand a second time at their step: the later ones count" in fit.notes


def test_two_runs_that_write_at_once_are_told_apart_by_a_number_or_called_a_mixture(tmp_path):
    one, two = course(range(30), 1), course(range(30), 2, a=0.3)
    mixed = [{**row, "run_id": run} for pair in zip(rows(*one), rows(*two), strict=True)
             for run, row in zip((101, 202), pair, strict=True)]  # fmt: skip
    for kind in ("jsonl", "csv"):
        path = tmp_path / f"log.{kind}"
        if kind == "csv":
            pd.DataFrame(mixed).to_csv(path, index=False)
        else:
            jsonl(path, mixed)
        first, second = fitted(path)
        check(first, *one[1:])
        check(second, *two[1:])
        assert (first.run, second.run) == ("101", "202")
    (fit,) = fitted(jsonl(tmp_path / "none.jsonl", [{k: v for k, v in row.items() if k != "run_id"} for row in mixed]))
    assert any("they differ: if two runs" in note for note in fit.notes)
    counted = [{**row, "trial": i} for i, row in enumerate(rows(*one))]  # counts with the steps, and names no run
    check(*fitted(jsonl(tmp_path / "counted.jsonl", counted)), *one[1:])


def test_files_of_one_name_that_are_joined_are_told_with_their_folders(tmp_path):
    steps, h, r = course(range(30))
    paths = []
    for folder, name, values in (("one", "entropy", h), ("two", "val_pass1", r)):
        (tmp_path / folder).mkdir()
        entries = [{"step": int(s), name: v} for s, v in zip(steps, values, strict=True)]
        paths.append(jsonl(tmp_path / folder / "metrics.jsonl", entries))
    (fit,) = report.fit_logs(paths)
    assert any(str(paths[0]) in note and str(paths[1]) in note and "read together" in note for note in fit.notes)


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_a_column_that_names_the_run_tells_runs_apart(tmp_path, kind):
    one, two = course(range(30), 1), course(range(30), 2, a=0.3)
    entries = [{"run": name, **row} for pair in zip(rows(*one), rows(*two), strict=True)
               for name, row in zip(("grpo", "kl"), pair, strict=True)]  # fmt: skip
    path = tmp_path / f"log.{kind}"
    jsonl(path, entries) if kind == "jsonl" else pd.DataFrame(entries).to_csv(path, index=False)
    first, second = fitted(path)
    assert (first.run, second.run) == ("grpo", "kl")
    check(first, *one[1:])
    check(second, *two[1:])
    assert "log." + kind + " holds several runs, told apart by its column run" in first.notes


def test_a_run_without_a_law_is_left_out_with_the_reason(tmp_path, capsys):
    one = course(range(30), 1)
    path = jsonl(tmp_path / "log.jsonl", rows(*one) + rows(*(values[:2] for values in one)))
    (fit,) = fitted(path)
    check(fit, *one[1:])
    assert any(note.startswith("run log#2 is left out: ") and "at least 3 steps" in note for note in fit.notes)
    short = rows(*(values[:2] for values in one))
    with pytest.raises(LogError, match=r"none of 2 runs can be fitted; log#1: .*at least 3 steps"):
        fitted(jsonl(path, short + short))


def test_two_runs_whose_steps_do_not_meet(tmp_path):
    first, second = course(range(1, 101, 2), 1, a=0.2), course(range(2, 101, 2), 2, a=0.1)
    one, two = fitted(jsonl(tmp_path / "log.jsonl", rows(*first) + rows(*second)))
    check(one, *first[1:])
    check(two, *second[1:])


def test_a_metric_that_goes_back_and_forth_hides_no_second_run(tmp_path):
    entries = []
    for run in (course(range(60), 1), course(range(60), 2)):
        for row in rows(*run):
            entries.append(row)
            if row["step"] % 2:
                entries += [{"step": row["step"] - 1, "late": 0.1}, {"step": row["step"], "late": 0.2}]
                entries.append({"step": row["step"] - 1, "late": 0.3})
    assert len(logs.read_logs([jsonl(tmp_path / "log.jsonl", entries)])) == 2


def crashing_runs(rng):
    """Rows of a log of one to three runs that crash and are resumed from a checkpoint, with evaluations that may come
    late; and the entropies and evaluations of each that are left in its line, by step."""
    out, truth = [], []
    every, interval = rng.choice([1, 1, 2, 5]), rng.choice([5, 10, 20])
    first = rng.choice([0, 1, every])
    for _ in range(rng.choice([1, 1, 2, 3])):
        length, crashes, checkpoint = rng.randrange(60, 300), rng.choice([0, 0, 1, 2]), 0
        h, r = {}, {}
        if rng.random() < 0.5:
            r[0] = rng.random()
            out.append({"step": 0, "val_pass1": r[0]})
        while True:
            stop = rng.randrange(checkpoint + 30, checkpoint + 60) if crashes and checkpoint + 60 < length else length
            is_late, late = rng.random() < 0.3, []
            begin = checkpoint + 1 if checkpoint else first
            for step in range(begin, stop + 1):
                if step % every == first % every or step == begin:
                    h[step] = rng.random()
                    out.append({"step": step, "entropy": h[step], "epoch": step / 10})
                if step % interval == 0 and step:
                    r[step] = rng.random()
                    (late if is_late else out).append({"step": step, "val_pass1": r[step], "epoch": step / 10})
                if late and rng.random() < 0.3:
                    out.append(late.pop(0))
            out += late
            if stop == length:
                break
            checkpoint = max(rng.randrange(max(checkpoint + 1, stop - 25), stop), 15)
            crashes -= 1
            h, r = ({step: value for step, value in each.items() if step <= checkpoint} for each in (h, r))
        truth.append((h, r))
    return out, truth


@pytest.mark.parametrize("seed", range(40))
def test_runs_that_crash_are_resumed_and_begun_again(tmp_path, seed):
    entries, truth = crashing_runs(random.Random(seed))
    runs = logs.read_logs([jsonl(tmp_path / "log.jsonl", entries)])
    assert len(runs) == len(truth)
    for run, (h, r) in zip(runs, truth, strict=True):
        frame = run.frame.set_index("step")
        assert frame["entropy"].dropna().to_dict() == h
        assert frame["val_pass1"].dropna().to_dict() == r


# --- (c), (d), (f): W&B's exports ------------------------------------------------------------------------------------


def test_wandb_exports_one_metric_per_file_of_runs_with_dashes_in_their_names(tmp_path):
    one, two = course(range(40), 1), course(range(40), 2, a=0.25)
    names = ("qwen2.5 - 7b - grpo", "qwen2.5 - 7b - dapo")
    for file, metric, index in (("h.csv", "actor/entropy", 1), ("r.csv", "val-core/math/acc/mean@8", 2)):
        frame = pd.DataFrame({"Step": one[0]})
        for name, run in zip(names, (one, two), strict=True):
            for ending in ("", "__MIN", "__MAX"):
                frame[f"{name} - {metric}{ending}"] = run[index] + (9 if ending else 0)
        frame.to_csv(tmp_path / file, index=False)
    first, second = fitted(tmp_path / "h.csv", tmp_path / "r.csv")
    assert (first.run, second.run) == names
    check(first, *one[1:])
    check(second, *two[1:])
    assert "h.csv, r.csv are read together: they name the same runs" in first.notes
    assert first.entropy.columns == ("actor/entropy",)
    # (f) a pattern never averages over runs
    for pattern in ("*entropy", "actor/*"):
        fits = fitted(tmp_path / "h.csv", tmp_path / "r.csv", entropy=pattern)
        assert [fit.law.a for fit in fits] == [first.law.a, second.law.a]
    (only,) = fitted(tmp_path / "h.csv", tmp_path / "r.csv", run="*dapo")
    check(only, *two[1:])


def test_wandb_runs_of_one_name_and_runs_of_different_lengths(tmp_path):
    path = tmp_path / "chart.csv"
    path.write_text("Step,a - entropy,a - entropy,b - entropy\n0,0.9,0.8,\n1,0.7,0.6,0.5\n2,0.5,,0.4\n")
    runs = logs.read_logs([path])
    assert {run.name: run.frame["entropy"].tolist() for run in runs} == {
        "a": [0.9, 0.7, 0.5],
        "a (2)": [0.8, 0.6],
        "b": [0.5, 0.4],
    }
    # a table whose owners have no metric in common is no chart of several runs
    path.write_text("step,train - entropy,val - accuracy\n0,0.9,0.1\n1,0.8,0.2\n")
    (run,) = logs.read_logs([path])
    assert list(run.frame.columns) == ["step", "train - entropy", "val - accuracy"]


def test_files_that_complete_each_other_are_one_run_and_others_are_several(tmp_path, capsys):
    steps, h, r = course(range(40))
    train = jsonl(
        tmp_path / "train.jsonl", [{"step": int(s), "epoch": 0, "entropy": x} for s, x in zip(steps, h, strict=True)]
    )
    valid = jsonl(
        tmp_path / "valid.jsonl", [{"step": int(s), "epoch": 0, "val_pass1": y} for s, y in zip(steps, r, strict=True)]
    )
    (fit,) = fitted(train, valid)
    check(fit, h, r)
    assert "train.jsonl, valid.jsonl are read together: they complete each other" in fit.notes
    check(fitted(tmp_path)[0], h, r)
    other = course(range(40), 7, a=0.3)
    for name, run in (("one", (steps, h, r)), ("two", other)):
        (tmp_path / "runs" / name).mkdir(parents=True)
        jsonl(tmp_path / "runs" / name / "metrics.jsonl", rows(*run))
    paths = [tmp_path / "runs" / name / "metrics.jsonl" for name in ("one", "two")]
    fits = fitted(*paths)
    assert [fit.run for fit in fits] == ["one", "two"]
    check(fits[1], *other[1:])
    assert "several logs with metrics in common are taken for several runs" in fits[0].notes
    assert [fit.run for fit in fitted(tmp_path / "runs")] == ["one", "two"]
    assert cli.main(["fit", *map(str, paths), "--json", "--no-plot"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [run["run"] for run in found["runs"]] == ["one", "two"]
    assert found["runs"][1]["law"]["a"] == pytest.approx(law(*other[1:])[0])
    assert found["runs"][0]["log"] == str(paths[0])


def test_tensorboard_downloads_one_scalar_per_file(tmp_path):
    steps, h, r = course(range(30))
    for tag, values in (("train_entropy", h), ("eval_rewards_acc_mean", r)):
        frame = pd.DataFrame({"Wall time": 1.0, "Step": steps, "Value": values})
        frame.to_csv(tmp_path / f"run-grpo-tag-{tag}.csv", index=False)
    (fit,) = fitted(*tmp_path.glob("*.csv"), performance="eval_rewards_acc_mean")
    check(fit, h, r)
    assert (fit.run, fit.entropy.columns) == ("grpo", ("train/entropy",))


def test_train_and_valid_that_share_a_loss_complete_each_other(tmp_path):
    steps, h, r = course(range(30))
    train = [{"step": int(s), "loss": 0.5, "entropy": x} for s, x in zip(steps, h, strict=True)]
    valid = [{"step": int(s), "loss": 0.6, "eval_reward": y} for s, y in zip(steps, r, strict=True)]
    (fit,) = fitted(jsonl(tmp_path / "valid.jsonl", valid), jsonl(tmp_path / "train.jsonl", train))
    check(fit, h, r)


def test_rows_of_evaluation_with_a_step_column_of_their_own(tmp_path):
    steps, h, r = course(range(1, 31))
    entries = []
    for s, x, y in zip(steps.tolist(), h.tolist(), r.tolist(), strict=True):
        entries.append({"train/global_step": s, "train/entropy_loss": x})
        entries.append({"eval/global_step": s, "eval/eval_math_pass1": y})
    (fit,) = fitted(jsonl(tmp_path / "log.jsonl", entries))
    check(fit, h, r)
    assert fit.notes == []


def test_wandbs_table_of_runs_is_no_run(tmp_path):
    path = tmp_path / "project.csv"
    path.write_text("Name,State,entropy,val_pass1\n" + "".join(f"run-{i},finished,0.{9 - i},0.{i}\n" for i in range(5)))
    with pytest.raises(LogError, match=r"none of 5 runs can be fitted; run-0: .*at least 3 steps"):
        fitted(path)


def test_an_entropy_that_is_never_finite_is_named(tmp_path):
    entries = [{"step": s, "entropy": math.nan, "reward": s / 10} for s in range(9)]
    with pytest.raises(LogError, match=r"no known entropy metric.*; never finite: entropy$"):
        fitted(jsonl(tmp_path / "log.jsonl", entries))


# --- (g): folders and consoles ---------------------------------------------------------------------------------------


def trainer_state(path, steps, h, r):
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"log_history": rows(steps, h, r, performance="eval_reward")}))


def test_trl_output_folder_the_newest_checkpoint_has_all(tmp_path):
    steps, h, r = course(range(0, 200, 10))
    for count in (9, 20, 5):  # 90 is no newer than 200 by its name
        trainer_state(tmp_path / f"checkpoint-{count * 10}" / "trainer_state.json", *(v[:count] for v in (steps, h, r)))
    (fit,) = fitted(tmp_path)
    check(fit, h, r)
    # several such folders are several runs
    trainer_state(tmp_path / "x" / "a" / "checkpoint-190" / "trainer_state.json", steps, h, r)
    trainer_state(tmp_path / "x" / "b" / "checkpoint-190" / "trainer_state.json", steps, h, r)
    assert [fit.run for fit in fitted(tmp_path / "x")] == ["a", "b"]


def test_trl_dicts_between_progress_bars(tmp_path):
    steps, h, r = course(range(10, 310, 10))
    lines = ["Map: 100%|####| 999/999 [00:00<00:00, 9 examples/s]", "  0%|          | 0/300 [00:00<?, ?it/s]"]
    for s, x, y in zip(steps.tolist(), h.tolist(), r.tolist(), strict=True):
        bars = "".join(f"\r {s // 3}%|## | {i}/300 [00:10<01:30,  1.00s/it]" for i in range(s - 9, s + 1))
        values = {"loss": "0.01", "entropy": f"{x:.17g}", "epoch": f"{s / 300:.4g}", "tag": "x"}
        lines.append(f"{bars}\x1b[A\n {values}")
        lines += [f"\r 50%|# | {i}/4 [00:00<00:01]" for i in range(1, 5)]  # the evaluation's own bar
        lines.append(f"{{'eval_loss': nan, 'eval_reward': np.float64({y!r}), 'epoch': {s / 300}}}")
    path = tmp_path / "train.log"
    path.write_text("\n".join(lines))
    (fit,) = fitted(path)
    check(fit, h, r)
    assert fit.points["step"].tolist() == steps.tolist()
    # without bars the rows are numbered, and the pairs are the same
    path.write_text(
        "\n".join(line for line in lines if "{" in line and "|" not in line.split("{")[0]).replace("\x1b[A", "")
    )
    assert logs.read_log(path)["eval_reward"].notna().sum() == 30


def test_dicts_of_slime_and_lines_of_prime_rl(tmp_path):
    path = tmp_path / "out.log"
    path.write_text(
        "".join(
            f"(RolloutManager pid=7) [2026-08-21] m.py:9 - step {s}: {{'train/entropy_loss': {0.9 - s / 50}, "
            f"'train/step': {s}}}\n[2026-08-21] eval {s}: {{'eval/aime-2024': {s / 40}, 'eval/aime-2024/a/b': 7}}\n"
            for s in range(20)
        )
    )
    (fit,) = fitted(path)
    assert (fit.entropy.columns, fit.performance.columns) == (("train/entropy_loss",), ("eval/aime-2024",))
    assert fit.points["step"].tolist() == list(range(20))
    assert not fit.performance.training
    path.write_text(
        "".join(
            f"\x1b[32m12:00:0{s % 10}\x1b[0m SUCCESS Step {s} |   3.42s | Entropy {0.9 - s / 50} | LR 1e-06 | "
            f"MFU 31.0%\n   Micro Step 0/2 | Loss 0.1 | Entropy 7.0\n"
            for s in range(20)
        )
    )
    assert logs.read_log(path)["Entropy"].tolist() == pytest.approx([0.9 - s / 50 for s in range(20)])


def write_mlflow(folder, name, steps, h, r, loss_mode="vanilla"):
    for key, values in (("actor/entropy", h), ("val-core/math/acc/mean_at_8", r)):
        file = folder / "metrics" / key
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(
            "".join(f"{1700000000000 + int(s)} {x!r} {s}\n" for s, x in zip(steps, values.tolist(), strict=True))
        )
    (folder / "meta.yaml").write_text(f"artifact_uri: x\nrun_name: {name}\n")
    mode = folder / "params" / "actor_rollout_ref" / "actor" / "policy_loss" / "loss_mode"
    mode.parent.mkdir(parents=True)
    mode.write_text(loss_mode)


@pytest.mark.parametrize("mode", ["clip_cov", "ek_clip_cov"])
def test_mlflow_folders(mode, tmp_path):
    one, two = course(range(40), 1), course(range(40), 2, a=0.25)
    write_mlflow(tmp_path / "mlruns" / "0" / "abc", "grpo - 7b", *one)
    write_mlflow(tmp_path / "mlruns" / "0" / "def", "theirs", *two, loss_mode=mode)
    (tmp_path / "mlruns" / "0" / "meta.yaml").write_text("name: experiment\n")
    (tmp_path / "mlruns" / ".trash").mkdir()
    for folder in (tmp_path, tmp_path / "mlruns", tmp_path / "mlruns" / "0"):
        first, second = fitted(folder)
        assert (first.run, second.run) == ("grpo - 7b", "theirs")
        check(first, *one[1:])
        check(second, *two[1:])
    (only,) = fitted(tmp_path / "mlruns" / "0" / "abc")
    check(only, *one[1:])
    write_mlflow(tmp_path / "mlruns" / "0" / "0123456789", "theirs", *one)  # another run of that name
    assert [fit.run for fit in fitted(tmp_path)] == ["theirs (01234567)", "grpo - 7b", "theirs (def)"]
    assert (first.no_bound, len(second.no_bound)) == ([], 1)
    assert f"Clip-Cov (setting actor_rollout_ref/actor/policy_loss/loss_mode = {mode})" in second.no_bound[0]


def test_tensorboard_files_of_one_folder_resumed_or_begun_again(tmp_path):
    _, h, r = course(range(60))

    def write(suffix, rows_of):
        with SummaryWriter(tmp_path, filename_suffix=suffix) as writer:
            for i in rows_of:
                writer.add_scalar("train/entropy", h[i], i)
                writer.add_scalar("eval/reward", r[i], i)

    write(".0", range(40))
    write(".1", range(30, 60))
    (run,) = logs.read_logs([tmp_path])
    np.testing.assert_allclose(run.frame["train/entropy"], h, rtol=1e-6)
    assert any("resumed" in note for note in run.notes)
    write(".2", range(60))
    assert [len(run.frame) for run in logs.read_logs([tmp_path])] == [60, 60]


def test_what_lies_beside_a_log_is_no_run(tmp_path):
    steps, h, r = course(range(40))
    jsonl(tmp_path / "metrics.jsonl", rows(steps, h, r))
    jsonl(
        tmp_path / "completions.jsonl", [{"step": 1, "length": 4, "text": "x"}, {"step": 1, "length": 5, "text": "y"}]
    )
    jsonl(tmp_path / "samples.jsonl", ["nothing\n", "of JSON\n"])
    (fit,) = fitted(tmp_path)
    check(fit, h, r)
    assert any("samples.jsonl" in note and "left out" in note for note in fit.notes)
    for name, words in (("run.wandb", "export the run's charts"), ("history.parquet", "Parquet is not read")):
        (tmp_path / name).write_bytes(b"W&B\0")
        with pytest.raises(LogError, match=words):
            logs.read_logs([tmp_path / name])


# --- (h): long logs --------------------------------------------------------------------------------------------------


def test_pairs_are_those_of_their_definition():
    rng = np.random.default_rng(0)
    for _ in range(60):
        n = int(rng.integers(1, 40))
        steps = np.sort(rng.choice(200, n, replace=False)).astype(float)
        h = np.where(rng.random(n) < 0.5, rng.random(n), np.nan)
        r = np.where(rng.random(n) < 0.4, rng.random(n), np.nan)
        log = pd.DataFrame({"step": steps, "entropy": h, "val_pass1": r})
        evaluated = np.flatnonzero(~np.isnan(r))
        for align in ("last", "mean"):
            expected, before = [], -np.inf
            for position, i in enumerate(evaluated):
                window = h[(steps > before) & (steps <= steps[i]) & ~np.isnan(h)]
                if not len(window) and position == 0:
                    until = steps[evaluated[1]] if len(evaluated) > 1 else np.inf
                    window = h[(steps > steps[i]) & (steps <= until) & ~np.isnan(h)][:1]
                before = steps[i]
                if len(window):
                    expected.append((steps[i], window[-1] if align == "last" else window.mean(), r[i]))
            found = logs.pairs(log, align=align)
            np.testing.assert_allclose(found.to_numpy(), np.array(expected).reshape(-1, 3), rtol=1e-12)
            assert found.attrs["unpaired"] == len(evaluated) - len(expected)


def test_pairing_and_drawing_grow_with_the_points_not_with_their_square(monkeypatch):
    n = 200_000
    log = pd.DataFrame({"step": np.arange(n), "entropy": np.linspace(1, 0, n), "val_pass1": np.linspace(0, 1, n)})
    compared = []
    monkeypatch.setattr(logs.np, "searchsorted", lambda *a, **k: compared.append(a) or np.ndarray.searchsorted(*a, **k))
    assert len(logs.pairs(log, align="mean")) == n
    assert len(compared) == 1  # one sorted search for all evaluations
    fit = report._fit(logs.Run("x", log, ()), None, None, 0.15, "last", 0.95, "ols")
    from entropy_kernels.analysis.plots import fit_figure

    figure = fit_figure(fit.points["entropy"], fit.points["performance"], fit.law, extrapolated=fit.extrapolated)
    assert max(len(c.get_offsets()) for c in figure.axes[0].collections) == 3000


def test_progress_goes_up_to_the_whole(tmp_path):
    path = jsonl(tmp_path / "log.jsonl", [{"step": s, "entropy": 0.5, "text": "x" * 3000} for s in range(2000)])
    seen = []
    other = tmp_path / "other.jsonl"
    other.write_bytes(path.read_bytes())
    logs.read_logs([path, other], progress=lambda done, total: seen.append((done, total)))
    assert len(seen) > 4
    assert seen == sorted(seen)
    assert seen[-1] == (2 * path.stat().st_size, 2 * path.stat().st_size)


# --- anything --------------------------------------------------------------------------------------------------------


LOG = "".join(json.dumps(row) + "\n" for row in rows(*course(range(12))))
CSV = pd.DataFrame(rows(*course(range(12)))).to_csv(index=False)
CONSOLE = "".join(f"10%|# | {s}/12 [0s] {{'entropy': '{0.9 - s / 20}', 'reward': {s / 20}}}\n" for s in range(12))
VERL = "".join(f"step:{s} - actor/entropy:{0.9 - s / 20} - val-core/x/acc/mean@1:np.float64(0.1)\n" for s in range(12))


@pytest.mark.parametrize(("name", "text"), [("a.jsonl", LOG), ("a.csv", CSV), ("a.log", CONSOLE), ("a.txt", VERL)])
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
@given(data=st.data())
def test_a_log_that_is_cut_or_spoilt_anywhere_reads_or_is_refused_in_a_line(tmp_path, name, text, data):
    raw = bytearray(text.encode())
    begin = data.draw(st.integers(0, len(raw)))
    end = data.draw(st.integers(begin, min(len(raw), begin + 200)))
    raw[begin:end] = data.draw(st.binary(max_size=4) | st.text(string.printable, max_size=6).map(str.encode))
    path = tmp_path / name
    path.write_bytes(raw)
    try:
        runs = logs.read_logs([path])
    except LogError as error:
        assert "\n" not in str(error)
        return
    for run in runs:
        assert run.frame["step"].is_monotonic_increasing
        assert not np.isinf(run.frame.drop(columns="step").to_numpy()).any()


def test_a_log_that_is_named_twice_counts_once(tmp_path):
    steps, h, r = course(range(30))
    log = jsonl(tmp_path / "log.jsonl", rows(steps, h, r))
    (fit,) = fitted(log, tmp_path, tmp_path / "." / "log.jsonl")
    check(fit, h, r)

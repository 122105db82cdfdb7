"""Readers on logs in the shapes that trainers write, the choice of metrics, and the pairing of evaluations."""

import json
import math

import numpy as np
import pandas as pd
import pytest
from torch.utils.tensorboard import SummaryWriter

from entropy_kernels.analysis import logs
from entropy_kernels.analysis.metric_names import LogError, find_entropy, find_performance

STEPS = np.arange(0, 41)


def entropy_at(step):
    return 0.2 + 0.7 * math.exp(-step / 15)


def performance_at(step):
    return 0.6 - 0.15 * math.exp(entropy_at(step))


def rows(entropy="actor/entropy", performance="val-core/math/acc/mean@8", every=5):
    for step in STEPS:
        yield step, {entropy: entropy_at(step)}, {performance: performance_at(step)} if step % every == 0 else {}


def check(log, entropy="actor/entropy", performance="val-core/math/acc/mean@8", every=5, tolerance=1e-12):
    """The log holds what ``rows`` wrote."""
    assert log["step"].tolist() == STEPS.tolist()
    assert log["step"].dtype == float
    np.testing.assert_allclose(log[entropy], [entropy_at(s) for s in STEPS], rtol=tolerance)
    evaluated = log[performance].dropna()
    assert log.loc[evaluated.index, "step"].tolist() == STEPS[::every].tolist()
    np.testing.assert_allclose(evaluated, [performance_at(s) for s in STEPS[::every]], rtol=tolerance)


def test_csv_with_empty_cells_and_text_columns(tmp_path):
    path = tmp_path / "log.csv"
    pd.DataFrame([{"step": s, "note": "ok", **h, **r} for s, h, r in rows()]).to_csv(path, index=False)
    log = logs.read_log(path)
    check(log)
    assert "note" not in log.columns


def test_tsv(tmp_path):
    path = tmp_path / "log.tsv"
    pd.DataFrame([{"step": s, **h, **r} for s, h, r in rows()]).to_csv(path, index=False, sep="\t")
    check(logs.read_log(path))


def test_wandb_chart_export_loses_its_prefix_and_its_extremes(tmp_path):
    path = tmp_path / "wandb.csv"
    frame = pd.DataFrame(
        {
            "Step": STEPS,
            "my run - actor/entropy": [entropy_at(s) for s in STEPS],
            "my run - actor/entropy__MIN": 0.0,
            "my run - actor/entropy__MAX": 9.0,
            "my run - _step": STEPS,
        }
    )
    frame.to_csv(path, index=False)
    log = logs.read_log(path)
    assert [c for c in log.columns if "entropy" in c] == ["actor/entropy"]
    np.testing.assert_allclose(log["actor/entropy"], [entropy_at(s) for s in STEPS])


def test_jsonl_merges_rows_of_one_step(tmp_path):
    path = tmp_path / "log.jsonl"
    with path.open("w") as file:
        for s, h, r in rows():
            file.write(json.dumps({"step": int(s), **h}) + "\n")
            if r:
                file.write(json.dumps({"step": int(s), **r}) + "\n")
    check(logs.read_log(path))


def test_verl_file_logger_nests_under_data(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text("".join(json.dumps({"step": int(s), "data": {**h, **r}}) + "\n" for s, h, r in rows()))
    check(logs.read_log(path))


def test_nested_objects_are_joined_and_lists_left_out(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text(json.dumps({"step": 1, "actor": {"entropy": 0.5}, "table": [1, 2], "text": "x"}) + "\n")
    assert logs.read_log(path).to_dict("records") == [{"step": 1.0, "actor/entropy": 0.5}]


def test_resumed_run_the_later_rows_win(tmp_path):
    path = tmp_path / "log.jsonl"
    values = [(0, 0.9), (1, 0.8), (2, 0.1), (1, 0.75), (2, 0.7), (3, 0.6)]
    path.write_text("".join(json.dumps({"step": s, "entropy": h}) + "\n" for s, h in values))
    log = logs.read_log(path)
    assert log["step"].tolist() == [0, 1, 2, 3]
    assert log["entropy"].tolist() == [0.9, 0.75, 0.7, 0.6]


def test_a_cut_off_last_line_is_left_out_and_told(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 0, "entropy": 0.9}\n{"step": 1, "entropy": 0.8}\n{"step": 2, "ent')
    log = logs.read_log(path)
    assert len(log) == 2
    assert "line 3 of log.jsonl is cut off" in log.attrs["notes"][0]


def test_trainer_state_of_transformers(tmp_path):
    path = tmp_path / "trainer_state.json"
    history = []
    for s in STEPS:
        history.append({"step": int(s), "entropy": entropy_at(s), "epoch": s / 40})
        if s % 5 == 0:
            history.append({"step": int(s), "eval_reward": performance_at(s)})
    path.write_text(json.dumps({"best_metric": None, "log_history": history}))
    check(logs.read_log(path), "entropy", "eval_reward")


def test_verl_console_output(tmp_path):
    path = tmp_path / "train.log"
    lines = ["Training Progress:   0%| | 0/40"]
    for s, h, r in rows():
        # as numpy >= 2 prints its scalars, behind Ray's coloured prefix
        items = [f"{k}:np.float64({v})" for k, v in r.items()] + [f"{k}:{v}" for k, v in h.items()]
        lines.append(f"\x1b[36m(TaskRunner pid=123)\x1b[0m step:{s} - training/epoch:0 - " + " - ".join(items))
    path.write_text("\n".join(lines))
    check(logs.read_log(path))


def write_events(folder, entropy="train/entropy", performance="eval/reward"):
    with SummaryWriter(folder) as writer:
        for s, h, r in rows(entropy, performance):
            for name, value in {**h, **r}.items():
                writer.add_scalar(name, value, int(s))
        writer.add_text("config", "not a scalar", 0)


def test_tensorboard_directory_and_file(tmp_path):
    write_events(tmp_path)
    for path in (tmp_path, next(tmp_path.glob("*tfevents*"))):
        check(logs.read_log(path), "train/entropy", "eval/reward", tolerance=1e-6)


def test_tensorboard_keeps_every_event_and_new_style_scalars(tmp_path):
    with SummaryWriter(tmp_path) as writer:
        for step in range(12_001):  # the reader's default keeps a sample of 10 000
            writer.add_scalar("entropy", 1.0 / (1 + step), step)
        for step in range(3):
            writer.add_scalar("reward", 0.5 * step, step, new_style=True)
    log = logs.read_log(tmp_path)
    assert len(log) == 12_001
    assert log["reward"].dropna().tolist() == [0.0, 0.5, 1.0]


def test_tensorboard_resumed_into_a_second_file(tmp_path):
    for part, (first, last, value) in enumerate([(0, 6, 0.5), (4, 10, 0.25)]):
        with SummaryWriter(tmp_path, filename_suffix=f".{part}") as writer:
            for step in range(first, last):
                writer.add_scalar("entropy", value, step)
    log = logs.read_log(tmp_path)
    assert log["step"].tolist() == list(range(10))
    assert log["entropy"].iloc[-1] == 0.25


def test_directory_with_one_sub_run_or_one_file(tmp_path):
    write_events(tmp_path / "runs" / "Nov23")
    check(logs.read_log(tmp_path), "train/entropy", "eval/reward", tolerance=1e-6)
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "entropy": 0.5}\n')
    assert logs.read_log(tmp_path)["entropy"].tolist() == [0.5]


def test_directory_with_several_runs_lists_them(tmp_path):
    write_events(tmp_path / "a")
    write_events(tmp_path / "b")
    with pytest.raises(LogError, match="holds 2 runs; name one: a, b"):
        logs.read_log(tmp_path)


def test_step_columns_and_their_absence(tmp_path):
    path = tmp_path / "log.csv"
    # W&B's _step counts log() calls; the trainer's own counter is preferred
    path.write_text("_step,train/global_step,entropy\n0,10,0.9\n1,20,0.8\n2,30,0.7\n")
    assert logs.read_log(path)["step"].tolist() == [10, 20, 30]
    # ... unless some rows lack it
    path.write_text("_step,train/global_step,entropy\n0,10,0.9\n1,,0.8\n2,30,0.7\n")
    assert logs.read_log(path)["step"].tolist() == [0, 1, 2]
    path.write_text("entropy\n0.9\n0.8\n")
    log = logs.read_log(path)
    assert log["step"].tolist() == [0, 1]
    assert "no step column" in log.attrs["notes"][0]
    path.write_text("step,entropy\n0,0.9\n,0.8\n2,0.7\n")
    log = logs.read_log(path)
    assert log["step"].tolist() == [0, 2]
    assert "1 of 3 rows have no step" in log.attrs["notes"][0]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "", "is empty"),
        ("a.csv", "step,entropy\n", "has no rows"),
        ("a.csv", 'a,b\n1,2\n1,2,3,4\n"', "is not CSV"),
        ("a.csv", "name\nx\n", "has no numeric columns"),
        ("a.csv", f"step,x\n{10**400},{10**400}\n", "has no numeric columns"),
        ("a.csv", '"two\nlines",x\n"y",a\n', "has no numeric columns"),
        ("a.jsonl", "\n\n", "has no rows"),
        ("a.jsonl", "nonsense\n", "line 1: not JSON, as 1 lines of 1"),
        ("a.jsonl", "[1, 2]\n", "line 1: expected an object, got list"),
        ("a.json", "{", "is not JSON"),
        ("a.json", "[1]", "expected a list of objects"),
        ("a.txt", "hello\n", "expected CSV, JSON lines, TensorBoard events or verl's"),
        ("a.log", b"\xff\xfe\x00", "is not text"),
        ("events.out.tfevents.1", b"garbage", "holds no TensorBoard scalars"),
    ],
)
def test_unreadable_logs(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(LogError, match=message):
        logs.read_log(path)


def test_missing_and_empty_paths(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file or directory"):
        logs.read_log(tmp_path / "nope.csv")
    with pytest.raises(LogError, match="holds no log"):
        logs.read_log(tmp_path)


def test_what_a_folder_holds_besides_is_read_or_named(tmp_path):
    line = "step:{} - actor/entropy:0.5 - critic/score/mean:0.{}\n"
    (tmp_path / "console.log").write_text("".join(line.format(i, i) for i in range(1, 5)))
    assert logs.read_log(tmp_path)["step"].tolist() == [1, 2, 3, 4]  # there is nothing better
    for folder in ("", "other", "checkpoint-4", "wandb"):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / ("notes.txt" if folder == "wandb" else "log.csv")).write_text("step,entropy\n1,0.5\n")
    (run,) = logs.read_logs([tmp_path])
    assert [path.name for path in run.paths] == ["log.csv"]
    said = "holds console.log, other/ as well, which is not read: name what is to be read"
    assert run.notes == [f"{tmp_path} {said}"]
    named = logs.read_logs([tmp_path, tmp_path / "console.log", tmp_path / "other"])
    assert not any("as well" in note for run in named for note in run.notes)


# Columns of a log; the entropy comes first, the performance that is to be found second.
@pytest.mark.parametrize(
    ("columns", "training"),
    [
        ("entropy val_pass1 val_pass8 reward", False),
        ("train/entropy train/val_pass1 train/val_pass8 train/reward train/val_entropy", False),
        (
            "actor/entropy val-core/aime/acc/mean@32 actor/entropy_loss critic/score/mean "
            "val-core/aime/acc/best@32/mean val-core/aime/acc/maj@32/mean val-aux/aime/reward/mean@32",
            False,
        ),
        ("actor/entropy_loss val/test_score/openai/gsm8k critic/score/mean", False),
        ("actor/entropy val-core/gsm8k/reward/mean_at_1 critic/score/mean", False),
        ("actor/entropy critic/score/mean critic/score/max critic/rewards/mean", True),
        ("entropy eval_reward reward reward_std rewards/accuracy/mean eval_entropy", False),
        ("train/entropy eval/reward train/reward eval/entropy", False),
        ("entropy rewards/accuracy/mean rewards/accuracy/std", True),
        ("policy/policy_entropy eval/all/avg_score reward/avg_raw_reward eval/math/avg_score", False),
    ],
)
def test_names_of_the_trainers_are_known(columns, training):
    entropy, performance, *_ = columns.split()
    columns = sorted(columns.split())
    assert find_entropy(columns).columns == (entropy,)
    found = find_performance(columns)
    assert (found.columns, found.training) == ((performance,), training)


def test_ambiguous_names_are_listed():
    columns = ["actor/entropy", "val-core/aime/acc/mean@32", "val-core/math/acc/mean@1"]
    with pytest.raises(LogError) as error:
        find_performance(columns)
    for part in ("val-core/aime/acc/mean@32", "val-core/math/acc/mean@1", "--performance"):
        assert part in str(error.value)


def test_patterns_average_columns_where_all_are_there():
    log = pd.DataFrame({"step": [0, 1], "val/a/mean": [0.2, 0.4], "val/b/mean": [0.4, math.nan]})
    metric = find_performance(list(log.columns), "val/*/mean")
    assert metric.columns == ("val/a/mean", "val/b/mean")
    values = metric.values(log)
    assert values[0] == pytest.approx(0.3)
    assert math.isnan(values[1])
    assert metric.name == "mean of val/a/mean, val/b/mean"


def test_missing_names_list_the_columns_that_exist():
    columns = ["loss", "policy_entropy_mean", *[f"other_{i:02}" for i in range(60)]]
    with pytest.raises(LogError) as error:
        find_entropy(columns)
    text = str(error.value)
    assert "--entropy" in text
    assert text.index("policy_entropy_mean") < text.index("loss")
    assert "and 22 more" in text
    with pytest.raises(LogError, match=r"--performance: no column 'acc' in the log; it has loss"):
        find_performance(["loss"], "acc")


def frame(entropies, performances):
    steps = sorted({*entropies, *performances})
    return pd.DataFrame(
        {
            "step": [float(s) for s in steps],
            "entropy": [entropies.get(s, math.nan) for s in steps],
            "val_pass1": [performances.get(s, math.nan) for s in steps],
        }
    )


def test_pairs_last_and_mean():
    log = frame({s: s / 100 for s in range(1, 11)}, {0: 0.1, 4: 0.2, 8: 0.3, 10: 0.4})
    last = logs.pairs(log)
    # step 0 was evaluated before the first entropy and takes it
    assert last["step"].tolist() == [0, 4, 8, 10]
    assert last["entropy"].tolist() == pytest.approx([0.01, 0.04, 0.08, 0.10])
    assert last["performance"].tolist() == [0.1, 0.2, 0.3, 0.4]
    assert last.attrs["unpaired"] == 0
    mean = logs.pairs(log, align="mean")
    assert mean["entropy"].tolist() == pytest.approx([0.01, 0.025, 0.065, 0.095])


def test_pairs_of_steps_that_never_meet():
    log = frame({1: 0.9, 11: 0.5, 12: 0.4, 35: 0.3}, {10: 0.1, 20: 0.2, 30: 0.25, 40: 0.3})
    pairs = logs.pairs(log)
    # nothing was logged between 20 and 30: the entropy of step 12 would be stale there
    assert pairs["step"].tolist() == [10, 20, 40]
    assert pairs["entropy"].tolist() == [0.9, 0.4, 0.3]
    assert pairs.attrs["unpaired"] == 1


def test_pairs_of_dense_metrics_are_the_rows():
    log = frame({s: s / 10 for s in range(5)}, {s: s / 20 for s in range(5)})
    pairs = logs.pairs(log)
    assert pairs["entropy"].tolist() == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    assert logs.pairs(log, align="mean")["entropy"].tolist() == pairs["entropy"].tolist()


def test_pairs_takes_series_and_refuses_other_modes():
    log = frame({0: 0.5, 1: 0.4}, {1: 0.2})
    pairs = logs.pairs(log, log["entropy"] * 2, log["val_pass1"])
    assert pairs["entropy"].tolist() == [0.8]
    assert len(logs.pairs(frame({0: 0.1}, {}))) == 0
    with pytest.raises(ValueError, match="align: expected one of 'last', 'mean', got 'nearest'"):
        logs.pairs(log, align="nearest")

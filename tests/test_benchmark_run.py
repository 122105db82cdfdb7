"""A run from outside: deadlines, stops, new beginnings keep what there is; documents, tables of the docs, peers."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import entropy_kernels as ek
from benchmarks import measure, ours, packages, plots, report, results, run
from benchmarks.cases import GRID, GRID_QUICK, QUICK
from benchmarks.ours import REGISTRY
from benchmarks.results import Measured, Record
from benchmarks.run import main
from benchmarks.timing import Bandwidth
from waiting import Clock

SMALL = ["--quick", "--shape", "6,97", "--tokens", "2000", "--repeats", "1", "--threads", "1", "--cache", "hot"]


figures = plots.figures


@pytest.fixture(autouse=True)
def _run(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Where main runs: without a time limit, and without the seconds (on a busy machine, minutes) of copies, plots."""
    monkeypatch.setattr(run, "QUICK_SECONDS", 1e9)
    monkeypatch.setattr(plots, "figures", lambda head, measured: ())
    monkeypatch.setattr(run, "measure_bandwidth", lambda device: Bandwidth(1e10, 2e10, 1))
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def _document(folder: Path) -> dict:
    return json.loads((folder / "bench.json").read_text())


def _rows(document: dict) -> dict[tuple, dict]:
    return {(r["op"], r["implementation"], r["shape"], r["cache"]): r for g in document["groups"] for r in g["records"]}


# --- what is cut off --------------------------------------------------------------------------------------------------


def test_a_deadline_keeps_what_was_measured_and_names_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, begun = run.run_group, []

    def slow(group, settings, *rest):
        begun.append(group.title)
        found = original(group, settings, *rest)
        if len(begun) == 2:  # the time is up in the second group
            monkeypatch.setattr(measure.Settings, "out_of_time", property(lambda self: True))
        return found

    monkeypatch.setattr(run, "run_group", slow)
    arguments = [*SMALL, "--impl", "eager,topk,eager-topk", "--output", str(tmp_path), "--seconds", "1000"]
    assert main(arguments) == 0
    document = _document(tmp_path)
    assert [group["title"] for group in document["groups"]] == begun and len(begun) == 2
    assert not document["complete"] and document["why_incomplete"] == "its time was up"
    assert len(document["not_reached"]) >= 4 and all(row["summary"] for row in _rows(document).values())
    assert "**Cut off**: its time was up" in (tmp_path / "bench.md").read_text()


def test_a_deadline_within_a_group_skips_its_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "QUICK_SECONDS", 1e-9)
    assert main([*SMALL, "--impl", "topk", "--output", str(tmp_path)]) == 0
    document = _document(tmp_path)
    assert document["groups"] == [] and len(document["not_reached"]) >= 5 and not document["complete"]


def test_a_stopped_run_writes_what_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, begun = run.run_group, []

    def stopped(group, *rest):
        begun.append(group.title)
        if len(begun) == 2:
            run.signal.raise_signal(run.signal.SIGTERM)
        return original(group, *rest)

    monkeypatch.setattr(run, "run_group", stopped)
    assert main([*SMALL, "--impl", "eager", "--output", str(tmp_path)]) == 0
    document = _document(tmp_path)
    assert [group["title"] for group in document["groups"]] == begun[:1]
    assert document["why_incomplete"] == "it was stopped" and document["not_reached"][0] == begun[1]


def test_the_document_is_written_after_every_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, seen = run.run_group, []

    def looked(group, *rest):
        if (tmp_path / "bench.json").exists():
            seen.append(len(_document(tmp_path)["groups"]))
        return original(group, *rest)

    monkeypatch.setattr(run, "run_group", looked)
    monkeypatch.setattr(run, "WRITE_EVERY", 0.0)
    main([*SMALL, "--impl", "topk", "--ops", "tokens_roofline,kl_cov_mask", "--output", str(tmp_path)])
    assert seen == sorted(seen) and seen[-1] >= 2


def test_resume_measures_only_what_is_missing(tmp_path: Path) -> None:
    arguments = [*SMALL, "--output", str(tmp_path), "--ops", "tokens_roofline,kl_cov_mask"]
    main([*arguments, "--impl", "topk"])
    before = _rows(_document(tmp_path))
    main([*arguments, "--impl", "topk,eager-topk", "--resume"])
    after = _rows(_document(tmp_path))
    assert set(after) > set(before) and {key[1] for key in set(after) - set(before)} == {"eager-topk"}
    assert all(after[key]["samples"] == row["samples"] for key, row in before.items())
    assert _document(tmp_path)["complete"]


def test_resume_mixes_no_runs(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """The head of the document speaks for all of its rows."""
    arguments = [*SMALL, "--output", str(tmp_path), "--ops", "tokens_roofline", "--impl", "topk"]
    main(arguments)
    monkeypatch.setenv("ENTROPY_KERNELS_COMMIT", "another")
    document = (tmp_path / "bench.json").read_text()
    for text, error in (
        (document, "is of another commit"),
        (document[:99], "cannot be read"),
        ("{}", "cannot be read"),
    ):
        (tmp_path / "bench.json").write_text(text)
        with pytest.raises(SystemExit):
            main([*arguments, "--resume"])
        assert error in capsys.readouterr().err
        assert (tmp_path / "bench.json").read_text() == text


def test_an_output_that_is_a_file_is_refused_before_measuring(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit):
        main([*SMALL, "--output", str(tmp_path / "file")])
    assert "--output: expected a folder" in capsys.readouterr().err


def test_a_lost_device_is_written_and_a_new_process_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = Record("kl_cov_mask", "eager-topk", "peer", "s", "fp32", "cuda", "hot", status="failed", reason="illegal")

    def lost(group, *rest):
        raise measure.DeviceLost("kl_cov_mask eager-topk: illegal", [broken])

    begun = []
    monkeypatch.setattr(run, "run_group", lost)
    monkeypatch.setattr(run.os, "execv", lambda path, arguments: begun.append(arguments))
    main([*SMALL, "--impl", "topk", "--output", str(tmp_path)])
    document = _document(tmp_path)
    assert document["groups"][0]["records"][0]["reason"] == "illegal" and "lost" in document["why_incomplete"]
    assert begun and begun[0][-1] == "--resume"


# --- plans and arguments ----------------------------------------------------------------------------------------------


def test_a_gpu_runs_the_grid_by_default() -> None:
    def plan(*arguments: str, device: str) -> object:
        return run.plan_of(run.parser().parse_args(arguments), torch.device(device))

    assert plan(device="cuda") == GRID and plan("--quick", device="cuda") == GRID_QUICK
    assert plan("--quick", device="cpu") == QUICK
    assert plan("--grid", device="cpu").logits == GRID.logits and plan("--grid", device="cpu").by_value
    with pytest.raises(SystemExit):
        run.parser().parse_args(["--seconds", "-3"])


# --- documents --------------------------------------------------------------------------------------------------------


def test_a_document_reads_back_what_was_written(tmp_path: Path) -> None:
    record = Record(
        "token_stats", "ours-cuda", "ours", "8×9", "bf16", "cuda", "hot", size={"rows": 8, "vocab": 9},
        samples=[1e-3, 2.5, 3e-9], summary={"median": 1e-3}, cold={"median": 2e-3}, syncs=0, graph={"equal": True},
    )  # fmt: skip
    results.write(tmp_path / "bench.json", results.as_document({"time": "now"}, [Measured("G", False, [record])]))
    head, groups = results.read(tmp_path / "bench.json")
    assert groups == [Measured("G", False, [record])] and head["time"] == "now" and head["format"] == results.FORMAT
    assert "[ 0.001, 2.5, 3e-09 ]" in (tmp_path / "bench.json").read_text()
    document = _document(tmp_path)
    (tmp_path / "bench.json").write_text(json.dumps({**document, "format": results.FORMAT + 1}))
    with pytest.raises(ValueError, match="expected format"):
        results.read(tmp_path / "bench.json")


def test_documents_of_earlier_formats_are_read(tmp_path: Path) -> None:
    """What they called bars, floors and limits."""
    record = {"op": "tokens_floor", "implementation": "topk", "role": "limit", "shape": "9", "dtype": "fp32"}
    group = {"title": "G", "records": [{**record, "device": "cpu", "cache": "hot", "of_another_time": 1}]}
    (tmp_path / "bench.json").write_text(json.dumps({"format": 2, "bars": [1], "groups": [group]}))
    head, (part,) = results.read(tmp_path / "bench.json")
    assert head["targets"] == [1] and not part.host
    assert (part.records[0].op, part.records[0].role) == ("tokens_roofline", "roofline")


def test_a_machine_has_its_newest_run_only() -> None:
    """A folder is named after its machine, with what its run was restricted to behind it; no row stands twice."""
    seen: dict[tuple, Path] = {}
    for path in sorted(results.RESULTS.glob("*/bench.json")):
        head, groups = results.read(path)
        machine = head["machine"]["machine"]
        assert path.parent.name.startswith(machine)
        for record in (record for group in groups for record in group.records if record.summary):
            key = (machine, *record.key)
            assert key not in seen, f"{path}: {key} stands in {seen[key]} too"
            seen[key] = path
    assert len(seen) > 100


def test_reports_are_made_from_the_document_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, blank_figures: None
) -> None:
    main([*SMALL, "--grid", "--shape", "6,151", "--impl", "eager,torch-ce", "--output", str(tmp_path)])
    text = (tmp_path / "bench.md").read_text()
    (tmp_path / "bench.md").unlink()
    assert not [*tmp_path.glob("*.png")]
    monkeypatch.setattr(plots, "figures", figures)
    (tmp_path / "thesis.png").write_text("x")
    assert report.main([str(tmp_path)]) == 0 and (tmp_path / "bench.md").read_text() == text
    for name in ("bandwidth", "time", "memory", "error_vocabulary"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "thesis.png").read_text() == "x"


def test_files_in_the_way_of_results(tmp_path: Path) -> None:
    (tmp_path / "thesis.png").write_text("x")
    assert report.in_the_way(tmp_path) is None
    for name in ("error.png", "bench.md", "bench.json"):
        (tmp_path / name).write_text("[]")
        assert report.in_the_way(tmp_path) == name
    for users in (
        '{"groups": {}}',
        '["groups"]',
        '{"groups": [], "bars": [], "format": 1, "command": "mine"}',
        "[" * 99999,
    ):
        (tmp_path / "bench.json").write_text(users)
        assert report.in_the_way(tmp_path) == "bench.json"
    results.write(tmp_path / "bench.json", results.as_document({"command": "python -m benchmarks.run --quick"}, []))
    for name in ("bench.md", "error.png"):  # not ours for standing beside results
        assert report.in_the_way(tmp_path) == name
        (tmp_path / name).unlink()
    assert report.in_the_way(tmp_path) is None and report.in_the_way(tmp_path / "new") is None


def test_only_pictures_of_the_benchmark_are_replaced(tmp_path: Path) -> None:
    figure = pytest.importorskip("matplotlib.figure").Figure()
    results.write(tmp_path / "bench.json", results.as_document({"command": "python -m benchmarks.run"}, []))
    for path in sorted((results.ROOT / "benchmarks" / "results").glob("*/bench.json")):
        assert report.in_the_way(path.parent) is None, "results that are committed"
    plots.save(figure, tmp_path / "error.png")
    assert report.in_the_way(tmp_path) is None
    figure.savefig(tmp_path / "error.png")
    assert report.in_the_way(tmp_path) == "error.png"
    with pytest.raises(SystemExit):
        report.main([str(tmp_path)])
    assert (tmp_path / "error.png").exists()


# --- README, docs -----------------------------------------------------------------------------------------------------


def test_readme_and_docs_hold_what_the_results_give() -> None:
    assert report.main(["--readme", "--check"]) == 0


def test_readme_tables_come_from_results(tmp_path: Path) -> None:
    def record(op: str, name: str, role: str, median: float, **fields) -> Record:
        return Record(op, name, role, "8192×128256", "bf16", "cuda", "hot", summary={"median": median}, **fields)

    one, both = "logprob_entropy", "logprob_entropy_fwdbwd"
    found = [
        record(one, "ours-triton", "ours", 0.6e-3),
        record(one, "ours-cuda", "ours", 0.5e-3, peak_extra_bytes=70_000),
        record(one, "verl", "peer", 50e-3, errors={"entropy (nats)": 0.12}, peak_extra_bytes=4_000_000_000),
        record(both, "ours-cuda", "ours", 1.5e-3),
        record(both, "ours-cuda-inplace", "ours", 1.4e-3),
        record(both, "liger-ce", "peer", 3e-3),
        record(both, "liger-ce-mean", "peer", 2.25e-3),
    ]
    (tmp_path / "h200").mkdir()
    document = results.as_document({}, [Measured("G", False, found)])
    results.write(tmp_path / "h200" / "bench.json", document)
    text = report.filled("before\n<!-- bench: h200 -->\nold\n<!-- /bench -->\nafter\n", tmp_path)
    assert text.startswith("before\n<!-- bench: h200 -->\n") and text.endswith("<!-- /bench -->\nafter\n")
    assert "old" not in text and "**500 µs**" in text and "50.0 ms (100×), entropy off by 0.12 nats" in text
    assert "2.25 ms (1.5×)" in text and "**1.40 ms**" in text and "4000 MB" in text and "0.07 MB" in text
    assert report.filled(text, tmp_path) == text
    short = report.filled("<!-- bench: h200, h200 -->\n<!-- /bench -->\n", tmp_path)
    assert short.count("GPU: **ours**") == 2 and "log-prob + entropy" in short and short.count("3.00 ms") == 0
    assert short.count("2.25 ms") == 2 and report.filled(short, tmp_path) == short, "the fastest of Liger's"
    with pytest.raises(ValueError, match="names no result"):
        report.filled("<!-- bench: nowhere -->\n<!-- /bench -->", tmp_path)


# --- peers ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package that cannot be imported whole: its scheduler is not installed."""
    root = tmp_path / "fake_peer"
    (root / "algos").mkdir(parents=True)
    (root / "__init__.py").write_text("import fake_scheduler\n")
    (root / "algos" / "__init__.py").write_text("raise RuntimeError('not run')\n")
    (root / "helpers.py").write_text("def twice(x):\n    return 2 * x\n")
    (root / "algos" / "core.py").write_text(
        "import fake_scheduler.remote\nfrom fake_peer import helpers\nfrom fake_peer.settings import Config\n"
        "from fake_peer.algos import something\nimport fake_peer.helpers as h\n"
        "def loss(x, config: Config):\n    return h.twice(x)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    yield root
    assert not [name for name in sys.modules if name.startswith(("fake_peer", "fake_scheduler"))]


def test_a_module_is_loaded_without_its_package(package: Path) -> None:
    before = list(sys.meta_path)
    around = ("fake_scheduler", "fake_peer.settings")
    module = packages.load("fake_peer.algos.core", bare=("fake_peer", "fake_peer.algos"), stubbed=around)
    assert module.loss(4, None) == 8 and sys.meta_path == before


def test_a_peer_that_is_not_there_says_so(package: Path) -> None:
    with pytest.raises(ModuleNotFoundError, match="no_such_peer"):
        packages.load("no_such_peer.core", bare=(), stubbed=())
    with pytest.raises(packages.Unavailable, match="fake_peer does not import: ModuleNotFoundError"):
        packages.module_of("fake_peer")
    with pytest.raises(packages.Unavailable, match="no_such_peer is not installed"):
        packages.alone("no_such_peer.core", ("no_such_peer",), ())


@pytest.mark.parametrize("function", ["policy_loss", "clip_cov_loss"])
def test_a_loss_has_a_row_per_backend_once_it_takes_one(function: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def names() -> set[str]:
        monkeypatch.setattr(ours, "REGISTRY", {})
        ours._add_ours()
        return {name for op, name in ours.REGISTRY if op == function}

    def without(logprob, old_logprob, advantages, mask): ...
    def backed(logprob, old_logprob, advantages, mask, *, backend="auto"): ...

    monkeypatch.setattr(ek, function, without)
    assert names() == {"ours"}
    monkeypatch.setattr(ek, function, backed)
    assert names() == {"ours-torch", "ours-triton", "ours-cpu", "ours-cuda"}


def test_every_row_of_a_cross_entropy_says_what_it_lacks() -> None:
    for (op, name), implementation in REGISTRY.items():
        if "-ce" in name and name != "verl-fused-ce":
            assert "no entropy" in implementation.computes, (op, name)
        elif implementation.role == "ours":
            assert not implementation.computes


def test_clocks_of_a_second_run_do_not_go_backwards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, original = Clock(), run._measure
    monkeypatch.setattr(run, "time", clock)

    def takes_two_seconds(*given):
        clock.now += 2.0
        return original(*given)

    monkeypatch.setattr(run, "_measure", takes_two_seconds)
    arguments = [*SMALL, "--output", str(tmp_path), "--ops", "tokens_roofline", "--impl", "topk"]
    for more, seconds in ((), 2.0), (("--resume",), 4.0):
        main([*arguments, *more])
        assert _document(tmp_path)["seconds"] == seconds

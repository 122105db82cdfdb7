"""What a user sees of long work: bars on a terminal of any width, plain lines elsewhere."""

from __future__ import annotations

import io
import re
import sys

import pytest

from entropy_kernels import _progress
from entropy_kernels._progress import ProgressBoard, in_words
from entropy_kernels.trainer.log import RunProgress, describe_row

NAMES = ("train", "supervised start", "random_penalized-0", "exact_cov_torch_ops-12", "a" * 60 + ".jsonl")
NOTE = "H 0.523  target 0.400  reward 0.412  pass@1 0.345  pass@8 0.633  (step 232)"


class Terminal(io.StringIO):
    """A file that says that it is one."""

    def isatty(self) -> bool:
        return True

    @property
    def screen(self) -> list[str]:
        """Lines of the last picture, without colours."""
        plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", self.getvalue().rpartition("\x1b[2K")[2])
        return [line.rstrip() for line in plain.replace("\r", "").split("\n") if line.strip()]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, to be set."""
    now = [1000.0]
    monkeypatch.setattr(_progress.time, "monotonic", lambda: now[0])
    return now


@pytest.fixture
def terminal(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Terminal:
    pytest.importorskip("rich")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("LINES", "24")
    return Terminal()


@pytest.mark.parametrize("width", [40, 60, 80, 100, 120, 200])
@pytest.mark.parametrize("total", [240, 1_000_000])
def test_counts_and_time_left_are_whole_in_any_width(
    width: int, total: int, terminal: Terminal, clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    with ProgressBoard(file=terminal, ticking=False) as board:
        for name in NAMES:
            board.add(name, total)
        for done in (0, total // 4, total // 2):
            clock[0] += 1800.0
            for name in NAMES[1:]:
                board.update(name, done, total, NOTE)
        board.update(NAMES[-1], total, total, NOTE)
        clock[0] += 1.0
        board.update(NAMES[1], total // 2, total, NOTE)
    lines = terminal.screen
    assert len(lines) == len(NAMES)
    assert all(len(line) <= width for line in lines), lines
    assert re.search(rf" 0/{total} +-:--:-- waits$", lines[0]), lines[0]
    for line in lines[1:-1]:
        assert re.search(rf" {total // 2}/{total} +1:00:00 left", line), line
    assert re.search(rf" {total}/{total} +1:00:00 done", lines[-1]), lines[-1]
    for line in lines[1:]:  # a note or a name that is cut shows that it is, and no figure is cut
        note = re.split("left|done", line)[-1].strip()
        assert NOTE.startswith(note.removesuffix("…")) and (note.endswith("…") or note in ("", NOTE)), line
        kept = note.removesuffix("…").rstrip()
        assert NOTE.split("  ")[: len(kept.split("  "))] == kept.split("  ") or len(kept) < len("H 0.523"), line
    if width >= 80:
        assert all("H 0.523  target 0.400" in line for line in lines[1:-1]) or total == 1_000_000
        assert lines[2].startswith(NAMES[2])
    assert ("━" in lines[1]) == (width >= 120)
    assert "(step 232)" in lines[1] or width < 200


def test_a_terminal_of_80_columns_shows_the_step_and_the_target(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    row = {
        "step": 102, "entropy": 0.523, "target_entropy": 0.4, "reward": 0.412, "val_pass1": 0.345, "val_pass8": 0.633,
    }  # fmt: skip
    with ProgressBoard(file=terminal) as board:
        RunProgress(board)("train", 102, 240, row)
    (last,) = terminal.screen
    assert re.fullmatch(r"train +102/240 -:--:-- left  ?H 0\.523  target 0\.400  reward 0\.412  pass@1 0\.345.*", last)


def test_what_has_begun_says_so(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with ProgressBoard(file=terminal, ticking=False) as board:
        for name in ("a", "b"):
            board.add(name, 3)
        board.starting("a")
        assert [line.split()[-1] for line in terminal.screen] == ["starting", "waits"]
        board.update("a", 1, 3)
    assert [line.split()[-1] for line in terminal.screen] == ["left", "waits"]


def test_more_lines_than_the_terminal_has(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that run are seen."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("LINES", "10")
    with ProgressBoard(file=terminal) as board:
        for number in range(30):
            board.add(f"run-{number}", 9)
        for number in range(20):
            board.update(f"run-{number}", 9, 9)
        board.update("run-20", 3, 9)
        board.update("run-21", 3, 9)
    lines = terminal.screen
    assert len(lines) <= 10
    assert [line.split()[0] for line in lines[:2]] == ["run-20", "run-21"]


def test_outside_a_terminal_one_line_per_report(clock: list[float]) -> None:
    """Never wrapped, in no width; one per report that is due, and the last one."""
    file, note = io.StringIO(), "  ".join(f"metric_{i} {i}.125" for i in range(40))
    with ProgressBoard(file=file) as board:
        for done in (*range(0, 1000, 100), 1000, 1000):
            board.update("a [name] with markup", done, 1000, f"{note}\nend" if done else "")
            clock[0] += 8.0
        board.say("said: " + note)
    lines = file.getvalue().splitlines()
    assert lines[0] == "a [name] with markup: 0/1000"
    assert [line.split(":")[1].split(",")[0].split()[0] for line in lines[:-1]] == [
        "0/1000", "300/1000", "600/1000", "900/1000", "1000/1000",
    ]  # fmt: skip
    assert lines[1].startswith("a [name] with markup: 300/1000, about 56 seconds left  metric_0 0.125  metric_1")
    assert all(line.endswith(" end") for line in lines[1:-1])
    assert lines[-1] == "said: " + note and "\x1b" not in file.getvalue()


def test_colours_that_are_forced_make_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in CI, whose logs keep what a bar writes."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    file = io.StringIO()
    with ProgressBoard(file=file) as board:
        board.update("train", 1, 2)
    assert file.getvalue() == "train: 1/2\n"


def test_a_terminal_without_rich_has_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rich.console", None)
    file = Terminal()
    with ProgressBoard(file=file) as board:
        board.update("train", 1, 2)
    assert file.getvalue() == "train: 1/2\n"


@pytest.mark.parametrize("make", [Terminal, io.StringIO])
def test_brief_work_shows_nothing(make: type[io.StringIO], clock: list[float]) -> None:
    file = make()
    with ProgressBoard(file=file, brief=True, ticking=False) as board:
        for done in range(4):
            board.update("read", done, 3)
            clock[0] += 0.2
        assert file.getvalue() == ""
        clock[0] += 1.0
        board.update("fit", 1, 3)
        assert "1/3" in file.getvalue()


def test_a_disabled_board_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressBoard(enabled=False) as board:
        board.add("a", 2)
        board.update("a", 2, 2)
        board.say("b")
    assert capsys.readouterr() == ("", "")


def test_rough_times() -> None:
    assert [in_words(s) for s in (0.2, 59, 100, 600, 5000, 6000, 40000)] == [
        "1 seconds", "59 seconds", "2 minutes", "10 minutes", "83 minutes", "1.7 hours", "11 hours",
    ]  # fmt: skip


def test_the_last_line_shows_the_last_validation() -> None:
    """The row of the last step has validations of its own; on the way the step of an older one is named."""
    validated = {"step": 232, "entropy": 0.5, "reward": 0.4, "val_pass1": 0.3, "val_pass8": 0.6, "val_entropy": 0.5}
    assert describe_row(validated) == "H 0.500  reward 0.400  pass@1 0.300  pass@8 0.600"
    row = {"step": 239, "entropy": 0.4, "reward": 0.5}
    assert describe_row(row) == "H 0.400  reward 0.500"
    assert describe_row(row, validated) == "H 0.400  reward 0.500  pass@1 0.300  pass@8 0.600  (step 232)"
    last = {**row, "step": 240, "val_pass1": 0.31, "val_pass8": 0.61, "final_pass1": 0.32, "final_pass32": 0.9}
    assert describe_row(last, validated) == "H 0.400  reward 0.500  pass@1 0.320  pass@32 0.900"
    assert describe_row({"loss": 1.25}, {}) == "loss 1.250"


def test_lengths_and_what_was_cut_off_fit_beside_the_counts_in_80_columns() -> None:
    row = {"step": 7, "entropy": 0.5, "reward": 0.4, "val_pass1": 0.3, "val_pass8": 0.6, "length_mean": 211.7}
    assert describe_row(row | {"truncated": 0.0}) == "H 0.500  reward 0.400  pass@1 0.300  len 212  pass@8 0.600"
    note = describe_row(row | {"truncated": 0.126})
    assert note == "H 0.500  reward 0.400  pass@1 0.300  len 212  cut 13%  pass@8 0.600"
    file = Terminal()
    with ProgressBoard(file=file, ticking=False) as board:
        board.update("train", 8, 240, note)
    assert "H 0.500  reward 0.400  pass@1 0.300  len 212" in file.getvalue() and "pass@8" not in file.getvalue()

"""The tuner of the Triton backend, with a timer of the tests' own: what is chosen, when, and that it is used."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

import triton

from compare import Bound
from entropy_kernels._rows import NAMES, RowOptions
from entropy_kernels.backends.triton import tiling, token_stats, tuning
from entropy_kernels.backends.triton.tuning import ShapeClass

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

CPU = torch.device("cpu")
NVIDIA = tiling.Hardware(132, 32, True)
AMD = tiling.Hardware(304, 64, False)
SHAPE = ShapeClass.of("forward", torch.bfloat16, True, True, False, 151_936, 8192)


@dataclass(frozen=True)
class Cut:
    """A candidate of these tests."""

    size: int


CUTS = (Cut(1), Cut(2), Cut(3))


class Clock:
    """A timer: runs the candidate, gives it the time written down for it, and remembers who came."""

    def __init__(self, **milliseconds: float) -> None:
        self.milliseconds = {int(name[1:]): time for name, time in milliseconds.items()}
        self.timed: list[Any] = []

    def scratch(self, budget: int) -> Callable[[Any], object]:
        assert 0 < budget <= tuning.SCRATCH_BYTES
        return self.timed.append

    def __call__(self, run: Callable[[], object]) -> float:
        run()
        time = self.milliseconds[self.timed[-1].size]
        if time < 0:
            raise RuntimeError("out of resource: shared memory")
        return time

    def choose(self, shape: ShapeClass = SHAPE) -> Any:
        return tuning.choose(shape, CPU, CUTS, self.scratch)


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A GPU as far as the tuner can tell, with a cache folder of its own."""
    monkeypatch.setenv(tuning.SWITCH, "1")
    monkeypatch.setattr(tuning, "_on_gpu", lambda device: True)
    monkeypatch.setattr(tuning, "_index", lambda device: 0)
    monkeypatch.setattr(tuning, "_capturing", lambda: False)
    monkeypatch.setattr(tuning, "_free_memory", lambda device: 80 << 30)
    monkeypatch.setattr(tuning, "_identity", lambda device: "a GPU")
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    tuning.forget()
    yield
    tuning.forget()


def use(monkeypatch: pytest.MonkeyPatch, **milliseconds: float) -> Clock:
    clock = Clock(**milliseconds)
    monkeypatch.setattr(tuning, "timer", clock)
    return clock


# ---- what is chosen ------------------------------------------------------------------------------------------------


def test_the_fastest_is_chosen_once(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = use(monkeypatch, c1=3.0, c2=1.0, c3=2.0)
    assert clock.choose() == Cut(2)
    assert clock.timed == list(CUTS)
    assert clock.choose() == Cut(2)
    assert len(clock.timed) == 3
    (row,) = tuning.report()
    assert row["tiling"] == {"size": 2} and row["origin"] == "measured" and row["milliseconds"] == [3.0, 1.0, 2.0]
    assert row["dtype"] == "bfloat16" and row["columns_bits"] == 18 and row["rows_bits"] == 13
    json.dumps(row)


def test_noise_does_not_move_the_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    assert use(monkeypatch, c1=1.0, c2=0.99, c3=2.0).choose() == Cut(1)
    tuning.forget()
    other = SHAPE._replace(softcap=True)
    assert use(monkeypatch, c1=1.0, c2=0.97, c3=2.0).choose(other) == Cut(2)


def test_a_candidate_that_fails_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = use(monkeypatch, c1=-1, c2=5.0, c3=-1)
    assert clock.choose() == Cut(2)
    assert tuning.report()[0]["milliseconds"] == [None, 5.0, None]


def test_without_any_that_runs_the_default_serves(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert use(monkeypatch, c1=-1, c2=-1, c3=-1).choose() == CUTS[0]
    assert tuning.report()[0]["origin"] == "no candidate ran"
    assert not list(tmp_path.rglob("*.json")), "a failure is not kept"


# ---- the disk ------------------------------------------------------------------------------------------------------


def test_the_next_process_does_not_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, c1=3.0, c2=1.0, c3=2.0).choose()
    tuning.forget()
    clock = use(monkeypatch)
    assert clock.choose() == Cut(2) and clock.timed == []
    assert tuning.report()[0]["origin"] == "disk"


@pytest.mark.parametrize(
    "text",
    ["", "{", "null", "[]", "7", '{"tiling": {"size": 99}, "milliseconds": []}', '{"tiling": {"size": 2}}', "\xff"],
)
def test_a_broken_file_is_measured_again(text: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    use(monkeypatch, c1=3.0, c2=1.0, c3=2.0).choose()
    (path,) = tmp_path.rglob("*.json")
    path.write_bytes(text.encode("latin-1"))
    tuning.forget()
    clock = use(monkeypatch, c1=3.0, c2=2.0, c3=1.0)
    assert clock.choose() == Cut(3) and len(clock.timed) == 3
    tuning.forget()
    assert use(monkeypatch).choose() == Cut(3)


@pytest.mark.parametrize("what", ["_identity", "_sources"])
def test_another_gpu_or_source_is_measured_anew(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, c1=3.0, c2=1.0, c3=2.0).choose()
    tuning.forget()
    monkeypatch.setattr(tuning, what, (lambda device: "another GPU") if what == "_identity" else (lambda: b"new"))
    assert use(monkeypatch, c1=1.0, c2=1.0, c3=0.5).choose() == Cut(3)


def test_without_a_cache_folder_it_still_measures(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    monkeypatch.setattr(triton.knobs.cache, "dir", str(file))
    assert use(monkeypatch, c1=3.0, c2=1.0, c3=2.0).choose() == Cut(2)


# ---- when nothing is measured --------------------------------------------------------------------------------------


def test_not_while_capturing(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = use(monkeypatch, c1=3.0, c2=1.0, c3=2.0)
    monkeypatch.setattr(tuning, "_capturing", lambda: True)
    assert clock.choose() == CUTS[0] and clock.timed == [] and tuning.report() == []
    monkeypatch.setattr(tuning, "_capturing", lambda: False)
    assert clock.choose() == Cut(2), "a capture must not decide for the calls after it"
    monkeypatch.setattr(tuning, "_capturing", lambda: True)
    assert clock.choose() == Cut(2), "a graph is captured with what was found before"


@pytest.mark.parametrize("value", [None, "", "0"])
def test_nothing_is_measured_unasked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, value: str | None) -> None:
    monkeypatch.delenv("ENTROPY_KERNELS_TRITON_TUNE")
    if value is not None:
        monkeypatch.setenv("ENTROPY_KERNELS_TRITON_TUNE", value)
    clock = use(monkeypatch)
    assert clock.choose() == CUTS[0] and clock.timed == []
    assert tuning.report()[0]["origin"] == "default; ENTROPY_KERNELS_TRITON_TUNE=1 measures"
    assert not list(tmp_path.rglob("*.json"))


@pytest.mark.parametrize("free", [0, 100 << 20])
def test_not_without_memory(free: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "_free_memory", lambda device: free)
    clock = use(monkeypatch)
    assert clock.choose() == CUTS[0] and clock.timed == []
    assert "memory" in tuning.report()[0]["origin"]


def test_not_when_scratch_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    def scratch(budget: int) -> Callable[[Any], object]:
        raise torch.cuda.OutOfMemoryError

    use(monkeypatch)
    assert tuning.choose(SHAPE, CPU, CUTS, scratch) == CUTS[0]


def test_not_in_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    clock = use(monkeypatch)
    assert clock.choose() == CUTS[0] and tuning.report() == []


# ---- classes and candidates ----------------------------------------------------------------------------------------


def test_classes() -> None:
    def shape(columns: int, rows: int, dtype: torch.dtype = torch.float32) -> ShapeClass:
        return ShapeClass.of("backward", dtype, False, False, False, columns, rows)

    assert shape(131_073, 5000) == shape(262_144, 8192) == shape(151_936, 1 << 30)
    assert shape(131_072, 5000) != shape(131_073, 5000)
    assert shape(151_936, 4096) != shape(151_936, 4097)
    assert shape(151_936, 64, torch.bfloat16) != shape(151_936, 64)
    assert shape(0, 1).rows == 1 and shape(1, 1).columns_bits == 0
    files = {
        ShapeClass.of(direction, dtype, aligned, second, softcap, columns, rows).file
        for direction in ("forward", "backward")
        for dtype in (torch.bfloat16, torch.float32)
        for aligned in (False, True)
        for second in (False, True)
        for softcap in (False, True)
        for columns in (100, 1000)
        for rows in (1, 100)
    }
    assert len(files) == 2**7


@pytest.mark.parametrize("on", [NVIDIA, AMD], ids=["nvidia", "amd"])
@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("itemsize", [2, 4, 8])
def test_candidates_are_few_and_shared_by_a_class(itemsize: int, aligned: bool, on: tiling.Hardware) -> None:
    for bits in range(19):
        for rows_bits in (0, 5, 9, 13):
            found = {
                tiling.forward_candidates(itemsize, columns, 1 << rows_bits, aligned, on)
                for columns in ((1 << bits) // 2 + 1, 1 << bits)
            }
            assert len(found) == 1, "a choice would be valid for some of its class only"
            (candidates,) = found
            assert 1 <= len(candidates) <= 6 and len(set(candidates)) == len(candidates)
        columns = {
            tiling.backward_candidates(itemsize, width, aligned, on) for width in ((1 << bits) // 2 + 1, 1 << bits)
        }
        assert len(columns) == 1 and len(columns.pop()) <= 6


def test_parts_follow_the_split() -> None:
    first, *_ = tiling.forward_candidates(2, 151_936, 16, True, NVIDIA)
    half, same, double = (
        replace(first, split=split).parts(16, 151_936, 2, NVIDIA.multiprocessors)[0] for split in (-1, 0, 1)
    )
    assert 1 < half < same < double
    whole = replace(first, split=-7).parts(16, 151_936, 2, NVIDIA.multiprocessors)
    assert whole == (1, -(-151_936 // first.tile))
    assert replace(first, split=7).parts(1, 100, 2, 132) == (1, 1), "no more parts than tiles"


# ---- all candidates are right, and the one that is chosen runs -----------------------------------------------------

# Widths that are no multiple of anything, in tiles of a GPU, so that whole tiles, a rest and several parts occur.
SMALL = tiling.Hardware(4, 8, True)


def candidates(direction: str, aligned: bool, on: tiling.Hardware) -> list[Any]:
    if direction == "forward":
        return list(tiling.forward_candidates(4, 5003, 4, aligned, on))
    return list(tiling.backward_candidates(4, 5003, aligned, on))


CASES = [
    (direction, aligned, on, i)
    for direction in ("forward", "backward")
    for aligned in (True, False)
    for on in (SMALL, replace(SMALL, asynchronous=False))
    for i in range(len(candidates(direction, aligned, on)))
]


def name_of(case: tuple[str, bool, tiling.Hardware, int]) -> str:
    direction, aligned, on, i = case
    return f"{direction}-{'' if aligned else 'un'}aligned-{'async' if on.asynchronous else 'registers'}-{i}"


@pytest.mark.parametrize("case", CASES, ids=name_of)
@pytest.mark.parametrize("columns", [1, 97, 5003])
def test_all_candidates_are_right(case: tuple[str, bool, tiling.Hardware, int], columns: int, monkeypatch) -> None:
    direction, aligned, on, i = case
    monkeypatch.undo()  # the interpreter's own conditions
    monkeypatch.setattr(tiling, "hardware", lambda device: on)
    cut = candidates(direction, aligned, on)[i]
    rows = 3
    logits = 4 * torch.randn(1, rows, columns)
    target = torch.randint(0, columns, (rows,))
    temperature = torch.rand(rows) + 0.5
    bound = Bound(logits[0], target, temperature=temperature)
    options = RowOptions(0.0, -100, 0, columns)
    if direction == "forward":
        stats, _ = token_stats._forward(cut, logits, target, temperature, options, 15)
        bound.check_values(**dict(zip(NAMES, stats, strict=False)))
    else:
        _, state = token_stats.token_stats_forward(logits, target, temperature, options, 7)
        grads = torch.randn(3, rows)
        out = torch.empty_like(logits)
        token_stats._backward(cut, grads, logits, out, target, temperature, state, options, 7)
        bound.check_gradient(out[0], **dict(zip(NAMES, grads, strict=False)))


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("rows", [1, 3, 8192])
def test_scratch_is_bounded_and_laid_out_like_the_class(rows: int, aligned: bool) -> None:
    like = torch.empty(0, dtype=torch.bfloat16)
    block = token_stats._scratch_logits(like, 10_007, rows, aligned, 1 << 20)
    assert block.dtype == torch.bfloat16 and block.shape[2] == 10_007
    assert rows <= block.shape[0] * block.shape[1] < rows + 1000
    assert block.untyped_storage().nbytes() <= (1 << 20) + 2
    assert token_stats._aligned(block, token_stats._rows_of(block)) == aligned
    assert not block.any(), "the generator of the caller is not touched for random numbers"


class Recorded:
    """A kernel that remembers the constants it was launched with."""

    def __init__(self, kernel: Any, calls: list[dict[str, Any]]) -> None:
        self.kernel, self.calls = kernel, calls

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        def launch(*arguments: Any, **constants: Any) -> Any:
            self.calls.append({"rows": arguments[-1], **constants})
            return self.kernel[grid](*arguments, **constants)

        return launch


def test_the_choice_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward run what the timer liked best, on tensors of their own while they are timed."""
    monkeypatch.setattr(tiling, "hardware", lambda device: SMALL)
    forward: list[dict[str, Any]] = []
    backward: list[dict[str, Any]] = []
    monkeypatch.setattr(token_stats, "forward_kernel", Recorded(token_stats.forward_kernel, forward))
    monkeypatch.setattr(token_stats, "backward_kernel", Recorded(token_stats.backward_kernel, backward))
    logits, target = torch.randn(1, 4, 2512), torch.tensor([0, 1, 2, 2511])
    before = logits.clone()
    arguments, options = (logits, target, torch.ones(1)), RowOptions(0.0, -100, 0, 2512)
    cuts = {
        "forward": tiling.forward_candidates(4, 2512, 4, True, SMALL),
        "backward": tiling.backward_candidates(4, 2512, True, SMALL),
    }
    calls = {"forward": forward, "backward": backward}
    for liked in (1, 2, -1):
        tuning.forget()
        monkeypatch.setattr(triton.knobs.cache, "dir", str(Path(triton.knobs.cache.dir) / str(liked)))

        def timer(run: Callable[[], object], liked: int = liked) -> float:
            run()
            cut = run.args[0]  # type: ignore[attr-defined]
            return 1.0 if any(cut == of[liked] for of in cuts.values()) else 2.0

        monkeypatch.setattr(tuning, "timer", timer)
        _, state = token_stats.token_stats_forward(*arguments, options, 7)
        ones = torch.ones(4)
        gradient = token_stats.token_stats_backward(ones.expand(3, 4), *arguments, state, options, 7, True)
        assert gradient is logits
        for direction, made in calls.items():
            assert len(made) == len(cuts[direction]) + 1, "each candidate once, then the call"
            cut: Any = cuts[direction][liked]
            assert made[-1]["num_warps"] == cut.warps and made[-1]["STAGES"] == cut.stages
            if direction == "forward":
                assert (made[-1]["STEPS"], made[-1]["WIDTH"]) == (cut.steps, cut.width)
            else:
                assert made[-1]["TILE"] == cut.tile and made[-1]["rows"] == cut.tiles
            made.clear()
        bound = Bound(before[0], target)
        bound.check_gradient(gradient[0], logprob=ones, entropy=ones, collision=ones)
        logits.copy_(before)

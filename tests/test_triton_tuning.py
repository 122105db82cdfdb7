"""``entropy-kernels tune`` with a timer of the tests' own: what is kept, and which tiling calls then take."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from compare import Bound
from entropy_kernels import cli, tune
from entropy_kernels._rows import NAMES, RowOptions
from entropy_kernels.backends import registry, switches, verdict
from entropy_kernels.backends.triton import linear_token_stats, tiling, token_stats, tuning
from entropy_kernels.backends.triton.tuning import ShapeClass

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

CPU = torch.device("cpu")
NVIDIA = tiling.Hardware(132, 32, True)
AMD = tiling.Hardware(304, 64, False)
SMALL = tiling.Hardware(4, 8, True)  # tiles for widths at which whole tiles, a rest and several parts occur
PLAIN = RowOptions(0.0, -100, 0, 151_936)
SHAPE = ShapeClass.of("forward", torch.bfloat16, True, 4, PLAIN, 151_936, 8192)
CUTS = tuple(tiling.BackwardTiling(tile, 4, 8) for tile in (1, 2, 3))
MACHINE = verdict.Machine("A GPU", "sm_90", "1", "2", "3", "4", "5")


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """The interpreter as a GPU, with a cache folder of its own, and the switch on."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(switches, "TRITON_TUNE", True)
    monkeypatch.setattr(switches, "ROW_INVARIANT", False)
    monkeypatch.setattr(verdict, "machine", lambda device: MACHINE)
    monkeypatch.setattr(registry, "gpus", lambda: [CPU])
    monkeypatch.setattr(tiling, "hardware", lambda device: SMALL)
    monkeypatch.setattr(tuning, "kept", lambda device: tuning.read(tuning.file(device)))
    new_process()
    yield
    new_process()


def new_process() -> None:
    tuning._kept_one.cache_clear()


def like(monkeypatch: pytest.MonkeyPatch, time: Callable[[Any], float], runs: bool = False) -> None:
    """A timer that gives a candidate its time, or also ``runs`` it."""

    def timer(run: Any) -> float:
        if runs:
            run()
        return time(run.args[0])

    monkeypatch.setattr(tune, "timer", timer)


def command(*more: str, code: int = 0) -> dict[str, dict[str, Any]]:
    """What the command keeps."""
    assert cli.main(["tune", "--vocab", "2512", "--rows", "4", "--dtype", "float32", *more]) == code
    return tuning.read(tuning.file(CPU))


# ---- what is chosen ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "times, index",
    [
        ((3.0, 1.0, 2.0), 1),
        ((1.0, 0.99, 2.0), 0),  # noise does not move the choice
        ((1.0, 0.97, 2.0), 1),
        ((None, 5.0, None), 1),
        ((1.0, None, 0.5), 2),
        ((None, None, None), None),
    ],
)
def test_the_fastest(times: tuple[float | None, ...], index: int | None) -> None:
    assert tune.fastest(CUTS, times) == (None if index is None else CUTS[index])


def test_the_command_keeps_what_it_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    like(monkeypatch, lambda cut: 1.0 if cut.stages == 3 else 2.0)
    kept = command("--second-order", "--softcap", "--hidden", "24")
    expected = {
        f"{direction}{second}-softcap-12-2"
        for direction in ("forward-float32-aligned", "backward-float32-aligned", "linear-5-float32")
        for second in ("", "-second")
    }
    assert set(kept) == expected
    assert all(tiling["stages"] == (2 if "linear" in name else 3) for name, tiling in kept.items())
    again = command()  # other classes: those of before stay
    assert set(again) > expected and {name: again[name] for name in expected} == kept


def test_the_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    like(monkeypatch, lambda cut: 1.25 if cut.stages == 3 else 2.5, runs=True)
    command("--second-order")
    out = " ".join(capsys.readouterr().out.split())
    for part in ("A GPU", "backward-float32-aligned-12-2 2.500 2.500 1.250", str(tuning.file(CPU)), "(the default)"):
        assert part in out, part


def test_a_candidate_that_fails_is_passed_over(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def time(cut: Any) -> float:
        if isinstance(cut, tiling.BackwardTiling):
            raise RuntimeError("out of resource: shared memory")
        if cut.stages == 3:
            raise RuntimeError("does not compile")
        return 1.0

    like(monkeypatch, time)
    kept = command(code=1)
    assert set(kept) == {"forward-float32-aligned-12-2"}, "a failure is not kept"
    assert kept["forward-float32-aligned-12-2"]["stages"] != 3
    assert "none ran" in capsys.readouterr().out


def test_without_memory_nothing_is_kept(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def randn(*shape: int, **kinds: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(torch, "randn", randn)
    assert command(code=1) == {}
    assert "memory: fewer --rows" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda patch: patch.setattr(registry, "gpus", list), "expected a GPU"),
        (lambda patch: patch.setattr(registry, "unavailable", lambda *_: "no Triton"), "no Triton"),
        (lambda patch: None, "--vocab"),
        (lambda patch: patch.setenv("XDG_CACHE_HOME", "/dev/null"), "/dev/null"),
    ],
    ids=["no GPU", "no Triton", "no size", "no folder"],
)
def test_what_the_command_needs(change: Any, said: str, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    like(monkeypatch, lambda cut: 1.0)
    change(monkeypatch)
    assert cli.main(["tune", "--rows", "1", "--vocab", "0" if said == "--vocab" else "8"]) == 2
    assert said in capsys.readouterr().err


# ---- which tiling a call takes ---------------------------------------------------------------------------------------


def test_a_call_takes_what_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    assert tuning.tuned(CPU, SHAPE, CUTS) == CUTS[0]
    tuning.write(tuning.file(CPU), {SHAPE.name: CUTS[1]})
    assert tuning.tuned(CPU, SHAPE, CUTS) == CUTS[0], "a process does not change its bits"
    new_process()
    assert tuning.tuned(CPU, SHAPE, CUTS) == CUTS[1]
    assert tuning.tuned(CPU, SHAPE._replace(softcap=True), CUTS) == CUTS[0]
    for switch, value in (("TRITON_TUNE", False), ("ROW_INVARIANT", True)):
        with monkeypatch.context() as patch:
            patch.setattr(switches, switch, value)
            assert tuning.tuned(CPU, SHAPE, CUTS) == CUTS[0], switch


@pytest.mark.parametrize("field", ["gpu", "architecture", "driver", "torch", "triton", "entropy_kernels", "kernels"])
def test_another_machine_has_a_file_of_its_own(field: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tuning.write(tuning.file(CPU), {SHAPE.name: CUTS[1]})
    monkeypatch.setattr(verdict, "machine", lambda device: replace(MACHINE, **{field: "another"}))
    assert tuning.tuned(CPU, SHAPE, CUTS) == CUTS[0]


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "null", "[]", "7", "\xff", "[" * 100_000, '{"format": 2, "tilings": {}}', '{"format": 1}',
        '{"format": 1, "tilings": []}', '{"format": 1, "tilings": {"a": 1}}',
    ],
)  # fmt: skip
def test_a_broken_file_is_ignored(text: str) -> None:
    path = tuning.file(CPU)
    path.parent.mkdir(parents=True)
    path.write_bytes(text.encode("latin-1"))
    with pytest.warns(UserWarning, match="ignored.*entropy-kernels tune"):
        assert tuning.tuned(CPU, SHAPE, CUTS) == CUTS[0]
    with pytest.warns(UserWarning, match="ignored"):
        tuning.write(path, {SHAPE.name: CUTS[1]})
    new_process()
    assert tuning.tuned(CPU, SHAPE, CUTS) == CUTS[1]
    assert [child.name for child in path.parent.iterdir()] == [path.name], "nothing is left beside it"


def test_a_tiling_that_is_no_candidate_is_ignored() -> None:
    verdict.keep(
        tuning.file(CPU), {"format": 1, "tilings": {SHAPE.name: {"tile": 99, "warps": 4, "tiles": 8, "stages": 1}}}
    )
    assert tuning.tuned(CPU, SHAPE, CUTS) == CUTS[0]


def test_without_a_home_folder_the_default_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    def home() -> Path:
        raise RuntimeError("no home")

    monkeypatch.undo()
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", home)
    monkeypatch.setattr(verdict, "machine", lambda device: MACHINE)
    tuning.kept.cache_clear()
    assert tuning.kept(torch.device("cuda", 0)) == {} == tuning.kept(CPU)
    tuning.kept.cache_clear()


# ---- classes and candidates ----------------------------------------------------------------------------------------


def test_classes() -> None:
    def shape(columns: int, rows: int, dtype: torch.dtype = torch.float32) -> ShapeClass:
        return ShapeClass.of("backward", dtype, False, 0, PLAIN, columns, rows)

    assert shape(131_073, 5000) == shape(262_144, 8192) == shape(151_936, 1 << 30)
    assert shape(131_072, 5000) != shape(131_073, 5000)
    assert shape(151_936, 4096) != shape(151_936, 4097)
    assert shape(151_936, 64, torch.bfloat16) != shape(151_936, 64)
    assert shape(0, 1).rows == 1 and shape(1, 1).columns_bits == 0
    names = {
        ShapeClass.of(direction, dtype, aligned, second, PLAIN._replace(softcap=softcap), columns, rows).name
        for direction in ("forward", "backward")
        for dtype in (torch.bfloat16, torch.float32)
        for aligned in (False, True)
        for second in (False, True)
        for softcap in (0.0, 30.0)
        for columns in (100, 1000)
        for rows in (1, 100)
    }
    assert len(names) == 2**7


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
        stats, _ = token_stats.forward(cut, logits, target, temperature, options, 15)
        bound.check_values(**dict(zip(NAMES, stats, strict=False)))
    else:
        _, state = token_stats.token_stats_forward(logits, target, temperature, options, 7)
        grads = torch.randn(3, rows)
        out = torch.empty_like(logits)
        token_stats.backward(cut, grads, logits, out, target, temperature, state, options, 7)
        bound.check_gradient(out[0], **dict(zip(NAMES, grads, strict=False)))


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
    """Forward and backward, in place too, run once, as the command has found them to be fastest."""
    logits, target = torch.randn(1, 4, 2512), torch.tensor([0, 1, 2, 2511])
    before = logits.clone()
    arguments, options = (logits, target, torch.ones(1)), RowOptions(0.0, -100, 0, 2512)
    shape, forward_cuts = token_stats.forward_choices(logits, options, 7)
    cuts: dict[str, Any] = {"forward": forward_cuts}
    _, cuts["backward"] = token_stats.backward_choices(logits, logits, options, 7)
    assert (shape.columns_bits, shape.rows_bits, shape.second_order) == (12, 2, True)
    calls: dict[str, list[dict[str, Any]]] = {"forward": [], "backward": []}
    for liked in (1, 2, -1):
        like(monkeypatch, lambda cut, liked=liked: 1.0 if any(cut == of[liked] for of in cuts.values()) else 2.0)
        command("--second-order")
        new_process()
        with monkeypatch.context() as patch:
            for direction, made in calls.items():
                kernel = f"{direction}_kernel"
                patch.setattr(token_stats, kernel, Recorded(getattr(token_stats, kernel), made))
            _, state = token_stats.token_stats_forward(*arguments, options, 7)
            ones = torch.ones(4)
            gradient = token_stats.token_stats_backward(ones.expand(3, 4), *arguments, state, options, 7, True)
        assert gradient is logits
        for direction, made in calls.items():
            assert len(made) == 1
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


def test_the_choice_from_hidden_states_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiling, "hardware", lambda device: replace(SMALL, warp_size=32))
    hidden, weight = torch.randn(4, 64).bfloat16(), torch.randn(304, 64).bfloat16()
    shape, cuts = linear_token_stats.choices(hidden, weight, RowOptions(0.0, -100, 0, 304), 3)
    assert shape.name == "linear-6-bfloat16-aligned-9-2" and len(cuts) == 1
    other = tiling.LinearTiling(64, 64, 32, 4, 2)
    monkeypatch.setattr(tiling, "linear_candidates", lambda *_: (*cuts, other))
    like(monkeypatch, lambda cut: 1.0 if cut == other else 2.0, runs=True)
    assert command("--hidden", "64", "--vocab", "304", "--dtype", "bfloat16")[shape.name] == vars(other)
    assert tuning.tuned(CPU, *linear_token_stats.choices(hidden, weight, RowOptions(0.0, -100, 0, 304), 3)) == other

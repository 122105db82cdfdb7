"""Triton kernels of token_stats below the op: split rows, tilings, layouts, what is read. Values and gradients over
the cases of the specification are in test_token_stats*.py, for every backend; compilation in test_triton_aot.py.

On a machine without a GPU they run in Triton's interpreter (conftest.py), so shapes are small.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

from conftest import on_gpu
from entropy_kernels._rows import NAMES, UNBOUNDED, RowOptions, bits, state_rows, wanted
from entropy_kernels.backends import switches
from entropy_kernels.backends.eager import softmax_state as torch_state
from entropy_kernels.backends.eager import token_stats as eager
from entropy_kernels.backends.triton import tiling
from entropy_kernels.backends.triton import token_stats as kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# the interpreter is numpy, which warns of the NaN that these tests ask for
pytestmark = [pytest.mark.filterwarnings("ignore::RuntimeWarning")]
if DEVICE == "cuda":
    pytestmark.append(on_gpu("triton", "token_stats"))
ALL = bits(*NAMES)
PLAIN = RowOptions(0.0, -100, 0, UNBOUNDED)


def inputs(
    rows: int, vocab: int, dtype: torch.dtype = torch.float32, scale: float = 3.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (1, rows, vocab), targets (rows,), temperatures (rows,)."""
    logits = (torch.randn(1, rows, vocab) * scale).to(DEVICE, dtype)
    target = torch.randint(0, vocab, (rows,), device=DEVICE)
    accumulate = torch.float64 if dtype == torch.float64 else torch.float32
    return logits, target, (torch.rand(rows, device=DEVICE) + 0.5).to(accumulate)


def exact(logits: Tensor, target: Tensor, temperature: Tensor, *rest: object) -> tuple[Tensor, ...]:
    return eager.token_stats_forward(logits.double(), target, temperature.double(), *rest)  # type: ignore[arg-type]


def close(actual: Tensor, expected: Tensor, atol: float = 2e-6, rtol: float = 2e-6) -> None:
    torch.testing.assert_close(actual.double(), expected, atol=atol, rtol=rtol, equal_nan=True)


def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tilings of a GPU: the interpreter would take wider warps, and short rows would be a single tile."""
    monkeypatch.setattr(tiling, "hardware", lambda device: tiling.Hardware(1, 32, True))


def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 512 logits."""
    monkeypatch.setattr(tiling, "forward_candidates", lambda *_: (tiling.ForwardTiling(2, 1, 32, 8, 2),))


# ---- split rows ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", (2, 3, 5, 16))
@pytest.mark.parametrize("vocab", (4096, 5003))
def test_split_rows_equal_whole_rows(parts: int, vocab: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts that are even, uneven, that end in a partial tile, and more of them than tiles."""
    narrow(monkeypatch)
    small_tiles(monkeypatch)  # 8 and 9.8 of them
    monkeypatch.setattr(tiling, "split_count", lambda *_: parts)
    logits, target, temperature = inputs(2, vocab)
    target[0] = vocab - 1
    arguments = (logits, target, temperature, PLAIN, ALL)
    for actual, expected in zip(kernels.token_stats_forward(*arguments), exact(*arguments), strict=True):
        close(actual, expected, rtol=5e-6)


@pytest.mark.parametrize("want", (3, 11, 14, *(bits(name) for name in NAMES)))
def test_split_rows_give_what_is_wanted(want: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiling, "split_count", lambda *_: 2)
    arguments = (*inputs(1, 300), PLAIN, want)
    stats, state = kernels.token_stats_forward(*arguments)
    assert state.shape == (state_rows(want), 1) and stats.shape == (len(wanted(want)), 1)
    for actual, expected in zip((stats, state), exact(*arguments), strict=True):
        close(actual, expected)


@pytest.mark.parametrize("value", (math.nan, math.inf, -math.inf))
@pytest.mark.parametrize("where", ("first", "last", "all"))
def test_split_rows_with_special_values(value: float, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN and +inf poison the row whichever part holds them; a part of nothing but -inf is skipped."""
    narrow(monkeypatch)
    small_tiles(monkeypatch)
    monkeypatch.setattr(tiling, "split_count", lambda *_: 2)
    logits, target, temperature = inputs(1, 1024)
    logits[..., {"first": slice(0, 512), "last": slice(512, 1024), "all": slice(None)}[where]] = value
    target[:] = 5
    arguments = (logits, target, temperature, PLAIN, ALL)
    stats, _ = kernels.token_stats_forward(*arguments)
    close(stats, exact(*arguments)[0])
    assert stats[1].isnan().item() == (value != -math.inf or where == "all")


def test_split_count() -> None:
    programs = 132 * 3  # an H200 and three programs of 8 warps per multiprocessor
    assert tiling.split_count(8192, 19, programs) == 1, "enough rows: a second kernel would only cost"
    assert tiling.split_count(1, 1, programs) == 1, "one tile cannot be cut"
    assert tiling.split_count(1, 19, programs) == 16
    assert tiling.split_count(programs, 19, programs) == 1, "exactly one wave"
    assert tiling.split_count(programs + 4, 64, programs) > 1, "a second wave for four rows would double the time"
    for rows in (1, 7, 100, 1000, 10_000):
        for tiles in (1, 2, 5, 19, 1000):
            parts = tiling.split_count(rows, tiles, programs)
            assert 1 <= parts <= min(tiles, tiling.MAX_SPLITS)
            assert -(-tiles // parts) * parts >= tiles


def test_a_row_is_cut_without_regard_to_the_others_if_asked_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """ENTROPY_KERNELS_ROW_INVARIANT=1: the same bits for any number of rows."""
    narrow(monkeypatch)
    monkeypatch.setattr(tiling, "RESIDENT_WARPS", {4: 4})
    small_tiles(monkeypatch)
    cut = tiling.ForwardTiling(2, 1, 32, 8, 2)
    logits, target, temperature = inputs(4, 4099)
    results = []
    for invariant in (False, True):
        monkeypatch.setattr(switches, "ROW_INVARIANT", invariant)
        parts = {cut.parts(rows, 4099, 4, 1)[0] for rows in (1, 4)}
        assert len(parts) == (1 if invariant else 2), parts

        def call(rows: slice) -> tuple[Tensor, ...]:
            given = (logits[:, rows], target[rows], temperature[rows])
            return kernels.token_stats_forward(*given, PLAIN, ALL)

        whole = call(slice(None))
        pairs = [(a, b[..., i : i + 1]) for i in range(2) for a, b in zip(call(slice(i, i + 1)), whole, strict=True)]
        results.append(all(torch.equal(a, b) for a, b in pairs))
    assert results == [False, True]


# ---- the state -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("softcap", (0.0, 5.0))
def test_states_of_shards_merge_in_torch(softcap: float) -> None:
    """One definition of the state across languages: Triton's shards, merged and finalized in torch, give the row."""
    logits, target, temperature = inputs(4, 230)
    target[:] = torch.tensor([0, 99, 100, 229])
    shards = []
    for start, stop in ((0, 100), (100, 101), (101, 230)):
        shard = logits[..., start:stop]
        options = RowOptions(softcap, -100, start, 230)
        shards.append(kernels.token_stats_forward(shard, target, temperature, options, ALL)[1])
    merged = torch_state.merge(torch.stack(shards), temperature)
    none = torch.zeros(4, dtype=torch.bool, device=DEVICE)
    stats, state = exact(logits, target, temperature, RowOptions(softcap, -100, 0, 230), ALL)
    close(merged, state, rtol=5e-6)
    close(torch_state.finalize(merged, temperature, ALL, none, none), stats)


def test_state_of_a_poisoned_shard_is_not_skipped() -> None:
    """The maximum skips NaN: of a shard of -inf and NaN it would be -inf, as if the shard were empty."""
    logits = torch.full((1, 1, 8), -math.inf, device=DEVICE)
    logits[..., 3] = math.nan
    one = torch.ones(1, device=DEVICE)
    target = torch.zeros(1, dtype=torch.long, device=DEVICE)
    options = RowOptions(0.0, -100, 0, 16)
    _, poisoned = kernels.token_stats_forward(logits, target, one, options, ALL)
    _, sound = kernels.token_stats_forward(torch.zeros_like(logits), target, one, options.of_part(8), ALL)
    assert torch_state.merge(torch.stack([poisoned, sound]), one)[1].isnan().all()


def test_state_of_an_ignored_row_is_neutral() -> None:
    logits, target, temperature = inputs(2, 10)
    logits[0, 0] = math.nan
    target[0] = -7
    stats, state = kernels.token_stats_forward(logits, target, temperature, PLAIN._replace(ignore_index=-7), ALL)
    assert state[:, 0].tolist() == [0, 1, 0, 0, 1, 0]
    assert not stats[:, 0].any()


def test_labels_and_temperatures_out_of_range_give_nan() -> None:
    logits, target, temperature = inputs(5, 10)
    target[:2] = torch.tensor([-1, 10])
    temperature[2:] = torch.tensor([0.0, -1.0, math.nan])
    stats, _ = kernels.token_stats_forward(logits, target, temperature, RowOptions(0.0, -100, 0, 10), ALL)
    assert stats.shape == (len(NAMES), 5) and stats.isnan().all()


# ---- layouts -------------------------------------------------------------------------------------------------------


def layouts(rows: int, vocab: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """(B, L, vocab) views with B·L = rows = 6."""
    block = torch.randn(3, rows, vocab + 5, device=DEVICE).to(dtype)
    return {
        "contiguous": block[0, :, :vocab].reshape(2, 3, vocab).clone(),
        "padded rows": block[0].view(2, 3, -1)[..., :vocab],
        "off the 16-byte grid": block.reshape(-1)[1 : 1 + rows * vocab].view(2, 3, vocab),
        "shifted by a token": block[:2, 1:4, :vocab],
        "transposed batch": block[:, :2, :vocab].transpose(0, 1),
        "vocabulary first": torch.randn(vocab, 2, 3, device=DEVICE).to(dtype).permute(1, 2, 0),
        "every second logit": torch.randn(2, 3, 2 * vocab, device=DEVICE).to(dtype)[..., ::2],
        "expanded": torch.randn(1, 1, vocab, device=DEVICE).to(dtype).expand(2, 3, vocab),
    }


@pytest.mark.parametrize("name", layouts(6, 1, torch.float32))
def test_layouts(name: str) -> None:
    dtype = torch.bfloat16
    logits = layouts(6, 150, dtype)[name]
    _, target, temperature = inputs(6, 150)
    arguments = (logits, target, temperature, PLAIN, ALL)
    outputs, expected = kernels.token_stats_forward(*arguments), exact(*arguments)
    for a, b in zip(outputs, expected, strict=True):
        close(a, b)
    grads = torch.randn(len(NAMES), 6, device=DEVICE)
    rest = (target, temperature, outputs[1], PLAIN, ALL, False)
    gradient = kernels.token_stats_backward(grads, logits, *rest)
    assert gradient.is_contiguous() and gradient.dtype == dtype
    dense = eager.token_stats_backward(
        grads.double(), logits.double(), target, temperature.double(), expected[1], *rest[3:]
    )
    close(gradient, dense, rtol=torch.finfo(dtype).eps, atol=1e-7)


def test_in_place_over_a_view_leaves_its_surroundings() -> None:
    buffer = torch.randn(2, 4, 160, device=DEVICE)
    before = buffer.clone()
    logits = buffer[:, 1:3, 5:155]
    _, target, temperature = inputs(4, 150)
    _, state = kernels.token_stats_forward(logits, target, temperature, PLAIN, 1)
    rest = (target, temperature, state, PLAIN, 1)
    grads = torch.randn(1, 4, device=DEVICE)
    apart = kernels.token_stats_backward(grads, logits, *rest, False)
    over = kernels.token_stats_backward(grads, logits, *rest, True)
    assert over.data_ptr() == logits.data_ptr()
    assert torch.equal(over, apart)
    before[:, 1:3, 5:155] = apart
    assert torch.equal(buffer, before)


def test_rows_of_ignores_strides_that_mean_nothing() -> None:
    block = torch.empty(4, 6, 32)
    assert kernels._rows_of(block) == (24, 0, 32, 1)
    assert kernels._rows_of(block[:, 1:]) == (5, 192, 32, 1)
    assert kernels._rows_of(block[:, :1]) == (4, 0, 192, 1)
    assert kernels._rows_of(block[:1, 1:]) == (5, 0, 32, 1)
    assert kernels._rows_of(block[..., :1].as_strided((4, 6, 1), (192, 32, 7))) == (24, 0, 32, 1)


# ---- the gradient --------------------------------------------------------------------------------------------------


DIFFERENTIABLE = ("logprob", "entropy", "collision")
# (S, 4) -> upstream gradients (S, 2)
UPSTREAM = {
    "one for all rows": lambda x: x[:, :1].expand(-1, 2),
    "one for all": lambda x: x[:1, :1].expand(x.shape[0], 2),
    "every second": lambda x: x[:, ::2],
    "rows first": lambda x: x[:, :2].t().contiguous().t(),
}


@pytest.mark.parametrize("given", ("100", "010", "001", "110", "111"))
@pytest.mark.parametrize("softcap", (0.0, 4.0))
@pytest.mark.parametrize("layout", UPSTREAM)
def test_gradients_by_what_is_given(given: str, softcap: float, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles per program, several programs per row, padded columns at the end, strides upstream."""
    narrow(monkeypatch)
    cut = tiling.BackwardTiling(tile=512, warps=1, tiles=2)
    monkeypatch.setattr(tiling, "backward_candidates", lambda *_: (cut,))
    logits, target, temperature = inputs(2, 2600)
    start, size = 1000, 3500
    target[:] = torch.tensor([1000 + 511, 3499])
    want = bits(*(name for name, flag in zip(DIFFERENTIABLE, given, strict=True) if flag == "1"))
    options = RowOptions(softcap, -100, start, size)
    _, state = kernels.token_stats_forward(logits, target, temperature, options, want)
    assert state.shape[0] == (6 if given[2] == "1" else 4)
    grads = UPSTREAM[layout](torch.randn(len(wanted(want)), 4)).to(DEVICE)
    actual = kernels.token_stats_backward(grads, logits, target, temperature, state, options, want, False)
    double = (logits.double(), target, temperature.double())
    expected = eager.token_stats_backward(
        grads.double(), *double, exact(*double, options, want)[1], options, want, False
    )
    close(actual, expected, atol=1e-8, rtol=2e-5)
    assert (actual[..., size - start :] == 0).all()


def test_rows_on_which_nothing_depends_are_not_read() -> None:
    """NaN in a padded row whose loss is masked must not reach the weights: 0 · NaN would be NaN."""
    logits, target, temperature = inputs(3, 40)
    logits[0, 0] = math.nan
    logits[0, 1] = math.nan
    target[1] = -100
    _, state = kernels.token_stats_forward(logits, target, temperature, PLAIN, ALL)
    nan = math.nan
    read = [[0.0, 1.0, 1.0], [0.0, nan, 1.0], [0.0, 0.0, 0.0]]
    grads = torch.tensor(read + [[nan] * 3] * (len(NAMES) - 3), device=DEVICE)
    rest = (logits, target, temperature, state, PLAIN, ALL, False)
    gradient = kernels.token_stats_backward(grads, *rest)
    assert (gradient[0, :2] == 0).all()
    assert (gradient[0, 2] != 0).all() and gradient.isfinite().all()
    grads[0, 0] = 1.0
    gradient = kernels.token_stats_backward(grads, *rest)
    assert gradient[0, 0].isnan().all(), "NaN in a row that counts is not hidden"


@pytest.mark.parametrize("row", range(3))
def test_a_gradient_of_zero_switches_its_term_off(row: int) -> None:
    """As if the statistic had not been asked for: 0 · inf and 0 · NaN of its factor would be NaN."""
    logits, target, temperature = inputs(3, 40)
    _, state = kernels.token_stats_forward(logits, target, temperature, PLAIN, ALL)
    grads = torch.zeros(len(NAMES), 3, device=DEVICE)
    grads[row] = torch.randn(3, device=DEVICE)
    if row != 1:
        state[2] = math.inf
    if row != 2:
        state[4] = math.nan
    rest = (logits, target, temperature)
    together = kernels.token_stats_backward(grads, *rest, state, PLAIN, ALL, False)
    alone = kernels.token_stats_backward(grads[row : row + 1], *rest, state, PLAIN, 1 << row, False)
    assert together.isfinite().all() and together.any() and torch.equal(together, alone)


def test_bf16_gradients_round_to_nearest() -> None:
    """Triton's interpreter truncates where the hardware rounds to nearest even; the kernel makes up for it."""
    logits, target, temperature = inputs(1, 500, torch.bfloat16)
    _, state = kernels.token_stats_forward(logits, target, temperature, PLAIN, ALL)
    rest = (target, temperature, state, PLAIN, ALL, False)
    ones = torch.ones(len(NAMES), 1, device=DEVICE)
    rounded = kernels.token_stats_backward(ones, logits, *rest)
    full = kernels.token_stats_backward(ones, logits.float(), *rest)
    assert torch.equal(rounded, full.bfloat16())


@pytest.mark.parametrize("shape", ((0, 3, 8), (2, 0, 8), (2, 2, 0)))
def test_nothing_to_do(shape: tuple[int, int, int]) -> None:
    logits = torch.empty(shape, device=DEVICE)
    rows = shape[0] * shape[1]
    target = torch.zeros(rows, dtype=torch.long, device=DEVICE)
    one = torch.ones(1, device=DEVICE)
    stats, state = kernels.token_stats_forward(logits, target, one, PLAIN, ALL)
    assert stats.shape == (len(NAMES), rows) and state.shape == (6, rows) and stats.isnan().all()
    grads = torch.ones(len(NAMES), rows, device=DEVICE)
    gradient = kernels.token_stats_backward(grads, logits, target, one, state, PLAIN, ALL, False)
    assert gradient.shape == shape


# ---- accuracy ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", (0.0, 1000.0))
def test_entropy_of_a_large_vocabulary(offset: float) -> None:
    arguments = (inputs(1, 151_936)[0] + offset, *inputs(1, 151_936)[1:], PLAIN, ALL)
    (actual, _), (expected, _) = kernels.token_stats_forward(*arguments), exact(*arguments)
    close(actual[1], expected[1], atol=2e-6, rtol=0)
    close(actual[2], expected[2], atol=0, rtol=5e-6)


@pytest.mark.parametrize("gap", (12.0, 15.0))
def test_collapsed_entropy_over_many_lanes(gap: float) -> None:
    """Adding lanes of 3e-7 one by one to the 1 of the largest logit would round each time, all in one direction."""
    logits = torch.zeros(1, 1, 2048, device=DEVICE)
    logits[..., 7] = gap
    one = torch.ones(1, device=DEVICE)
    arguments = (logits, torch.tensor([7], device=DEVICE), one, PLAIN, ALL)
    close(kernels.token_stats_forward(*arguments)[0][1], exact(*arguments)[0][1], atol=2.5e-7, rtol=2e-7)


def test_softcap_tanh_is_accurate_near_zero() -> None:
    """(1 - q) / (1 + q) alone loses the digits of small logits, and with them those of nearly uniform rows."""
    z = torch.cat([torch.linspace(-1, 1, 400), torch.logspace(-6, 0, 112)]) * 30
    positions = torch.arange(0, 512, 37)
    logits = z.to(DEVICE).expand(1, len(positions), -1)
    arguments = (logits, positions.to(DEVICE), torch.ones(1, device=DEVICE), PLAIN._replace(softcap=30.0), ALL)
    _, state = kernels.token_stats_forward(*arguments)
    close(state[3].cpu(), 30 * torch.tanh(z[positions].double() / 30), atol=0, rtol=3e-7)

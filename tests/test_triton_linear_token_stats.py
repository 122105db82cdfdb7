"""The Triton kernel with the statistics in the product's epilogue: every tiling, layouts, what it is chosen for.

On a machine without a GPU it runs in Triton's interpreter (conftest.py), so shapes are small.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

import entropy_kernels as ek
from conftest import on_gpu
from entropy_kernels._rows import NAMES, RowOptions, bits, state_rows
from entropy_kernels.backends import registry
from entropy_kernels.backends.eager import token_stats as eager
from entropy_kernels.backends.eager.softmax_state import merge
from entropy_kernels.backends.triton import linear_token_stats as kernels
from entropy_kernels.backends.triton import tiling
from entropy_kernels.backends.triton.tiling import LinearTiling
from entropy_kernels.ops import linear_tiles
from linear_cases import budgets, judge, run
from stub_gpu import add_stub_gpu, verify
from test_linear_token_stats import CASES

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.filterwarnings("ignore::RuntimeWarning")]  # the interpreter is numpy, which warns of NaN
if DEVICE == "cuda":
    pytestmark.append(on_gpu("triton", "linear_token_stats"))
ALL = bits(*NAMES)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
HARDWARE = {
    "sm_90": tiling.Hardware(2, 32, True),
    "sm_80": tiling.Hardware(2, 32, True, descriptors=False, shared=163 << 10),
    "gfx942": tiling.Hardware(2, 64, False, descriptors=False, shared=64 << 10),
}


def plain(vocab: int) -> RowOptions:
    return RowOptions(0.0, -100, 0, vocab)


def inputs(rows: int, features: int, vocab: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """hidden, weight, bias, target, temperature."""
    hidden = torch.randn(rows, features).to(DEVICE, dtype)
    weight = (torch.randn(vocab, features) * 2 / features**0.5).to(DEVICE, dtype)
    temperature = (torch.rand(rows) + 0.5).to(DEVICE)
    return hidden, weight, torch.randn(vocab).to(DEVICE, dtype), torch.randint(vocab, (rows,)).to(DEVICE), temperature


def exact(hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, temperature: Tensor, *rest: Any) -> Any:
    logits = hidden.double() @ weight.double().t()
    logits = logits if bias is None else logits + bias.double()
    return eager.token_stats_forward(logits[None], target, temperature.double(), *rest)


def close(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...], atol: float = 1e-5, rtol: float = 2e-5) -> None:
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.double(), b, atol=atol, rtol=rtol, equal_nan=True)


def forward(*arguments: Any, logits: torch.dtype = torch.float32, scratch: int = 1 << 20) -> tuple[Tensor, ...]:
    return kernels.linear_token_stats_forward(*arguments, logits, scratch)


# ---- through the public functions ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        (name, dtype) for name in CASES for dtype in DTYPES
        if DEVICE == "cuda" or dtype != torch.float16 or name in ("plain", "softcap", "masked")
    ],
    ids=str,
)  # fmt: skip
def test_values_without_logits(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within the errors of materialised logits, and not a single product outside of the kernel."""
    case = CASES[name](dtype).to(DEVICE)
    monkeypatch.setattr(linear_tiles, "multiply", lambda *_: pytest.fail("a product by torch"))
    judge(case, run(case, grad=(), backend="triton"))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, torch.float32) for name in ("plain", "ignored", "padding", "softcap")),
        ("softcap", torch.bfloat16),
    ],
    ids=str,
)  # fmt: skip
def test_gradients_from_its_state(name: str, dtype: torch.dtype) -> None:
    """The recomputing backward pass starts from the state that the kernel has left."""
    case = CASES[name](dtype).to(DEVICE)
    _, budget = next(found for found in budgets(case) if found[0].startswith("recompute"))
    judge(case, run(case, memory_budget=budget, backend="triton"))


def test_autocast_converts_a_part_of_the_weight_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES["plain"](torch.float32).to(DEVICE)
    with torch.no_grad(), torch.autocast(DEVICE, dtype=torch.bfloat16):
        plan = ek.linear_plan(case.hidden, case.weight, case.bias, memory_budget=40_000)
        got = run(case, grad=(), memory_budget=40_000, backend="triton")
        expected = run(case, grad=(), backend="torch")
    assert plan.vocab_chunks > 1
    for name in got:
        torch.testing.assert_close(got[name], expected[name], rtol=0.05, atol=0.05)


def test_fp64_and_kept_logits_go_through_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "linear_token_stats_forward", lambda *_: pytest.fail("the fused kernel"))
    case = CASES["plain"](torch.float32).to(DEVICE)
    run(case, backend="triton")
    if DEVICE == "cpu":
        run(CASES["plain"](torch.float64), grad=(), backend="triton")


# ---- when it is chosen -----------------------------------------------------------------------------------------------


def test_only_who_names_the_backend_gets_it(monkeypatch: pytest.MonkeyPatch, forgetful_registry: None) -> None:
    add_stub_gpu(monkeypatch)
    for pairs in ([], [("linear_token_stats", name, "sm_90") for name in ("triton", "cuda")]):
        verify(monkeypatch, *pairs)
        served = {name: registry.fused("linear_token_stats", name, torch.device("cuda"))
                  for name in ("auto", "triton", "torch", "cuda")}  # fmt: skip
        fused = kernels.linear_token_stats_forward
        assert served == {"auto": None, "triton": fused, "torch": None, "cuda": None}


# ---- the kernel ------------------------------------------------------------------------------------------------------


def tilings(itemsize: int, rows: int, softcap: bool) -> list[tuple[bool, LinearTiling]]:
    """(described, tiling): all candidates of the GPU, or of all targets those that differ in more than what the
    interpreter knows nothing of, the stages and the warps that do not tell how many are resident.
    """
    found = {}
    for on in HARDWARE.values() if DEVICE == "cpu" else (HARDWARE["sm_90"],):
        for described in (True, False) if on.descriptors and itemsize == 2 else (False,):
            for cut in tiling.linear_candidates(itemsize, rows, described, softcap, on):
                known: Any = cut if DEVICE == "cuda" else (cut.rows, cut.columns, cut.features, cut.resident)
                found.setdefault((described, known), replace(cut, group=2))
    return [(described, cut) for (described, _), cut in found.items()]


@pytest.mark.parametrize(
    ("dtype", "rows", "softcap"),
    [
        *((dtype, rows, cap) for dtype in (torch.bfloat16, torch.float32) for rows in (40, 130) for cap in (0.0, 3.0)),
        (torch.float16, 40, 3.0), *([(torch.float16, 130, 0.0)] if DEVICE == "cuda" else []),
    ],
    ids=str,
)  # fmt: skip
def test_every_tiling(dtype: torch.dtype, rows: int, softcap: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some tiles of rows, in groups that do not divide them; parts of one and of several tiles, the last one short."""
    monkeypatch.setattr(tiling, "hardware", lambda device: HARDWARE["sm_90"])
    cuts = tilings(dtype.itemsize, rows, softcap != 0)
    for columns in sorted({cut.columns for _, cut in cuts}):
        vocab = 4 * columns + 76
        case = inputs(rows, 80, vocab, dtype)
        options = RowOptions(softcap, -100, 0, vocab - 10)
        expected = exact(*case, options, ALL)
        for described, cut in cuts:
            if cut.columns == columns:
                monkeypatch.setattr(kernels, "_described", lambda *_, described=described: described)
                close(kernels.forward(cut, *case, options, ALL, torch.float32, 1 << 20), expected)


def test_parts() -> None:
    """They cover the vocabulary, keep to the memory, and fill the multiprocessors."""
    cut = LinearTiling(128, 128, 64, 8, 3)
    for rows in (1, 100, 8192):
        for columns in (0, 1, 128, 129, 128_256):
            for most in (0, 1, 5, 1000):
                parts, tiles = cut.parts(rows, columns, most, 132)
                assert 1 <= parts <= max(1, min(most, tiling.MAX_SPLITS))
                assert parts * tiles * 128 >= columns and (parts - 1) * tiles * 128 <= max(0, columns - 1)
    assert cut.parts(1, 128_256, 1000, 132)[0] > 100
    assert cut.parts(8192, 128_256, 1000, 132)[0] > 16
    pair = LinearTiling(128, 128, 64, 4, 3)  # two on a multiprocessor
    assert pair.parts(8192, 128_256, 1000, 132) == cut.parts(8192, 128_256, 1000, 2 * 132)


def test_two_programs_share_a_multiprocessor_where_their_sums_fit_the_registers() -> None:
    hopper = tiling.Hardware(132, 32, True)
    pair, wide, *_ = tiling.linear_candidates(2, 8192, True, False, hopper)
    assert (pair.columns, pair.warps, pair.resident) == (128, 4, 2)
    assert (wide.columns, wide.warps, wide.resident) == (256, 8, 1)
    assert 2 * (pair.shared(2) + 1024) <= 228 << 10
    blackwell = tiling.Hardware(148, 32, True, tensor_memory=True)
    assert tiling.linear_candidates(2, 8192, True, False, blackwell)[:2] == (wide, pair)
    assert {cut.warps for cut in tiling.linear_candidates(2, 8192, True, True, hopper)} == {8}


@pytest.mark.parametrize("scratch", (0, 2 * 24 * 70, 1 << 20))
def test_memory_for_parts(scratch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiling, "hardware", lambda device: tiling.Hardware(8, 32, True, descriptors=False))
    case = inputs(70, 24, 700)
    close(forward(*case, plain(700), ALL, scratch=scratch), exact(*case, plain(700), ALL))


@pytest.mark.parametrize("bias", (True, False))
@pytest.mark.parametrize("want", (3, ALL, *(bits(name) for name in NAMES)))
def test_what_is_wanted(want: int, bias: bool) -> None:
    case = list(inputs(5, 24, 90))
    case[2] = case[2] if bias else None
    got = forward(*case, plain(90), want)
    assert got[1].shape == (state_rows(want), 5)
    close(got, exact(*case, plain(90), want))


def test_shards_merge() -> None:
    """Unequal parts, one of padding alone and one without columns, as ranks and chunks hand them over."""
    hidden, weight, bias, target, temperature = inputs(20, 24, 300)
    weight[280:] = math.nan
    states = []
    for a, b in ((0, 7), (7, 7), (7, 250), (250, 285), (285, 300)):
        part = (hidden, weight[a:b], bias[a:b], target % 280, temperature)
        states.append(forward(*part, plain(280).of_part(a), ALL)[1])
    whole = exact(hidden, weight[:280], bias[:280], target % 280, temperature, plain(280), ALL)[1]
    close((merge(torch.stack(states), temperature),), (whole,))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits_are_rounded_once(dtype: torch.dtype) -> None:
    """Bias included, to nearest even; what is left is the order of the product's sums, so a few may round elsewise."""
    case = inputs(20, 64, 300, torch.float32)
    hidden, weight, bias, target, temperature = case
    logits = (hidden.double() @ weight.double().t() + bias.double()).to(dtype)
    expected, _ = eager.token_stats_forward(logits.double()[None], target, temperature.double(), plain(300), ALL)
    got, _ = forward(*case, plain(300), ALL, logits=dtype)
    away, _ = exact(*case, plain(300), ALL)
    for i in range(4):
        error, rounding = ((got[i].double() - x[i]).abs() for x in (expected, away))
        assert error.median() < 2e-5
        assert dtype == torch.float32 or error.median() < 0.1 * rounding.median()


def special(value: float, where: str) -> tuple[Tensor, ...]:
    hidden, weight, bias, target, temperature = inputs(6, 24, 300)
    if where == "state":
        hidden[2, 3] = value
    elif where == "entry":
        weight[17, 3] = value
    else:
        bias[17] = value
    return hidden, weight, bias, target, temperature


@pytest.mark.parametrize("where", ("state", "entry", "bias"))
@pytest.mark.parametrize("value", (math.nan, math.inf, -math.inf))
def test_non_finite_numbers(value: float, where: str) -> None:
    """NaN and +inf poison the rows that meet them, and no other; -inf in the bias masks an entry."""
    case = special(value, where)
    stats, _ = forward(*case, plain(300), ALL)
    close((stats,), (exact(*case, plain(300), ALL)[0],))
    bad = stats[1].isnan()
    if where == "state":
        assert bad[2] and bad.sum() == 1
    elif where == "bias":
        assert bad.all() if value != -math.inf else not bad.any()


def test_rows_by_label_and_temperature() -> None:
    case = list(inputs(6, 24, 300))
    case[3] = torch.tensor([-100, 0, 299, 300, -1, 5], device=DEVICE)
    case[0][0] = math.nan
    case[4][5] = 0.0
    stats, _ = forward(*case, plain(300), ALL)
    close((stats,), (exact(*case, plain(300), ALL)[0],))
    assert not stats[:, 0].any() and stats[0, 3:].isnan().all()
    case[3] = torch.full((6,), -100, device=DEVICE, dtype=torch.int32)
    assert not forward(*case, plain(300), ALL)[0].any(), "nothing but ignored rows"


def test_a_masked_vocabulary() -> None:
    """All of it but one entry, and all of it."""
    hidden, weight, bias, target, temperature = inputs(6, 24, 300)
    bias[:] = -math.inf
    assert forward(hidden, weight, bias, target, temperature, plain(300), 3)[0][1].isnan().all()
    bias[target[0]] = 1.0
    logprob, entropy = forward(hidden, weight, bias, target, temperature, plain(300), 3)[0]
    assert logprob[0] == 0 and (entropy == 0).all() and not entropy.signbit().any()
    assert (logprob[target != target[0]] == -math.inf).all()


@pytest.mark.parametrize("gap", (12.0, 15.0, 40.0))
def test_collapsed_entropy(gap: float) -> None:
    hidden, weight = torch.ones(3, 16, device=DEVICE), torch.zeros(2048, 16, device=DEVICE)
    weight[7] = gap / 16
    case = (hidden, weight, None, torch.full((3,), 7, device=DEVICE), torch.ones(1, device=DEVICE))
    got, expected = (f(*case, plain(2048), 3)[0][1].double() for f in (forward, exact))
    torch.testing.assert_close(got, expected, atol=2e-6, rtol=1e-6)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32), ids=str)
def test_layouts(dtype: torch.dtype) -> None:
    """Rows that no descriptor can describe, transposed weights, strides; empty sides."""
    hidden, weight, bias, target, temperature = inputs(20, 64, 304, dtype)
    expected = exact(hidden, weight, bias, target, temperature, plain(304), ALL)
    wide = torch.stack([hidden, hidden + 1], -1)[..., 0]
    odd = torch.cat([weight[:, :1], weight], 1)[:, 1:]
    flat = weight.t().contiguous().t()
    strided = torch.stack([bias, bias], -1)[:, 0]
    for h, w in ((hidden, weight), (wide, weight), (hidden, odd), (hidden, flat)):
        close(forward(h, w, strided, target, temperature, plain(304), ALL), expected)
    one, _ = forward(hidden, weight[:1], bias[:1], target * 0, temperature, plain(1), ALL)
    assert not one[[0, 1, 3]].any() and (one[2] == 1).all()
    assert forward(hidden[:0], weight, bias, target[:0], temperature[:0], plain(304), ALL)[0].shape == (len(NAMES), 0)


def test_two_sizes_of_h_are_two_classes() -> None:
    names = set()
    for features in (64, 65):
        hidden, weight, *_ = inputs(150, features, 300, torch.bfloat16)
        names.add(kernels.choices(hidden, weight, plain(300), 3)[0].direction)
    assert names == {"linear-6", "linear-7"}


def test_which_matrices_the_hardware_copies_by_itself() -> None:
    from entropy_kernels.backends.triton.linear_token_stats import _describable

    matrix = torch.zeros(8, 64, dtype=torch.bfloat16)
    assert _describable(matrix) and _describable(matrix[:, :24]) and _describable(matrix[::2])
    for other in (matrix.float(), matrix[:, 1:], matrix.t(), matrix[:1].expand(8, 64), matrix[:0], matrix[:, :60:2]):
        assert not _describable(other)
    assert not _describable(torch.zeros(8, 60, dtype=torch.bfloat16))  # rows of 120 bytes

"""The CUDA kernels of token_stats without a GPU.

Their functions, run on the CPU (cuda_emulator.cpp), take the place of the C++ kernels, so that whole calls with
autograd are held to the bound of every backend. On a GPU the kernels run in every test with the fixture `on`.
"""

from __future__ import annotations

import ctypes
import dataclasses
import itertools
import math
import mmap
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import cuda_emulator
from calls import bound, check, run, same_bits, upstream
from cases import CASES
from conftest import BackendDevice
from cuda_emulator import Emulated
from entropy_kernels._rows import NAMES, SECOND_ORDER, STATISTICS, RowOptions, bits
from entropy_kernels.backends import native, registry
from entropy_kernels.backends.eager import token_stats as eager
from sample import Case, labels, normal, plain

for reason in (native.load_error, cuda_emulator.missing()):
    if reason is not None:
        pytest.skip(reason, allow_module_level=True)

# The ways to cut a row. Three parts, which the launcher never chooses, are more irregular than two or four.
WAYS = {"whole": {}, "parts": {"parts": 3}, "bulk": {"bulk": True}, "cluster": {"bulk": True, "parts": 2}}
ALL = bits(*NAMES)


@pytest.fixture(scope="module")
def library(folder_of_run: Path) -> ctypes.CDLL:
    return cuda_emulator.compile_library(folder_of_run)


@pytest.fixture(params=WAYS)  # indirectly: some of them
def kernels(request: pytest.FixtureRequest, library: ctypes.CDLL) -> Emulated:
    return Emulated(library, **WAYS[request.param])


@pytest.fixture
def on(kernels: Emulated, monkeypatch: pytest.MonkeyPatch) -> Iterator[BackendDevice]:
    """Backend "cpu" with the emulated kernels in place of the C++ ones."""
    for name in registry.OPS["token_stats"].kernels:
        monkeypatch.setattr(native, name, getattr(kernels, name))
    registry.kernel_of.cache_clear()
    yield BackendDevice("cpu", "cpu")
    registry.kernel_of.cache_clear()


def all_grads(rows: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Gradients (S, N) of every statistic; those of what has no gradient are NaN, since nobody may read them."""
    grads = torch.randn(len(STATISTICS), rows, dtype=dtype)
    grads[[not statistic.differentiable for statistic in STATISTICS]] = math.nan
    return grads


@pytest.mark.parametrize("case", CASES, ids=str)
def test_case(case: Case, on: BackendDevice, kernels: Emulated) -> None:
    """Each way with each dtype in some cases, and in each case with one at least; hardware has all of them."""
    whole = not kernels.bulk and kernels.parts == 1
    half = case.slow_dtypes[kernels.parts % 2 ^ kernels.bulk :: 2]
    for dtype in case.slow_dtypes if whole or not half else half:
        check(case.build(dtype, "cpu"), on, "logprob", "entropy", "collision")


class TestExp2:
    """A GPU's ``ex2.approx`` is off by up to 2 ulps, the CPU's exp2 by less than one: the bound must hold for both."""

    @pytest.fixture(autouse=True)
    def exact_afterwards(self, library: ctypes.CDLL) -> Iterator[None]:
        yield
        library.emulate_exp2_ulps(0)

    @pytest.mark.parametrize("kernels", ["whole"], indirect=True)
    @pytest.mark.parametrize("ulps", [2, -2])
    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_off_by_two_ulps(self, case: Case, ulps: int, on: BackendDevice, library: ctypes.CDLL) -> None:
        library.emulate_exp2_ulps(ulps)
        for dtype in case.slow_dtypes:
            if dtype != torch.float64:  # which has no such instruction
                check(case.build(dtype, "cpu"), on, "logprob", "entropy", "collision")

    @pytest.mark.parametrize("kernels", ["cluster"], indirect=True)
    @pytest.mark.parametrize("ulps", [2, -2])
    @pytest.mark.parametrize("softcap", [None, 20.0])
    def test_long_rows(self, softcap: float | None, ulps: int, on: BackendDevice, library: ctypes.CDLL) -> None:
        library.emulate_exp2_ulps(ulps)
        sample = plain(torch.float32, "cpu", rows=1, vocab=151_936, temperature=0.8, softcap=softcap)
        check(sample, on, "logprob", "entropy")

    @pytest.mark.parametrize("kernels", ["whole"], indirect=True)
    @pytest.mark.parametrize("ulps", [4000, -4000])
    def test_a_wrong_one_fails(self, ulps: int, on: BackendDevice, kernels: Emulated, library: ctypes.CDLL) -> None:
        """In the values, and in the gradient of a state that is right."""
        sample, temperature = plain(torch.float32, "cpu", vocab=1031), torch.ones(1)
        arguments, options = (sample.logits[None], sample.target, temperature), RowOptions(0.0, -100, 0, 1031)
        _, state = kernels.token_stats_forward(*arguments, options, ALL)
        grads = upstream(sample, "logprob", "entropy")
        references = bound(sample)

        def gradient() -> Tensor:
            given = torch.stack([grads["logprob"], grads["entropy"]])
            return kernels.token_stats_backward(given, *arguments, state, options, bits(*grads), False)

        references.check_gradient(gradient(), **grads)
        library.emulate_exp2_ulps(ulps)
        with pytest.raises(AssertionError, match=r"gradient: .* beyond the bound"):
            references.check_gradient(gradient(), **grads)
        wrong = dict(zip(NAMES, kernels.token_stats_forward(*arguments, options, ALL)[0], strict=True))
        for name, value in wrong.items():
            with pytest.raises(AssertionError, match=f"{name}: .* beyond the bound"):
                references.check_values(**{name: value})


# Not fp64: over so many terms the float64 reference itself is off by the whole bound.
@pytest.mark.parametrize(
    ("vocab", "softcap", "dtype"),
    [
        (32_000, None, torch.bfloat16), (32_000, 20.0, torch.float16),
        (151_936, None, torch.float32), (151_936, 20.0, torch.bfloat16),
    ],
    ids=str,
)  # fmt: skip
def test_long_rows(vocab: int, softcap: float | None, dtype: torch.dtype, on: BackendDevice) -> None:
    """Every stage of the pipeline is refilled several times; sums of many tiles."""
    check(plain(dtype, "cpu", rows=2, vocab=vocab, temperature=0.8, softcap=softcap), on, "logprob", "entropy")


def test_logprob_entropy_has_no_second_moments(on: BackendDevice) -> None:
    for softcap in (None, 20.0):
        sample = plain(torch.bfloat16, "cpu", vocab=20_011, softcap=softcap)
        check(sample, on, "logprob", "entropy", function="logprob_entropy")


@pytest.mark.parametrize("width", [1, 8, 9, 31, 127, 1031, 8209])
@pytest.mark.parametrize("offset", [0, 1, 3])
def test_any_alignment_and_nothing_beside_the_row(width: int, offset: int, kernels: Emulated) -> None:
    """Rows of a wider buffer, each misaligned differently; in place writes the row's own elements only."""
    for dtype in (torch.bfloat16, torch.float32):
        buffer = torch.full((2, 3, width + 11), 77.0, dtype=dtype)
        view = buffer[..., offset : offset + width]
        view.copy_(normal(2, 3, width, dtype=dtype, device="cpu"))
        target, temperature = labels(6, vocab=width, device="cpu"), torch.rand(6) + 0.5
        options = RowOptions(0.0, -100, 0, width)
        exact = eager.token_stats_forward(view.double(), target, temperature.double(), options, ALL)
        ours = kernels.token_stats_forward(view, target, temperature, options, ALL)
        for a, b in zip(ours, exact, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)
        grads = all_grads(6)
        packed = kernels.token_stats_backward(grads, view, target, temperature, ours[1], options, ALL, False)
        wide = (view.double(), target, temperature.double(), exact[1])
        expected = eager.token_stats_backward(grads.double(), *wide, options, ALL, False)
        torch.testing.assert_close(packed.double(), expected, rtol=1e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-5)
        assert kernels.token_stats_backward(grads, view, target, temperature, ours[1], options, ALL, True) is view
        assert torch.equal(view, packed)
        assert (buffer[..., :offset] == 77).all() and (buffer[..., offset + width :] == 77).all()


def test_strided_columns(on: BackendDevice) -> None:
    sample = plain(torch.bfloat16, "cpu", vocab=3001)
    sample.logits = torch.stack([sample.logits, torch.full_like(sample.logits, math.nan)], -1)[..., 0]
    check(sample, on, "logprob", "entropy", "collision")


def test_bits_do_not_depend_on_the_order_of_threads(library: ctypes.CDLL) -> None:
    """Whichever part is done first: blocks, threads and copies are scheduled differently for every seed."""
    sample = plain(torch.float32, "cpu", rows=3, vocab=40_003)
    logits, temperature = sample.logits[None], torch.ones(1)
    for way in WAYS.values():
        results = [
            Emulated(library, seed=seed, **way).token_stats_forward(
                logits, sample.target, temperature, RowOptions(0.0, -100, 0, 40_003), ALL
            )
            for seed in range(4)
        ]
        for other in results[1:]:
            assert all(same_bits(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("vocab, bulk", [(1031, False), (4096, False), (4096, True)])
def test_bits_do_not_depend_on_the_number_of_rows(
    vocab: int, bulk: bool, dtype: torch.dtype, library: ctypes.CDLL
) -> None:
    """As the switch row_invariant has it: whole rows, and rows that are not all aligned read by elements."""
    kernels = Emulated(library, bulk=bulk, vectors=vocab % 8 == 0)
    logits = normal(1, 9, vocab, dtype=dtype, device="cpu")
    target, temperature = labels(9, vocab=vocab, device="cpu"), torch.rand(9) + 0.5
    grads = all_grads(9)

    def call(part: slice) -> tuple[tuple[Tensor, Tensor], Tensor]:
        rows, options = (logits[:, part], target[part], temperature[part]), RowOptions(0.0, -100, 0, vocab)
        stats, state = kernels.token_stats_forward(*rows, options, ALL)
        return (stats, state), kernels.token_stats_backward(grads[:, part], *rows, state, options, ALL, False)

    whole, gradient = call(slice(None))
    for part in (*(slice(i, i + 1) for i in range(9)), slice(2, 7)):
        values, other = call(part)
        assert all(same_bits(a, b[..., part]) for a, b in zip(values, whole, strict=True))
        assert same_bits(other, gradient[:, part])


def test_more_parts_than_warps(library: ctypes.CDLL) -> None:
    """As many parts as one warp can merge; some of them get nothing of a short row."""
    sample = plain(torch.float32, "cpu", rows=2, vocab=301)
    arguments = (sample.logits[None], sample.target, torch.ones(1), RowOptions(0.0, -100, 0, 301), ALL)
    whole, split = (Emulated(library, parts=parts).token_stats_forward(*arguments) for parts in (1, 32))
    for a, b in zip(whole, split, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_ignored_and_silent_rows_are_not_read(kernels: Emulated) -> None:
    logits = normal(1, 4, 2000, dtype=torch.float32, device="cpu")
    logits[0, 1], logits[0, 2] = math.nan, math.nan
    target, temperature = torch.tensor([5, -100, 7, 9]), torch.ones(1)
    options = RowOptions(0.0, -100, 0, 2000)
    outputs, state = kernels.token_stats_forward(logits, target, temperature, options, ALL)
    assert all(output[1] == 0 and output[2].isnan() and output[3].isfinite() for output in outputs)
    assert state[:, 1].tolist() == [0, 1, 0, 0, 1, 0]
    grads = torch.tensor([1.0, 1.0, 0.0, 1.0]).expand(len(STATISTICS), 4)
    gradient = kernels.token_stats_backward(grads, logits, target, temperature, state, options, ALL, False)
    assert (gradient[0, 1:3] == 0).all() and gradient.isfinite().all() and (gradient[0, [0, 3]] != 0).any(-1).all()


# (batch, tokens, columns) of 6 rows: rows apart, side by side and misaligned, transposed, with strided columns.
LAYOUTS = {
    "aligned": lambda dtype: torch.empty(2, 3, 4096, dtype=dtype),
    "misaligned": lambda dtype: torch.empty(2, 3, 1031, dtype=dtype),
    "apart": lambda dtype: torch.empty(2, 3, 1040, dtype=dtype)[..., 3:1034],
    "transposed": lambda dtype: torch.empty(3, 2, 1031, dtype=dtype).transpose(0, 1),
    "strided columns": lambda dtype: torch.empty(2, 3, 600, 2, dtype=dtype)[..., 1],
    "short": lambda dtype: torch.empty(2, 3, 5, dtype=dtype),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kernels", ["whole", "parts"], indirect=True)
def test_gradient_in_reversed_order_has_the_same_bits(kernels: Emulated, layout: str, dtype: torch.dtype) -> None:
    logits = LAYOUTS[layout](dtype)
    vocab = logits.shape[-1]
    logits.copy_(normal(2, 3, vocab, dtype=dtype, device="cpu"))
    accumulator = torch.float64 if dtype == torch.float64 else torch.float32
    target, temperature = labels(6, vocab=vocab, device="cpu"), torch.rand(6, dtype=accumulator) + 0.5
    target[1] = -100
    arguments, options = (logits, target, temperature), RowOptions(0.0, -100, 0, vocab)
    _, state = kernels.token_stats_forward(*arguments, options, ALL)
    grads = all_grads(6, accumulator)
    grads[:, 4] = 0
    backwards = dataclasses.replace(kernels, reversed=True)
    expected, packed = (
        k.token_stats_backward(grads, *arguments, state, options, ALL, False) for k in (kernels, backwards)
    )
    assert torch.equal(packed, expected) and (expected[0, 1] == 0).all() and (expected[1, 1] == 0).all()
    assert backwards.token_stats_backward(grads, *arguments, state, options, ALL, True) is logits
    assert torch.equal(logits, expected)


@pytest.mark.parametrize("kernels", ["parts"], indirect=True)
def test_reversed_order_begins_with_the_last_row(kernels: Emulated) -> None:
    logits, target, temperature = torch.randn(1, 4, 9001), torch.tensor([1, 2, 3, 4]), torch.ones(1)
    options = RowOptions(0.0, -100, 0, 9001)
    _, state = kernels.token_stats_forward(logits, target, temperature, options, ALL)
    for order, row in ((False, 0), (True, 3)):
        first = dataclasses.replace(kernels, reversed=order, blocks=kernels.parts)
        gradient = first.token_stats_backward(
            torch.ones(1, 4), logits, target, temperature, state, options, bits("logprob"), False
        )
        assert [not x.isnan().any() for x in gradient[0]] == [i == row for i in range(4)]


@pytest.mark.parametrize("order", ["forward", "reversed"])
def test_gradient_of_rows_beyond_2_31_elements(order: str, library: ctypes.CDLL) -> None:
    """In place in a buffer of 4 GB, of which only the pages of three rows exist."""
    stride, vocab = 2**30 + 8, 1031
    memory = mmap.mmap(-1, 2 * (2 * stride + vocab), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    buffer = torch.frombuffer(memory, dtype=torch.bfloat16)
    logits = buffer.as_strided((1, 3, vocab), (0, stride, 1))
    logits.copy_(normal(1, 3, vocab, dtype=torch.bfloat16, device="cpu"))
    target, temperature, grad = labels(3, vocab=vocab, device="cpu"), torch.ones(1), torch.tensor([1.0, 2.0, 3.0])
    kernels, options = Emulated(library, reversed=order == "reversed"), RowOptions(0.0, -100, 0, vocab)
    want = bits("logprob", "entropy")

    def gradient(of: Tensor, inplace: bool) -> Tensor:
        _, state = kernels.token_stats_forward(of, target, temperature, options, want)
        return kernels.token_stats_backward(grad.expand(2, 3), of, target, temperature, state, options, want, inplace)

    expected = gradient(logits.contiguous(), False)
    assert torch.equal(gradient(logits, True), expected)


def test_what_is_invalid_is_nan(kernels: Emulated) -> None:
    """Without a sync nobody can raise: labels out of range and temperatures that are not > 0 show in the results."""
    logits, target = normal(1, 6, 50, dtype=torch.float32, device="cpu"), torch.tensor([50, -1, 3, 3, 3, 3])
    temperature = torch.tensor([1.0, 1.0, 0.0, -1.0, math.nan, 1.0])
    options = RowOptions(0.0, -100, 0, 50)
    outputs, state = kernels.token_stats_forward(logits, target, temperature, options, ALL)
    assert all(output[:5].isnan().all() and output[5].isfinite() for output in outputs)
    grads = torch.ones(len(STATISTICS), 6)
    gradient = kernels.token_stats_backward(grads, logits, target, temperature, state, options, ALL, False)
    assert gradient[0, 2:5].isnan().all() and gradient[0, 5].isfinite().all()


@pytest.mark.parametrize("where", [0, 40, 8200, 9000])
@pytest.mark.parametrize("others", [0.0, -math.inf])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_and_inf_are_found(value: float, others: float, where: int, kernels: Emulated) -> None:
    """Maxima skip NaN, and a thread that has seen nothing but -inf adds nothing: neither may hide a NaN."""
    for dtype in (torch.bfloat16, torch.float32):
        logits = torch.full((1, 2, 9001), others, dtype=dtype)
        logits[0, :, 5] = 1.0
        logits[0, 0, where] = value
        arguments, options = (logits, torch.tensor([5, 5]), torch.ones(1)), RowOptions(0.0, -100, 0, 9001)
        outputs, state = kernels.token_stats_forward(*arguments, options, ALL)
        assert all(output[0].isnan() and output[1].isfinite() for output in outputs)
        assert not state[0, 0].isfinite() and state[:, 1].isfinite().all()
        grads = torch.ones(len(STATISTICS), 2)
        gradient = kernels.token_stats_backward(grads, *arguments, state, options, ALL, False)
        assert gradient[0, 0].isnan().all() and gradient[0, 1].isfinite().all()


@pytest.mark.parametrize("temperature", [0.37, 1.0, 1e-34])
@pytest.mark.parametrize("maximum", [0.0, 3.70703125, -1234.5, 3e6, 1e30])
def test_one_finite_entry_has_no_entropy(maximum: float, temperature: float, kernels: Emulated) -> None:
    """Exactly, though its exponent is the rounding error of maximum / temperature, and not 0."""
    logits = torch.full((1, 2, 9001), -math.inf)
    logits[0, 0, 8500] = logits[0, 1, 3] = maximum
    logits[0, 1, 4] = maximum - 200 * max(1.0, temperature, abs(maximum) / 1e5)  # whose probability is 0
    arguments = logits, torch.tensor([8500, 3]), torch.full((1,), temperature)
    stats, state = kernels.token_stats_forward(*arguments, RowOptions(0.0, -100, 0, 9001), ALL)
    for name, value in (("logprob", 0), ("entropy", 0), ("collision", 1), ("vocab_covariance", 0), ("p_max", 1)):
        assert (stats[NAMES.index(name)] == value).all(), name
    assert (state[1] == 1).all() and (state[2] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("offset", [0.0, 1000.0])
@pytest.mark.parametrize("kept", [1, 40, 20_000, 29_990])
def test_masked_rows(kept: int, offset: float, dtype: torch.dtype, on: BackendDevice) -> None:
    """-inf in all tiles, in some, and in one: threads leave the short way to an exponent where they meet it."""
    sample = plain(dtype, "cpu", rows=2, vocab=30_001, temperature=0.8)
    logits = sample.logits.detach() + offset
    masked = torch.randperm(30_001)[kept:]
    logits[..., masked] = -math.inf
    check(dataclasses.replace(sample, logits=logits), on, "logprob", "entropy", "collision")


def test_shards_merge_to_the_whole(kernels: Emulated) -> None:
    """States of column shards, also empty and padded ones: what a vocabulary-parallel group gathers."""
    from entropy_kernels.backends.eager import softmax_state

    logits, vocab = normal(1, 4, 9001, dtype=torch.float32, device="cpu"), 8990
    target, temperature = torch.tensor([3, 4000, 8989, -100]), torch.rand(4) + 0.5

    def forward(part: Tensor, start: int) -> tuple[Tensor, ...]:
        return kernels.token_stats_forward(part, target, temperature, RowOptions(0.0, -100, start, vocab), ALL)

    whole = forward(logits, 0)
    edges = (0, 9, 4000, 4000, 8995, 9001)
    spans = list(itertools.pairwise(edges))
    states = torch.stack([forward(logits[..., a:b], a)[1] for a, b in spans])
    assert (states[-1, 0, :3] == -math.inf).all() and (states[-1, 1, :3] == 0).all()  # all of it is padding
    merged = softmax_state.merge(states, temperature)
    torch.testing.assert_close(merged[:, :3], whole[1][:, :3], rtol=1e-5, atol=1e-5)
    grads = all_grads(4)

    def backward(part: Tensor, start: int) -> Tensor:
        options = RowOptions(0.0, -100, start, vocab)
        return kernels.token_stats_backward(grads, part, target, temperature, whole[1], options, ALL, False)

    parts = [backward(logits[..., a:b], a) for a, b in spans]
    gradient = backward(logits, 0)
    torch.testing.assert_close(torch.cat(parts, -1), gradient, rtol=1e-6, atol=0)
    assert (gradient[..., vocab:] == 0).all()


def test_unwanted_outputs_are_not_written(kernels: Emulated) -> None:
    sample = plain(torch.float32, "cpu")
    arguments = (sample.logits[None], sample.target, torch.ones(1), RowOptions(0.0, -100, 0, 97))
    full, _ = kernels.token_stats_forward(*arguments, ALL)
    for want in range(ALL + 1):
        outputs, state = kernels.token_stats_forward(*arguments, want)
        assert state.shape == (6 if want & SECOND_ORDER else 4, 5) and not state.isnan().any()
        assert same_bits(outputs, full[[i for i in range(len(STATISTICS)) if want >> i & 1]])


def test_missing_and_expanded_upstream(on: BackendDevice, kernels: Emulated) -> None:
    sample = plain(torch.float32, "cpu", vocab=500)
    for names in (("logprob",), ("entropy",), ("collision",), ("logprob", "entropy")):
        check(sample, on, *names)
    options = RowOptions(0.0, -100, 0, 500)
    _, state = kernels.token_stats_forward(sample.logits[None], sample.target, torch.ones(1), options, 3)
    arguments = (sample.logits[None], sample.target.int(), torch.ones(1), state, options)
    one = torch.tensor(0.3)
    plain_gradient = kernels.token_stats_backward(one.expand(1, 5).clone(), *arguments, bits("logprob"), False)
    assert torch.equal(
        kernels.token_stats_backward(one.expand(1, 5), *arguments, bits("logprob"), False), plain_gradient
    )
    both, transposed = one.expand(2, 5), torch.full((5, 2), 0.3).t()
    a, b = (kernels.token_stats_backward(grads, *arguments, 3, False) for grads in (both, transposed))
    assert torch.equal(a, b)


def test_a_gradient_of_zero_is_none(kernels: Emulated) -> None:
    """Whatever its statistic holds: the sums of second order are NaN here."""
    arguments, options = (
        (normal(1, 4, 500, dtype=torch.float32, device="cpu"), torch.arange(4), torch.ones(1)),
        RowOptions(0.0, -100, 0, 500),
    )
    _, state = kernels.token_stats_forward(*arguments, options, ALL)
    state[4:] = math.nan
    grads = all_grads(4)
    grads[NAMES.index("collision")] = 0
    expected = kernels.token_stats_backward(grads[:2], *arguments, state, options, bits("logprob", "entropy"), False)
    assert torch.equal(kernels.token_stats_backward(grads, *arguments, state, options, ALL, False), expected)


def test_every_row_is_written_once_per_call(on: BackendDevice) -> None:
    """A batch whose rows lie apart, several of them, with a per-token temperature: offsets of every row."""
    base = normal(7, 3, 2 * 203, dtype=torch.bfloat16, device="cpu")
    sample = plain(torch.bfloat16, "cpu")
    sample.logits, sample.target = base.transpose(0, 1)[..., :203], labels(3, 7, vocab=203, device="cpu")
    sample.kwargs = {"temperature": torch.rand(3, 7) + 0.5}
    check(sample, on, "logprob", "entropy", "collision")
    first, gradient = run(sample, on, grads=upstream(sample, "logprob"))
    second, again = run(sample, on, grads=upstream(sample, "logprob"))
    assert gradient is not None and again is not None and same_bits(gradient, again)
    assert all(same_bits(first[name], second[name]) for name in first)

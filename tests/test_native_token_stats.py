"""The C++ CPU kernels themselves: every instruction set of this CPU, forced in one process, against the torch kernels.

What the public functions promise is tested for all backends in test_token_stats*.py. Here is what only these kernels
have: three instruction sets that must agree, blocks and lines whose edges may be anywhere, rows split into parts,
streaming stores, threads, and the state's primitives (csrc/common/softmax_state.h).
"""

from __future__ import annotations

import itertools
import math
import platform
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from entropy_kernels._rows import LOGPROB, NAMES, SECOND_ORDER, STATISTICS, RowOptions, bits
from entropy_kernels.backends import native
from entropy_kernels.backends.eager import softmax_state
from entropy_kernels.backends.eager import token_stats as eager

if native.load_error is not None:
    pytest.skip(native.load_error, allow_module_level=True)

from entropy_kernels import _C  # type: ignore[attr-defined]

VARIABLE = "ENTROPY_KERNELS_CPU_CAPABILITY"
AVAILABLE = native.cpu_capability().available
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
ALL = bits(*NAMES)


@pytest.fixture(params=["default", "avx2", "avx512"])
def capability(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param not in AVAILABLE:
        pytest.skip(f"this CPU has {', '.join(AVAILABLE)}, not {request.param}")
    monkeypatch.setenv(VARIABLE, request.param)
    return request.param


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def problem(batch: int, length: int, vocab: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (B, L, V), targets (N,) with an ignored one, temperatures (N,)."""
    generator = torch.Generator().manual_seed(seed)
    rows = batch * length
    logits = (4 * torch.randn(batch, length, vocab, generator=generator, dtype=torch.float64)).to(dtype)
    target = torch.randint(0, vocab, (rows,), generator=generator)
    if rows > 2:
        target[1] = -100
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return logits, target, (torch.rand(rows, generator=generator, dtype=torch.float64) + 0.5).to(wide)


def forward(kernel, logits, target, temperature, *, softcap=0.0, start=0, size=None, want=ALL):
    size = start + logits.shape[-1] if size is None else size
    return kernel.token_stats_forward(logits, target, temperature, RowOptions(softcap, -100, start, size), want)


def backward(
    kernel, grads, logits, target, temperature, state, *, softcap=0.0, start=0, size=None, want=ALL, inplace=False
):
    size = start + logits.shape[-1] if size is None else size
    options = RowOptions(softcap, -100, start, size)
    return kernel.token_stats_backward(grads, logits, target, temperature, state, options, want, inplace)


def upstream(rows: int, dtype: torch.dtype) -> Tensor:
    """Gradients (S, N) of every statistic; those of what has no gradient are NaN, since nobody may read them."""
    grads = torch.randn(len(STATISTICS), rows, dtype=dtype, generator=torch.Generator().manual_seed(0))
    for grad, statistic in zip(grads, STATISTICS, strict=True):
        if not statistic.differentiable:
            grad.fill_(math.nan)
    return grads


def assert_matches_float64(logits, target, temperature, **kwargs) -> None:
    """Statistics, state and gradient within a few fp32 roundings (fp64 ones for fp64) of the torch kernels in fp64."""
    wide = temperature.dtype
    eps = torch.finfo(wide).eps
    exact, exact_state = forward(eager, logits.double(), target, temperature.double(), **kwargs)
    ours, state = forward(native, logits, target, temperature, **kwargs)
    entropy_size = 1 + exact[NAMES.index("entropy")].abs()
    for name, a, b in zip(NAMES, ours, exact, strict=True):
        scale = entropy_size + (b.abs() if name == "logprob" else 0)
        assert a.dtype == wide
        assert (a.double() - b).abs().le(16 * eps * scale).all(), name
    for k, name in enumerate(("m", "s", "w", "x_y", "s2", "w2")):
        torch.testing.assert_close(state[k].double(), exact_state[k], rtol=64 * eps, atol=64 * eps, msg=name)
    grads = upstream(target.numel(), wide)
    d_exact = backward(eager, grads.double(), logits.double(), target, temperature.double(), exact_state, **kwargs)
    d_ours = backward(native, grads, logits, target, temperature, state, **kwargs)
    assert d_ours.dtype == logits.dtype and d_ours.is_contiguous()
    # relative to the terms of the row's largest gradient, and one rounding to the logits' dtype (subnormal in fp16);
    # test_token_stats_grad.py holds every element to its own bound
    size = (grads.double().abs().nansum(0) / temperature.double()).view(*logits.shape[:2], 1)
    out = torch.finfo(logits.dtype)
    allowed = 64 * eps * size + 0.51 * out.eps * d_exact.abs() + out.tiny * out.eps
    assert (d_ours.double() - d_exact).abs().le(allowed).all()


def equal(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))


# A line is 16 fp32 or 32 halves, a block 128 lines, a part 16384 columns: sizes around each of them.
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [1, 2, 15, 16, 17, 31, 32, 33, 97, 2047, 2048, 2049, 4097, 8192, 8193, 16385, 20011])
def test_widths(capability: str, dtype: torch.dtype, vocab: int) -> None:
    assert_matches_float64(*problem(2, 3, vocab, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [5, 64, 4100])
def test_softcap(capability: str, dtype: torch.dtype, vocab: int) -> None:
    logits, target, temperature = problem(2, 3, vocab, dtype)
    assert_matches_float64(logits, target, temperature, softcap=6.0)


@pytest.mark.parametrize("vocab", [151936, 262144])
@pytest.mark.parametrize("spread", [0.01, 1.0, 8.0])
def test_long_rows_are_accurate(capability: str, vocab: int, spread: float) -> None:
    """Entropy to 1e-6 nats at the largest vocabularies, also near uniform, where every term counts the same."""
    logits = spread * torch.randn(1, 2, vocab, generator=torch.Generator().manual_seed(3)) + 1000
    target, temperature = torch.tensor([7, vocab - 1]), torch.ones(1)
    exact, _ = forward(eager, logits.double(), target, temperature.double())
    ours, _ = forward(native, logits, target, temperature)
    for a, b in zip(ours, exact, strict=True):
        # an fp32 of about 12 cannot be closer than 5e-7
        torch.testing.assert_close(a.double(), b, rtol=1.2e-7, atol=5e-7)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides(capability: str, dtype: torch.dtype) -> None:
    """Any layout of the same numbers gives the same bits, and in place writes only the logits' own elements."""
    logits, target, temperature = problem(3, 4, 4133, dtype)
    grads = upstream(12, temperature.dtype)
    expected = forward(native, logits, target, temperature)
    gradient = backward(native, grads, logits, target, temperature, expected[1])
    wide = torch.full((3, 4, 4140), 99.0, dtype=dtype)
    wide[..., 3:4136] = logits
    layouts = {
        "sliced, misaligned": wide[..., 3:4136],
        "batch transposed": logits.transpose(0, 1).contiguous().transpose(0, 1),
        "vocabulary strided": logits.transpose(1, 2).contiguous().transpose(1, 2),
        "every second column": torch.stack([logits, logits], -1).flatten(-2)[..., ::2],
    }
    for name, view in layouts.items():
        assert torch.equal(view, logits)
        out = forward(native, view, target, temperature)
        assert all(equal(a, b) for a, b in zip(out, expected, strict=True)), name
        d = backward(native, grads, view, target, temperature, out[1])
        assert d.is_contiguous() and torch.equal(d, gradient), name
        assert backward(native, grads, view, target, temperature, out[1], inplace=True) is view
        assert torch.equal(view, gradient), name
    assert (wide[..., :3] == 99).all() and (wide[..., 4136:] == 99).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("offset", [0, 1, 5])
def test_streamed_gradient_equals_cached(capability: str, dtype: torch.dtype, offset: int) -> None:
    """From 16 MB on the gradient bypasses the caches: whole lines in the middle, the rest around them."""
    vocab = (14_601 if dtype == torch.float32 else 29_501) + offset
    logits, target, temperature = problem(1, 32, vocab, dtype)
    logits, target, temperature = logits.repeat(1, 9, 1), target.repeat(9), temperature.repeat(9)
    rows = len(target)
    grads = upstream(rows, torch.float32)
    state = forward(native, logits, target, temperature)[1]
    large = backward(native, grads, logits, target, temperature, state)
    assert large.nbytes >= 16 << 20
    inplace = backward(native, grads, logits, target, temperature, state, inplace=True)
    assert torch.equal(large, inplace)


@pytest.mark.parametrize("rows", [1, 3, 300])
def test_threads_do_not_change_bits(capability: str, rows: int) -> None:
    """Few rows are split into parts by shape alone, so one thread and many agree to the bit."""
    logits, target, temperature = problem(1, rows, 33_000, torch.float32)
    grads = upstream(rows, torch.float32)
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        out = forward(native, logits, target, temperature)
        results.append([*out, backward(native, grads, logits, target, temperature, out[1])])
    for other in results[1:]:
        assert all(equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_instruction_sets_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """All run one sixteen-lane source; with fused multiply-add (AVX2, AVX-512) the results are the same bits."""
    for dtype in DTYPES:
        logits, target, temperature = problem(2, 3, 9001, dtype)
        grads = upstream(6, temperature.dtype)
        results = {}
        for name in AVAILABLE:
            monkeypatch.setenv(VARIABLE, name)
            out = forward(native, logits, target, temperature, softcap=9.0)
            results[name] = [*out, backward(native, grads, logits, target, temperature, out[1], softcap=9.0)]
        for name, result in results.items():
            for a, b in zip(result, results["default"], strict=True):
                torch.testing.assert_close(a, b, rtol=1e-2 if a.dtype == torch.bfloat16 else 1e-3, atol=2e-5)
            if name == "avx512":
                assert all(equal(a, b) for a, b in zip(result, results["avx2"], strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("where", [0, 40, 2100, 9000])
@pytest.mark.parametrize("others", [0.0, -math.inf])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_and_inf_are_found(capability: str, dtype: torch.dtype, where: int, others: float, value: float) -> None:
    """Maxima skip NaN, and blocks of -inf are skipped whole: neither may hide a NaN, wherever it stands."""
    logits = torch.full((1, 2, 9001), others, dtype=dtype)
    logits[0, :, 5] = 1.0
    logits[0, 0, where] = value
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    target, temperature = torch.tensor([5, 5]), torch.ones(1, dtype=wide)
    outputs, state = forward(native, logits, target, temperature)
    for output in outputs:
        assert output[0].isnan() and output[1].isfinite()
    gradient = backward(native, upstream(2, wide), logits, target, temperature, state)
    assert gradient[0, 0].isnan().all() and gradient[0, 1].isfinite().all()


VALUES_OF_ONE_ENTRY = {
    "logprob": 0, "entropy": 0, "collision": 1, "vocab_covariance": 0, "p_max": 1, "mean_logit": -3
}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_finite_entry_is_exact(capability: str, dtype: torch.dtype) -> None:
    for vocab in (1, 40, 9001):
        for where in (0, vocab - 1):
            logits = torch.full((1, 1, vocab), -math.inf, dtype=dtype)
            logits[..., where] = -3.0
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            out = forward(native, logits, torch.tensor([where]), torch.full((1,), 0.7, dtype=wide))
            outputs, state = out
            assert dict(zip(NAMES, outputs[:, 0].tolist(), strict=True)) == VALUES_OF_ONE_ENTRY
            assert math.copysign(1, outputs[NAMES.index("entropy")].item()) == 1
            assert state[:, 0].tolist() == [-3, 1, 0, -3, 1, 0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_halves_round_to_nearest_even(capability: str, dtype: torch.dtype) -> None:
    """The gradient is rounded once from fp32, as torch rounds: ties, subnormals, overflow."""
    rows, vocab = 300, 64
    logits = torch.zeros(1, rows, vocab, dtype=dtype)
    logits[..., 1] = -math.inf
    # Every p_j is 1/63, so the gradient is -grad/63 in every finite column: sweep the magnitudes of the dtype.
    grads = torch.logspace(-9, 6.9, rows) * 63
    target, temperature = torch.full((rows,), 1), torch.ones(1)
    state = forward(native, logits, target, temperature)[1]
    gradient = backward(native, grads[None], logits, target, temperature, state, want=LOGPROB)
    exact = -grads.double() / 63
    lower, upper = exact * (1 - 2e-7), exact * (1 + 2e-7)
    got = gradient[0, :, 2].double()
    low = torch.minimum(lower.to(dtype).double(), upper.to(dtype).double())
    high = torch.maximum(lower.to(dtype).double(), upper.to(dtype).double())
    assert ((low <= got) & (got <= high)).all()
    assert torch.equal(gradient[0, :, 1], grads.to(dtype))  # the label's own term, with p = 0


def test_ignored_and_unused_rows_are_not_read(capability: str) -> None:
    """Neither row is visited: NaN in it stays there, and its gradient is 0."""
    logits, target, temperature = problem(1, 300, 500, torch.float32)
    logits[0, 1] = math.nan  # ignored
    logits[0, 2] = math.nan  # no gradient comes in
    grads = upstream(300, torch.float32)
    grads[:, 2] = 0
    outputs, state = forward(native, logits, target, temperature)
    assert all(output[1] == 0 and output[2].isnan() for output in outputs)
    assert state[:, 1].tolist() == [0, 1, 0, 0, 1, 0]
    gradient = backward(native, grads, logits, target, temperature, state)
    assert (gradient[0, 1:3] == 0).all() and gradient.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("edges", [(0, 9, 9001), (0, 4000, 4001, 9001), (0, 0, 9001)])
def test_shards_merge_to_the_whole(capability: str, dtype: torch.dtype, edges: tuple[int, ...]) -> None:
    """States of column shards (also empty ones) merge to the state of the row, and give the gradient of their part."""
    logits, target, temperature = problem(2, 3, 9001, dtype)
    grads = upstream(6, temperature.dtype)
    whole = forward(native, logits, target, temperature)
    eps = torch.finfo(temperature.dtype).eps
    spans = list(itertools.pairwise(edges))
    states = [forward(native, logits[..., a:b], target, temperature, start=a, size=9001)[1] for a, b in spans]
    merged = softmax_state.merge(torch.stack(states), temperature)
    ignored = target == -100
    merged[:, ignored] = whole[1][:, ignored]
    torch.testing.assert_close(merged, whole[1], rtol=16 * eps, atol=16 * eps)
    parts = [
        backward(native, grads, logits[..., a:b], target, temperature, merged, start=a, size=9001) for a, b in spans
    ]
    gradient = backward(native, grads, logits, target, temperature, merged)
    assert torch.equal(torch.cat(parts, -1), gradient)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_padded_columns(capability: str, dtype: torch.dtype) -> None:
    """Columns at or beyond vocab_size are neither read nor given a gradient; a shard may consist of them alone."""
    logits, target, temperature = problem(2, 3, 100, dtype)
    target %= 70
    padded = logits.clone()
    padded[..., 70:] = math.nan
    expected = forward(native, logits[..., :70].contiguous(), target, temperature)
    out = forward(native, padded, target, temperature, size=70)
    assert all(equal(a, b) for a, b in zip(out, expected, strict=True))
    gradient = backward(native, upstream(6, temperature.dtype), padded, target, temperature, out[1], size=70)
    assert gradient.isfinite().all() and (gradient[..., 70:] == 0).all() and (gradient[0, 0, :70] != 0).any()
    beyond = forward(native, padded, target, temperature, start=200, size=150)[1]
    assert (beyond[0] == -math.inf).all() and (beyond[1] == 0).all()


def test_unwanted_outputs_are_left_out(capability: str) -> None:
    logits, target, temperature = problem(2, 3, 50, torch.float32)
    full, _ = forward(native, logits, target, temperature)
    for want in range(ALL + 1):
        outputs, state = forward(native, logits, target, temperature, want=want)
        assert state.shape == (6 if want & SECOND_ORDER else 4, 6)
        assert equal(outputs, full[[i for i in range(len(STATISTICS)) if want >> i & 1]])


@pytest.mark.parametrize("shape", [(0, 3, 5), (2, 0, 5), (2, 3, 0)])
def test_empty(capability: str, shape: tuple[int, int, int]) -> None:
    rows = shape[0] * shape[1]
    logits, target, temperature = torch.empty(shape), torch.zeros(rows, dtype=torch.int32), torch.ones(1)
    outputs, state = forward(native, logits, target, temperature)
    assert all(output.shape == (rows,) and output.isnan().all() for output in outputs)
    assert backward(native, upstream(rows, torch.float32), logits, target, temperature, state).shape == shape


def test_expanded_gradients_and_int32_targets(capability: str) -> None:
    logits, target, temperature = problem(2, 3, 500, torch.float32)
    state = forward(native, logits, target, temperature)[1]
    one = torch.tensor(0.3)
    plain = backward(native, one.expand(1, 6).clone(), logits, target, temperature, state, want=LOGPROB)
    expanded = backward(native, one.expand(1, 6), logits, target.int(), temperature, state[:4], want=LOGPROB)
    assert torch.equal(plain, expanded)
    both = one.expand(2, 6)
    transposed = torch.full((6, 2), 0.3).t()
    a, b = (backward(native, grads, logits, target, temperature, state, want=3) for grads in (both, transposed))
    assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_gradient_of_zero_is_none(capability: str, dtype: torch.dtype) -> None:
    """Whatever its statistic holds: the sums of second order are NaN here, and a row without a gradient is not read."""
    logits, target, temperature = problem(2, 3, 500, dtype)
    state = forward(native, logits, target, temperature)[1]
    state[4:] = math.nan
    grads = upstream(6, temperature.dtype)
    grads[NAMES.index("collision")] = 0
    want = bits("logprob", "entropy")
    expected = backward(native, grads[:2], logits, target, temperature, state[:4], want=want)
    assert torch.equal(backward(native, grads, logits, target, temperature, state), expected)
    assert (
        backward(native, grads[:0], torch.full_like(logits, math.nan), target, temperature, state, want=0) == 0
    ).all()


def test_python_and_cpp_know_the_same_statistics() -> None:
    assert _C.statistics() == [(s.name, s.second_order, s.differentiable) for s in STATISTICS]


def test_capability_is_chosen_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = problem(1, 2, 20, torch.float32)
    for name in AVAILABLE:
        monkeypatch.setenv(VARIABLE, name)
        assert native.cpu_capability() == (name, AVAILABLE)
    monkeypatch.delenv(VARIABLE)
    assert native.cpu_capability().selected == AVAILABLE[-1]
    monkeypatch.setenv(VARIABLE, "mmx")
    for call in (native.cpu_capability, lambda: forward(native, *arguments)):
        with pytest.raises(RuntimeError, match=rf"{VARIABLE}: expected one of default.*got mmx"):
            call()


@pytest.mark.skipif(shutil.which("objdump") is None, reason="objdump (binutils) is not installed")
@pytest.mark.skipif(platform.machine() != "x86_64", reason="registers of x86-64")
def test_wide_registers_stay_in_their_namespace() -> None:
    """An inline function compiled for AVX and shared by the linker would crash the portable path on an older CPU."""
    library = Path(native.__file__).parent.parent / "_ops.so"
    command = ["objdump", "--disassemble", "--demangle", "--no-show-raw-insn", str(library)]
    function, found = "", {"%ymm": set(), "%zmm": set()}
    for line in subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines():
        if line.endswith(">:"):
            function = line
        for register, functions in found.items():
            if register in line:
                functions.add(function)
    assert found["%ymm"] and found["%zmm"]
    assert [f for f in found["%ymm"] if "cpu::avx2::" not in f and "cpu::avx512::" not in f] == []
    assert [f for f in found["%zmm"] if "cpu::avx512::" not in f] == []


def test_errors_name_argument_expected_and_got() -> None:
    logits, target, temperature = problem(2, 3, 20, torch.float32)
    state = forward(native, logits, target, temperature)[1]
    grads = upstream(6, torch.float32)
    wrong_forward = [
        (r"logits: expected shape \(B, L, V\), got \(6, 20\)", (logits.flatten(0, 1), target, temperature)),
        (r"logits: expected dtype .*, got Int", (logits.int(), target, temperature)),
        (r"target: expected dtype Int or Long, got Float", (logits, target.float(), temperature)),
        (r"target: .* 6 elements .* got shape \(5\)", (logits, target[:5], temperature)),
        (r"temperature: .* 1 or 6 elements, got shape \(2\)", (logits, target, temperature[:2])),
        (r"temperature: .* dtype Float .*, got Double", (logits, target, temperature.double())),
    ]
    for message, arguments in wrong_forward:
        with pytest.raises(RuntimeError, match=message):
            forward(native, *arguments)
    wrong_backward = [
        (r"grad_stats: .* dtype Float .*, got Double", grads.double(), state),
        (rf"grad_stats: expected shape \({len(STATISTICS)}, 6\), got \({len(STATISTICS)}, 4\)", grads[:, :4], state),
        (rf"grad_stats: expected shape \({len(STATISTICS)}, 6\), got \(3, 6\)", grads[:3], state),
        (r"state: expected at least 6 rows of 6 elements, got shape \(4, 6\)", grads, state[:4]),
    ]
    for message, upstream_grads, given in wrong_backward:
        with pytest.raises(RuntimeError, match=message):
            backward(native, upstream_grads, logits, target, temperature, given)
    with pytest.raises(RuntimeError, match=rf"want: .* got {ALL + 1}"):
        forward(native, logits, target, temperature, want=ALL + 1)


# csrc/common/softmax_state.h, which device code will share, against its torch counterpart.


def random_states(parts: int) -> Tensor:
    """(R, 6, 1) states of random row parts, some without a finite entry."""
    logits, _, _ = problem(1, 1, 40 * parts, torch.float64, seed=parts)
    states = []
    for i, part in enumerate(logits.split(40, -1)):
        part = part if i % 3 else torch.full_like(part, -math.inf)
        states.append(forward(native, part, torch.tensor([3]), torch.ones(1, dtype=torch.float64))[1])
    return torch.stack(states)


@pytest.mark.parametrize("precision", ["", "_float"])
@pytest.mark.parametrize("parts", [1, 2, 3, 7])
def test_merge_and_finalize_primitives(parts: int, precision: str) -> None:
    states = random_states(parts)
    temperature = torch.tensor([0.8], dtype=torch.float64)
    expected = softmax_state.merge(states, temperature)
    merge = getattr(_C, "merge" + precision)
    merged = (-math.inf, 0.0, 0.0, -math.inf, 0.0, 0.0)  # the identity
    for state in states[:, :, 0].tolist():
        merged = merge(merged, state, 0.8)
    tolerance = {"rtol": 1e-12, "atol": 0.0} if not precision else {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(torch.tensor(merged, dtype=torch.float64), expected[:, 0], **tolerance)
    if parts > 1:
        nothing = torch.zeros(1, dtype=torch.bool)
        stats = softmax_state.finalize(expected, temperature, ALL, nothing, nothing)
        ours = getattr(_C, "finalize" + precision)(merged, 0.8)
        torch.testing.assert_close(torch.tensor(ours, dtype=torch.float64), stats[:, 0], **tolerance)


def test_merge_keeps_nan_and_never_makes_one() -> None:
    poisoned = (-math.inf, math.nan, 0.0, -math.inf, 0.0, 0.0)
    plain = (2.0, 1.5, 0.3, 2.0, 1.2, 0.2)
    far = (-3e38, 1.0, 0.0, -math.inf, 1.0, 0.0)
    for a, b in ((poisoned, plain), (plain, poisoned)):
        assert math.isnan(_C.merge(a, b, 1.0)[1]) and math.isnan(_C.merge_float(a, b, 1.0)[1])
    # the distance overflows fp32 when it is divided by this temperature
    assert _C.merge_float(plain, far, 1e-3) == pytest.approx(plain, rel=1e-6)


@pytest.mark.parametrize("precision", ["", "_float"])
def test_gradient_coefficients_primitive(precision: str) -> None:
    """e_j (constant + linear x_j + quadratic e_j) is the softmax part of the gradient, written as the math does."""
    x = torch.randn(30, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x -= x.max()
    temperature, (a, b, c) = 0.7, (0.3, -1.1, 0.6)
    e = x.exp()
    state = (2.0, e.sum(), -(x * e).sum(), 2.0, (e * e).sum(), -(x * e * e).sum())
    constant, linear, quadratic = getattr(_C, "gradient_coefficients" + precision)(
        [float(v) for v in state], temperature, {"logprob": a, "entropy": b, "collision": c}
    )
    p = e / e.sum()
    entropy = -(p * p.log()).sum()
    expected = (-a * p - b * p * (p.log() + entropy) + 2 * c * p * (p - (p * p).sum())) / temperature
    tolerance = {"rtol": 1e-12, "atol": 1e-15} if not precision else {"rtol": 1e-4, "atol": 1e-7}
    torch.testing.assert_close(e * (constant + linear * x + quadratic * e), expected, **tolerance)

"""Values of logprob_entropy and token_stats: vocabularies, accuracy, sizes beyond 2³¹, random shapes and strides."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import entropy_kernels as ek
from calls import bound, check, moved, run, same_bits, upstream
from conftest import BackendDevice
from sample import HALF, Sample, labels, normal, plain

# The vocabularies of Llama 2, Llama 3, DeepSeek-like, Qwen, Gemma 2 and Gemma 3. A few rows each: what
# depends on V is the walk over a row. 257 and 8191 are one more and one less than a power of two.
VOCABULARIES = (1, 2, 97, 257, 8191, 32_000, 128_256, 129_920, 151_936, 256_000, 262_144)


@pytest.mark.parametrize("vocab", VOCABULARIES)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32), ids=str)
def test_vocabularies(vocab: int, dtype: torch.dtype, on: BackendDevice) -> None:
    large = vocab > 10_000
    if on.interpreted and large and dtype != torch.float32:
        pytest.skip("seconds a row in the interpreter: large vocabularies once")
    sample = plain(dtype, on.device, rows=1 if on.interpreted and large else 2, vocab=vocab, temperature=0.9)
    sample.target[0] = vocab - 1
    check(sample, on, "logprob", "entropy", "collision")


@pytest.mark.parametrize("shift", (0.0, 1000.0, -1000.0))
@pytest.mark.parametrize("temperature", (1.0, 0.7))
def test_entropy_is_accurate_to_1e_5_nats(shift: float, temperature: float, on: BackendDevice) -> None:
    """The shifted form (docs/math.md) is off by 1e-6 at V = 151 936, the plain one by 1e-3, 0.056 with the offset."""
    if on.interpreted and (shift, temperature) != (1000.0, 0.7):
        pytest.skip("seconds a row in the interpreter: the hardest of the combinations")
    sample = plain(torch.float32, on.device, rows=3, vocab=151_936, temperature=temperature)
    sample.logits[1] *= 0.1  # nearly uniform
    sample.logits[2] *= 3  # collapsed
    sample.logits += shift
    outputs, _ = run(sample, on)
    exact = bound(sample).exact
    torch.testing.assert_close(outputs["entropy"].double(), exact.entropy, rtol=0, atol=1e-5)
    torch.testing.assert_close(outputs["logprob"].double(), exact.logprob, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("gap", (5, 10, 15, 20, 40, 80))
def test_small_entropies_keep_their_digits(gap: int, on: BackendDevice) -> None:
    """H falls towards 0 over a training; w/s holds its digits when log s has none left (s = 1 in fp32)."""
    logits = torch.zeros(1, 97, device=on.device)
    logits[0, 3] = gap
    outputs, _ = run(Sample(logits, torch.tensor([3], device=on.device)), on)
    q = math.exp(-gap) / (1 + 96 * math.exp(-gap))
    exact = math.log1p(96 * math.exp(-gap)) + 96 * gap * q
    # log1p(Σ others) would keep all of them; s is a sum at 1, off by up to 8 half ulps
    assert outputs["entropy"].item() == pytest.approx(exact, rel=1e-6, abs=1e-6)
    # on a GPU the largest logit's own term of Σ p·ln p is the rounding of a product, which hides what is below 1e-12
    if on.device == "cpu" or exact > 1e-12:
        assert outputs["entropy"].item() > 0
    else:
        assert outputs["entropy"].item() >= 0


@pytest.mark.parametrize("vocab", (2, 3, 97, 1500, 32_000))
def test_uniform_rows(vocab: int, on: BackendDevice) -> None:
    sample = Sample(torch.full((2, vocab), 3.25, device=on.device), torch.zeros(2, dtype=torch.long))
    sample.target = sample.target.to(on.device)
    outputs, _ = run(sample, on)
    assert outputs["entropy"].tolist() == pytest.approx([math.log(vocab)] * 2, rel=1e-6)
    assert outputs["logprob"].tolist() == pytest.approx([-math.log(vocab)] * 2, rel=1e-6)
    assert outputs["collision"].tolist() == pytest.approx([1 / vocab] * 2, rel=1e-6)
    assert outputs["vocab_covariance"].tolist() == pytest.approx([0, 0], abs=1e-6 / vocab)


def test_results_are_what_the_names_say(on: BackendDevice) -> None:
    sample = plain(torch.bfloat16, on.device)
    two = ek.logprob_entropy(sample.logits, sample.target, backend=on.backend)
    four = ek.token_stats(sample.logits, sample.target, backend=on.backend)
    assert type(two).__name__ == "LogprobEntropy" and two._fields == ("logprob", "entropy")
    assert type(four).__name__ == "TokenStats"
    assert four._fields == ("logprob", "entropy", "collision", "vocab_covariance")
    for output in (*two, *four):
        assert output.dtype == torch.float32 and output.device == sample.logits.device and output.is_contiguous()
        assert not output.requires_grad


def test_double_logits_give_double_results(on: BackendDevice) -> None:
    if torch.float64 not in on.dtypes:
        pytest.skip("fp64 is promised on the CPU")
    outputs, _ = run(plain(torch.float64, on.device), on)
    assert all(value.dtype == torch.float64 for value in outputs.values())


def test_a_row_does_not_depend_on_its_neighbours(on: BackendDevice) -> None:
    """Bitwise the same alone and in any batch; test_row_bits.py has more of it."""
    sample = plain(torch.bfloat16, on.device, rows=7, vocab=1500, temperature=0.9)
    grads = upstream(sample, "logprob", "entropy", "collision")
    together, dlogits = run(sample, on, grads=grads)
    assert dlogits is not None
    for i in range(7):
        part = Sample(sample.logits[i : i + 1], sample.target[i : i + 1], sample.kwargs)
        alone, gradient = run(part, on, grads={k: v[i : i + 1] for k, v in grads.items()})
        assert gradient is not None and same_bits(gradient, dlogits[i : i + 1])
        for name, value in alone.items():
            assert same_bits(value, together[name][i : i + 1]), name


def test_two_runs_are_bitwise_equal(on: BackendDevice) -> None:
    sample = plain(torch.float32, on.device, rows=6, vocab=9001)
    grads = upstream(sample, "logprob", "entropy", "collision")
    (a, da), (b, db) = (run(sample, on, grads=grads) for _ in range(2))
    assert da is not None and db is not None and same_bits(da, db)
    assert all(same_bits(a[name], b[name]) for name in a)


def test_results_do_not_depend_on_the_number_of_threads(on: BackendDevice) -> None:
    if on.device != "cpu" or on.interpreted:
        pytest.skip("threads are a matter of the CPU kernels")
    sample = plain(torch.float32, on.device, rows=9, vocab=40_000)
    grads = upstream(sample, "logprob", "entropy", "collision")
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(run(sample, on, grads=grads))
    finally:
        torch.set_num_threads(threads)
    (first, gradient), *others = results
    for values, other in others:
        assert other is not None and gradient is not None and same_bits(other, gradient)
        assert all(same_bits(values[name], first[name]) for name in first)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_backends_agree(device: str) -> None:
    """Against each other, not the reference: one backend may serve the rollout and another the update."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    here = [name for name, state in ek.backends()["token_stats"].items() if state == "available"]
    interpreted = [] if torch.cuda.is_available() else ["triton"]
    wanted = ["torch", "cpu", *interpreted] if device == "cpu" else ["torch", "triton", "cuda"]
    backend_devices = [BackendDevice(name, device) for name in here if name in wanted]
    sample = plain(torch.float32, device, rows=4, vocab=1500, temperature=0.8, softcap=20.0)
    results = [run(sample, on, grads=upstream(sample, "logprob", "entropy", "collision")) for on in backend_devices]
    for values, gradient in results[1:]:
        torch.testing.assert_close(gradient, results[0][1], rtol=1e-4, atol=1e-8)
        for name, value in values.items():
            torch.testing.assert_close(value, results[0][0][name], rtol=3e-6, atol=3e-6)


# ---- rows · V > 2³¹ -------------------------------------------------------------------------------------------------


def zeros(elements: int, on: BackendDevice, reserve: Callable[[float], None]) -> torch.Tensor:
    """fp16. On the CPU zero pages, which cost no memory."""
    if on.device == "cpu":
        return torch.from_numpy(np.zeros(elements, dtype=np.float16))
    reserve(elements * 2e-9 + 1)
    return torch.zeros(elements, dtype=torch.float16, device=on.device)


def test_offsets_beyond_2_31_elements(on: BackendDevice, large_memory: Callable[[float], None]) -> None:
    """Rows that lie 2³⁰ + 1 elements apart: the last one starts beyond 2³¹."""
    stride, vocab = 2**30 + 1, 97
    storage = zeros(3 * stride, on, large_memory)
    far = storage.as_strided((3, vocab), (stride, 1), 0)
    values = normal(3, vocab, dtype=torch.float16, device=on.device)
    far.copy_(values)
    target = labels(3, vocab=vocab, device=on.device)
    grads = upstream(Sample(values, target), "logprob", "entropy", "collision")
    near, gradient = run(Sample(values, target), on, grads=grads)
    references = bound(Sample(values, target))
    for shape in ((3, vocab), (3, 1, vocab), (1, 3, vocab)):
        strides = {(3, vocab): (stride, 1), (3, 1, vocab): (stride, 7, 1), (1, 3, vocab): (5, stride, 1)}[shape]
        logits = storage.as_strided(shape, strides, 0)
        reshaped = {name: g.view(shape[:-1]) for name, g in grads.items()}
        outputs, dlogits = run(Sample(logits, target.view(shape[:-1])), on, grads=reshaped)
        assert dlogits is not None and gradient is not None
        if on.device != "cpu":  # rows at odd addresses are cut in another way: equal to rounding
            references.check_values(**{name: value.view(3) for name, value in outputs.items()})
            references.check_gradient(dlogits, **grads)
            continue
        assert same_bits(dlogits.view(3, vocab), gradient)
        for name, value in outputs.items():
            assert same_bits(value.view(3), near[name]), name


def test_columns_beyond_2_31_elements(on: BackendDevice, large_memory: Callable[[float], None]) -> None:
    """The same along the vocabulary: the column stride times the column index passes 2³¹."""
    stride, vocab = 2**26 + 3, 40
    storage = zeros(vocab * stride, on, large_memory)
    far = storage.as_strided((2, vocab), (1, stride), 0)
    far.copy_(normal(2, vocab, dtype=torch.float16, device=on.device))
    target = torch.tensor([39, 38], device=on.device)
    check(Sample(far, target), on, "logprob", "entropy", "collision")


@pytest.mark.slow
def test_more_than_2_31_logits(on: BackendDevice) -> None:
    """N·V > 2³¹ elements in the shape, from one row expanded (stride 0); all but a few are ignored, so not read."""
    if on.interpreted:
        pytest.skip("8197 programs in the interpreter; offsets beyond 2³¹ are tested above")
    vocab = 262_144
    rows = 2**31 // vocab + 5
    row = normal(1, vocab, dtype=torch.bfloat16, device=on.device)
    target = torch.full((rows,), -100, device=on.device)
    valid = torch.tensor([0, 4095, rows - 6, rows - 2, rows - 1], device=on.device)
    target[valid] = torch.tensor([0, 5, vocab - 1, 77, 100_000], device=on.device)
    outputs = ek.token_stats(row.expand(rows, vocab), target, backend=on.backend)
    bound(Sample(row.expand(5, vocab), target[valid])).check_values(
        **{name: value[valid] for name, value in outputs._asdict().items()}
    )
    for value in outputs:
        assert int((value != 0).sum()) <= 5


# ---- random shapes, strides and values ------------------------------------------------------------------------------

_settings = settings(
    max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None
)


@st.composite
def samples(draw: st.DrawFn) -> Sample:
    """Any shape of 1 to 4 dimensions, any slice or permutation of a larger buffer, any mixture of special values."""
    dims = draw(st.lists(st.integers(0, 4), min_size=0, max_size=3))
    vocab = draw(st.sampled_from([1, 2, 3, 5, 8, 16, 17, 31, 33, 64, 100, 129]))
    dtype = draw(st.sampled_from([*HALF, torch.float32, torch.float64]))
    steps = [draw(st.sampled_from([1, 1, 2, 3])) for _ in range(len(dims) + 1)]
    starts = [draw(st.integers(0, 2)) for _ in steps]
    sizes = [
        (n * step + start + draw(st.integers(0, 2)))
        for n, step, start in zip([*dims, vocab], steps, starts, strict=True)
    ]
    order = draw(st.permutations(range(len(sizes))))
    buffer = normal(*[sizes[i] for i in order], dtype=dtype, device="cpu", seed=draw(st.integers(0, 9)))
    buffer *= draw(st.sampled_from([0.01, 1.0, 10.0]))
    view = buffer.permute([order.index(i) for i in range(len(order))])
    for axis, (n, step, start) in enumerate(zip([*dims, vocab], steps, starts, strict=True)):
        view = view[(slice(None),) * axis + (slice(start, start + n * step, step),)]
    assert view.shape == (*dims, vocab)
    special = draw(st.sampled_from([None, None, -torch.inf, torch.inf, torch.nan, 1000.0, -1000.0, 0.0]))
    if special is not None and view.numel():
        chance = draw(st.sampled_from([0.02, 0.5]))
        view.masked_fill_(torch.rand(view.shape, generator=torch.Generator().manual_seed(5)) < chance, special)
    target = labels(*dims, vocab=vocab, device="cpu", dtype=draw(st.sampled_from([torch.int32, torch.int64])))
    if draw(st.booleans()):
        target.masked_fill_(torch.rand(target.shape, generator=torch.Generator().manual_seed(6)) < 0.3, -100)
    kwargs: dict = {"temperature": draw(st.sampled_from([1.0, 0.1, 0.37, 1.5, 20.0]))}
    if dims and draw(st.booleans()):
        kwargs["temperature"] = torch.rand(dims[-1:], generator=torch.Generator().manual_seed(7)) + 0.3
    if draw(st.booleans()) and special not in (torch.inf, -torch.inf):
        kwargs["softcap"] = draw(st.sampled_from([1.0, 30.0]))
    if draw(st.booleans()):
        kwargs["vocab_size"] = draw(st.integers(1, vocab))
        target.clamp_(max=kwargs["vocab_size"] - 1)
    return Sample(view, target, kwargs)


_names = st.sets(st.sampled_from(["logprob", "entropy", "collision"]))


@_settings
@given(sample=samples(), names=_names)
def test_random_samples(on: BackendDevice, sample: Sample, names: set[str]) -> None:
    if on.interpreted:
        pytest.skip("fewer of them in the interpreter, below")
    check_random(on, sample, names)


@settings(_settings, max_examples=8)
@given(sample=samples(), names=_names)
def test_random_samples_interpreted(on: BackendDevice, sample: Sample, names: set[str]) -> None:
    if not on.interpreted:
        pytest.skip("more of them, above")
    if sample.target.numel() <= 6:
        check_random(on, sample, names)


def check_random(on: BackendDevice, sample: Sample, names: set[str]) -> None:
    if on.device != "cpu":
        kwargs = {k: moved(v, on.device) if isinstance(v, torch.Tensor) else v for k, v in sample.kwargs.items()}
        sample = Sample(moved(sample.logits, on.device), moved(sample.target, on.device), kwargs)
    if sample.logits.dtype not in on.dtypes:
        sample = Sample(sample.logits.float(), sample.target, sample.kwargs)
    check(sample, on, *sorted(names))


@_settings
@given(seed=st.integers(0, 10_000), vocab=st.integers(1, 300), scale=st.sampled_from([1e-3, 0.1, 1.0, 10.0, 100.0]))
def test_invariants(on: BackendDevice, seed: int, vocab: int, scale: float) -> None:
    """For every distribution: 0 <= H <= log V, e^-H <= S2 <= 1, logprob <= 0, gradients sum to 0 over a row."""
    if on.interpreted and seed % 8:
        return
    logits = normal(3, vocab, dtype=torch.float32, device=on.device, scale=scale, seed=seed)
    sample = Sample(logits, labels(3, vocab=vocab, device=on.device, seed=seed))
    grads = upstream(sample, "logprob", "entropy", "collision")
    outputs, dlogits = run(sample, on, grads=grads)
    entropy, collision = outputs["entropy"], outputs["collision"]
    assert dlogits is not None
    assert (entropy >= 0).all() and (entropy <= math.log(vocab) + 1e-5).all()
    assert (outputs["logprob"] <= 0).all()
    assert (collision <= 1 + 1e-6).all() and (collision >= 1 / vocab - 1e-6).all()
    assert (-torch.log(collision) <= entropy + 1e-5).all()  # Rényi-2 is at most Shannon
    torch.testing.assert_close(dlogits.sum(-1), torch.zeros(3, device=on.device), rtol=0, atol=1e-4)

"""A row gives the same bits, whatever the number of rows, its place among them, threads and layout (docs/math.md §2).

So the log-probs of a rollout and of a micro-batch are equal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

import entropy_kernels as ek
from calls import same_bits
from entropy_kernels.backends import native
from entropy_kernels.backends.eager import softmax_state
from sample import labels, normal

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# torch's kernels are those of torch, whatever its capability
KERNELS = [("torch", ""), ("cpu", "avx512"), ("cpu", "avx2"), ("cpu", "default")]


@pytest.fixture(params=KERNELS, ids=lambda p: "-".join(filter(None, p)))
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Backends of the CPU, the C++ kernels once per instruction set."""
    name, capability = request.param
    if (reason := ek.backends()["token_stats"][name]) != "available":
        pytest.skip(reason)
    if capability:
        if capability not in native.cpu_capability().available:
            pytest.skip(f"this CPU has no {capability}")
        monkeypatch.setenv("ENTROPY_KERNELS_CPU_CAPABILITY", capability)
    return name


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def results(backend: str, logits: Tensor, target: Tensor, grads: Tensor, **kwargs) -> dict[str, Tensor]:
    """Statistics, and the gradient of the logits for the upstream gradients (3, N) of the differentiable ones."""
    leaf = logits.detach().requires_grad_()
    stats = ek.token_stats(leaf, target, backend=backend, **kwargs)
    upstream = [g.view(target.shape).to(stats.logprob.dtype) for g in grads]
    (gradient,) = torch.autograd.grad(stats[:3], leaf, upstream)
    return {**{k: v.detach() for k, v in stats._asdict().items()}, "gradient": gradient}


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    for name, value in ours.items():
        assert same_bits(value, theirs[name].reshape(value.shape)), name


def batch(rows: int, vocab: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, targets, some of them ignored, and upstream gradients."""
    logits = normal(min(rows, 97), vocab, dtype=dtype, device="cpu").repeat(-(-rows // 97), 1)[:rows]
    target = labels(rows, vocab=vocab, device="cpu")
    target[3::11] = -100
    return logits, target, normal(3, rows, dtype=torch.float32, device="cpu", scale=1)


# 16384 columns are a part of a row, and from 256 rows on a thread has whole rows. The width is odd, so that every row
# is aligned differently, and its gradient from 262 rows of fp32 on too large for the caches.
@pytest.mark.parametrize(
    ("dtype", "softcap"), [*((dtype, None) for dtype in DTYPES), *((dtype, 20.0) for dtype in DTYPES[:2])], ids=str
)
def test_number_of_rows_and_place(backend: str, dtype: torch.dtype, softcap: float | None) -> None:
    rows, vocab = (300, 16_389) if backend == "cpu" else (260, 8_195)
    logits, target, grads = batch(rows, vocab, dtype)
    options = {"softcap": softcap, "temperature": 0.8}
    whole = results(backend, logits, target, grads, **options)
    for part in (slice(0, 1), slice(rows - 1, rows), slice(1, 3), slice(20, 57), slice(2, 257)):
        alone = results(backend, logits[part], target[part], grads[:, part], **options)
        assert_same(alone, {name: value[part] for name, value in whole.items()})


@pytest.mark.parametrize(
    "vocab, dtype", [(1, torch.float32), (7, torch.float32), (97, torch.bfloat16), (1031, torch.float32)]
)
def test_up_to_2000_rows(backend: str, vocab: int, dtype: torch.dtype, threads: Callable[[int], None]) -> None:
    logits, target, grads = batch(2000, vocab, dtype)
    threads(2)
    whole = results(backend, logits, target, grads)
    threads(1)
    begin = 0
    for size in (1, 2, 3, 5, 8, 16, 31, 64, 127, 255, 256, 257, 500):
        part = slice(begin, begin + size)
        begin += size
        alone = results(backend, logits[part], target[part], grads[:, part])
        assert_same(alone, {name: value[part] for name, value in whole.items()})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layout_and_threads(backend: str, dtype: torch.dtype, threads: Callable[[int], None]) -> None:
    """Shapes, strides and alignments of the same rows, and a temperature as a number or per token."""
    rows, vocab = 6, 9_011
    logits, target, grads = batch(rows, vocab, dtype)
    threads(1)
    expected = results(backend, logits, target, grads, temperature=1.5)
    wide = torch.full((rows, vocab + 9), 99.0, dtype=dtype)
    wide[:, 3 : vocab + 3] = logits
    # (rows, vocab) of each, whatever its shape
    layouts = {
        "same": logits,
        "misaligned": wide[:, 3 : vocab + 3],
        "transposed": logits.t().contiguous().t(),
        "every second column": torch.stack([logits, logits], -1).flatten(-2)[:, ::2],
        "every second row": torch.stack([logits, logits], 1).flatten(0, 1)[::2],
        "(B, L, V)": logits.view(2, 3, vocab),
        "(L, B, V) transposed": logits.view(2, 3, vocab).transpose(0, 1).contiguous().transpose(0, 1),
        "(N, 1, V)": logits[:, None],
    }
    for name, layout in layouts.items():
        labels_, temperature = target.view(layout.shape[:-1]), torch.full(layout.shape[:-1], 1.5)
        given = temperature.double() if dtype == torch.float64 else temperature
        threads(2 if name in ("same", "(B, L, V)") else 1)
        ours = results(backend, layout, labels_, grads, temperature=given)
        for key, value in ours.items():
            assert same_bits(value.reshape(expected[key].shape), expected[key]), (name, key)
    alone = results(backend, logits[2], target[2], grads[:, 2:3], temperature=1.5)  # (V,)
    assert_same(alone, {key: value[2] for key, value in expected.items()})


def test_threads_do_not_share_a_single_row(backend: str, threads: Callable[[int], None]) -> None:
    """As torch does from 32768 terms on."""
    logits, target, grads = batch(8, 70_001, torch.float32)
    threads(2)
    whole = results(backend, logits, target, grads)
    for i in range(8):
        part = slice(i, i + 1)
        for count in (1, 2):
            threads(count)
            alone = results(backend, logits[part], target[part], grads[:, part])
            assert_same(alone, {name: value[part] for name, value in whole.items()})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_else_is_asked_for_changes_nothing(backend: str, dtype: torch.dtype) -> None:
    logits, target, _ = batch(5, 9001, dtype)
    all_of_them = ek.token_stats(logits, target, backend=backend)
    two = ek.logprob_entropy(logits, target, backend=backend)
    assert same_bits(two.logprob, all_of_them.logprob) and same_bits(two.entropy, all_of_them.entropy)


def hard_rows(dtype: torch.dtype, vocab: int) -> dict[str, Tensor]:
    normal_row = normal(vocab, dtype=torch.float32, device="cpu", scale=1)
    peaked = normal_row.clone()
    peaked[vocab // 3] = 16
    rows = {"flat": 0.01 * normal_row, "normal": 3 * normal_row, "offset": normal_row + 1000, "peaked": peaked}
    for gap in (5.1, 8.3, 11.25, 12.3, 14.0):  # roundings that are all the same
        rows[f"equal but one, {gap} above"] = torch.zeros(vocab).index_fill_(0, torch.tensor([7]), gap)
    return {name: row.to(dtype) for name, row in rows.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_entropy_of_a_large_vocabulary_to_1e_6_nats(backend: str, dtype: torch.dtype) -> None:
    if (reason := ek.backends()["token_stats"][backend]) != "available":
        pytest.skip(reason)
    vocab = 262_144
    for name, row in hard_rows(dtype, vocab).items():
        logp = torch.log_softmax(row.double(), -1)
        exact = -(logp.exp() * logp).sum()
        # torch multiplies e and d in fp32: one more rounding that is the same for all
        most = 1.5e-6 if backend == "torch" and name.startswith("equal") else 1e-6
        for rows in (1, 20, 260) if backend == "cpu" else (1, 2):
            entropy = ek.logprob_entropy(row.expand(rows, vocab), torch.zeros(rows, dtype=torch.long), backend=backend)[
                1
            ]
            assert (entropy == entropy[0]).all(), name
            error = (entropy[0].double() - exact).abs().item()
            assert error <= most, f"{name}, {rows} rows: entropy off by {error:.1e}"


def test_states_of_ranks_merge_alike_for_any_number_of_rows() -> None:
    for parts in (2, 5, 9, 33):
        states = torch.rand(parts, 6, 40)
        whole = softmax_state.merge(states, torch.ones(1))
        for part in (slice(0, 1), slice(39, 40), slice(3, 14)):
            assert same_bits(softmax_state.merge(states[:, :, part], torch.ones(1)), whole[:, part])


def test_kl_cov_is_inert_on_policy(backend: str) -> None:
    """The rollout's log-probs come from one call, the update's from micro-batches: no penalty and no gradient of it."""
    rows, vocab, micro = 280, 30_011, 40
    logits = batch(rows, vocab, torch.bfloat16)[0]
    target = labels(rows, vocab=vocab, device="cpu")
    advantages, ones = normal(micro, dtype=torch.float32, device="cpu"), torch.ones(micro)
    old_logprob = ek.logprob_entropy(logits, target, backend=backend).logprob
    for begin in range(0, rows, micro):
        part = slice(begin, begin + micro)
        leaf = logits[part].detach().requires_grad_()
        logprob = ek.logprob_entropy(leaf, target[part], backend=backend).logprob
        assert torch.equal(logprob, old_logprob[part])
    everywhere = torch.ones(micro, dtype=torch.bool)
    for preset in ("paper", "verl"):
        given = (logprob, old_logprob[part], advantages, ones)
        penalized = ek.kl_cov_loss(*given, preset=preset, penalized=everywhere).loss
        free = ek.kl_cov_loss(*given, preset=preset, penalized=~everywhere).loss
        gradients = [torch.autograd.grad(loss, leaf, retain_graph=True)[0] for loss in (penalized, free)]
        assert torch.equal(penalized, free) and same_bits(*gradients)

"""The torch backend's GPU half, run on CPU tensors: what it costs, and that a row's bits are its own.

Its results are those of any backend's: the tests of the statistics, on a GPU or the fake one.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import entropy_kernels as ek
from calls import same_bits
from conftest import on_gpu
from entropy_kernels._rows import NAMES, RowOptions, bits
from entropy_kernels.backends.eager import selection, softmax_state, token_stats_gpu
from entropy_kernels.backends.radix_select import Band, Count
from sample import labels, normal

ALL = bits(*NAMES)
SELECTIONS = {
    "token_covariance": lambda x, seed: selection.token_covariance(x, x, None, ""),
    "kl_cov_mask": lambda x, seed: selection.kl_cov_mask(x, None, None, None, Count(0.1, None, True), ""),
    "clip_cov_mask": lambda x, seed: selection.clip_cov_mask(
        x, None, None, None, seed, Count(0.1, None, True), Band(0.5, 0.9, True, True), ""
    ),
    "budget_mask": lambda x, seed: selection.budget_mask(x, None, None, None, x.new_full((3,), 0.1).double(), ""),
}


class Launches(TorchDispatchMode):
    """Counts operations that do something, and elements of the largest result."""

    def __enter__(self) -> Launches:
        self.count = self.largest = 0
        return super().__enter__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.count += 1
            if isinstance(result, Tensor):
                self.largest = max(self.largest, result.numel())
        return result


def statistics(logits: Tensor, softcap: float = 0.0, temperature: float = 0.8) -> tuple[Tensor, Tensor]:
    """State and gradient of (B, L, V) logits."""
    vocab, rows = logits.shape[2], logits.shape[:2].numel()
    target = labels(97, vocab=vocab, device="cpu").repeat(-(-rows // 97))[:rows].to(logits.device)
    grads = normal(len(NAMES), 97, dtype=torch.float32, device="cpu").repeat(1, -(-rows // 97))[:, :rows]
    given = logits, target, torch.full((1,), temperature, device=logits.device)
    options = RowOptions(softcap, -100, 0, vocab)
    state = token_stats_gpu.token_stats_forward(*given, options, ALL)[1]
    grads = grads.to(logits.device)
    return state, token_stats_gpu.token_stats_backward(grads, *given, state, options, ALL, False)


def launches(rows: int, vocab: int, softcap: float = 0.0, device: str = "meta") -> Launches:
    logits = torch.empty(1, rows, vocab, dtype=torch.bfloat16, device=device)
    with Launches() as counted:
        statistics(logits, softcap)
    return counted


@pytest.mark.parametrize("softcap", [0.0, 30.0])
def test_launches_and_memory_do_not_grow_with_rows(softcap: float) -> None:
    """But by a constant for each tile: 500 rows of 128 K columns."""
    one = launches(8, 128_256, softcap)
    assert launches(500, 128_256, softcap).count == one.count <= 250
    many = launches(8192, 128_256, softcap)
    tiles = -(-8192 // (token_stats_gpu.TILE_BYTES // (4 * 128_256)))
    assert many.count <= one.count + (tiles - 1) * 56
    # a temporary is a tile; larger are the gradient and what is a view of the logits alone
    assert launches(400, 128_256, softcap).largest <= token_stats_gpu.TILE_BYTES // 4


@pytest.mark.parametrize("name", SELECTIONS)
def test_launches_of_a_selection_do_not_grow_with_tokens(name: str) -> None:
    counts = []
    for tokens in (64, 1 << 16, 1 << 22):
        with Launches() as counted:
            SELECTIONS[name](torch.empty(tokens, device="meta"), torch.zeros((), dtype=torch.int64, device="meta"))
        counts.append(counted.count)
    assert counts[0] == counts[1] == counts[2] <= 300


@pytest.mark.parametrize("softcap", [0.0, 20.0])
@pytest.mark.parametrize("vocab", [1, 7, 127, 128, 131, 8191, 8195])
def test_tiles_change_no_bit(vocab: int, softcap: float, monkeypatch: pytest.MonkeyPatch) -> None:
    logits = normal(3, 7, vocab, dtype=torch.bfloat16, device="cpu")
    whole = statistics(logits, softcap)
    for rows in (1, 2, 5, 7, 9):
        monkeypatch.setattr(token_stats_gpu, "TILE_BYTES", rows * 4 * vocab)
        for ours, all_at_once in zip(statistics(logits, softcap), whole, strict=True):
            assert same_bits(ours, all_at_once), rows


def test_sums_of_rows_do_not_depend_on_their_number() -> None:
    for n in (1, 2, 3, 8, 127, 128, 1000, 8193, 128_256):
        terms = torch.rand(5, n)
        whole = softmax_state._halved(softmax_state.fold(terms).clone())
        torch.testing.assert_close(whole, terms.double().sum(-1).float(), rtol=3e-7, atol=0)
        for i in range(5):
            assert same_bits(softmax_state._halved(softmax_state.fold(terms[i : i + 1]).clone()), whole[i : i + 1])
    assert softmax_state._halved(torch.empty(3, 0)).eq(0).all()


@on_gpu("torch", "token_stats")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("vocab", [97, 8_195, 128_256])
def test_a_row_has_the_same_bits_among_others(vocab: int) -> None:
    rows, device = 97, "cuda"
    logits = normal(rows, vocab, dtype=torch.bfloat16, device=device)
    target = labels(rows, vocab=vocab, device=device)
    grads = normal(3, rows, dtype=torch.float32, device=device)

    def results(part: slice) -> list[Tensor]:
        leaf = logits[part].clone().requires_grad_()
        out = ek.token_stats(leaf, target[part], backend="torch")
        return [*(x.detach() for x in out), *torch.autograd.grad(out[:3], leaf, [*grads[:, part]])]

    whole = results(slice(0, rows))
    for part in (slice(0, 1), slice(96, 97), slice(3, 5), slice(11, 64)):
        for ours, theirs in zip(results(part), whole, strict=True):
            assert same_bits(ours, theirs[part]), part

"""Random keys: one definition, known answers shared by the reference, C++, torch and Triton."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

import entropy_kernels as ek
import reference_selection as reference
from conftest import BackendDevice
from entropy_kernels.backends import native
from entropy_kernels.backends.eager import philox

# Known answers of Random123 1.14 (kat_vectors, "philox4x32 10"): counter, key, output
RANDOM123 = [
    ([0, 0, 0, 0], [0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]
# (token index, seed) -> key. The contract: a change of any of these changes every run's selection.
TOKEN_KEYS = [
    (0, 0, 0x6627E8D5),
    (1, 0, 0xF8E4CCA4),
    (0, 1, 0xE3E80670),
    (2**32 - 1, 7, 0xCA2833CA),
    (2**32, 7, 0x2EC4F55D),
    (2**63 - 1, -1, 0x7B2535F5),
    (-1, 2**63 - 1, 0x0ED551B4),
    (123456789012345, 987654321098765, 0x7EE9C169),
]
# Twenty more: the vector loops take eight at a time and leave a tail.
SEED = -987654321
INDICES = sorted({index for index, _, _ in TOKEN_KEYS}) + [3 * 2**31 + 7 * i for i in range(20)]


@pytest.mark.parametrize(("counter", "key", "expected"), RANDOM123)
def test_random123_known_answers(counter: list[int], key: list[int], expected: list[int]) -> None:
    assert reference.philox4x32_10(counter, key) == expected
    c = tuple(torch.tensor(word) for word in counter)
    k = (torch.tensor(key[0]), torch.tensor(key[1]))
    assert [int(word) for word in philox.philox4x32_10(c, k)] == expected
    primitives = pytest.importorskip("entropy_kernels._C", reason="built in place only")
    assert primitives.philox4x32_10(counter, key) == expected


@pytest.mark.parametrize(("index", "seed", "expected"), TOKEN_KEYS)
def test_token_key(index: int, seed: int, expected: int) -> None:
    assert reference.random_key(index, seed) == expected
    assert int(philox.token_key(torch.tensor([index]), torch.tensor(seed))) == expected


def _steps(backend: str) -> Any:
    if backend == "torch":
        return importlib.import_module("entropy_kernels.backends.eager.selection")
    if backend == "triton":
        return importlib.import_module("entropy_kernels.backends.triton.selection")
    return native._steps


def test_random_keys_step(selection_on: BackendDevice) -> None:
    """Every backend's keys, with and without explicit indices, and only inside the band."""
    device = selection_on.device
    steps = _steps(selection_on.backend)
    values = torch.arange(len(INDICES), device=device)
    band = torch.tensor([2, len(INDICES)], device=device)
    offset, seed = torch.tensor(2**32 - 5, device=device), torch.tensor(SEED, device=device)
    for index in (torch.tensor(INDICES, device=device), None):
        keys = steps.selection_random_keys(values, band, index, offset, seed).tolist()
        indices = INDICES if index is not None else [2**32 - 5 + i for i in range(len(INDICES))]
        assert keys == [-1, -1] + [reference.random_key(i, SEED) for i in indices[2:]]


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_fused_keys(capability: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The C++ vector loops show their keys through which token wins: the whole ranking, one k at a time."""
    if native.load_error is not None:
        pytest.skip(native.load_error)
    if capability not in native.cpu_capability().available:
        pytest.skip(f"this CPU has no {capability}")
    monkeypatch.setenv("ENTROPY_KERNELS_CPU_CAPABILITY", capability)
    index = torch.tensor(INDICES)
    covariance = torch.full(index.shape, 2.0)
    ranking = sorted(range(len(INDICES)), key=lambda i: -reference.random_key(INDICES[i], SEED))
    for k in range(len(INDICES) + 1):
        mask = ek.clip_cov_mask(covariance, seed=SEED, k=k, token_index=index, backend="cpu")
        assert mask.nonzero().view(-1).tolist() == sorted(ranking[:k])

"""What the CUDA half does on the host: how a batch is spread over blocks, switches, what is asked once per device."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import cuda_emulator
import entropy_kernels as ek
from conftest import on_gpu
from entropy_kernels._rows import RowOptions, bits
from entropy_kernels.backends import native
from sample import plain

K = 1024
REASON = ek.backends()["token_stats"]["cuda"]
hardware = [
    on_gpu("cuda", "token_stats", "clip_cov_mask", "kl_cov_mask"),
    pytest.mark.skipif(REASON != "available", reason=f"backend cuda: {REASON}"),
    pytest.mark.skipif(not native._CUDA_LIBRARY.exists(), reason="a fake GPU has no CUDA half to switch"),
]
needs_compiler = pytest.mark.skipif(cuda_emulator.missing() is not None, reason=str(cuda_emulator.missing()))


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("cuda_host") / "cuda_host.so"
    here = Path(__file__).parent
    flags = ["-O1", "-std=c++20", "-shared", "-fPIC", "-pthread", "-Wall", "-Wno-unknown-pragmas"]
    source = [f"-I{here.parent / 'csrc'}", str(here / "cuda_host.cpp")]
    subprocess.run([cuda_emulator.COMPILER, *flags, *source, "-o", str(path)], check=True)
    loaded = ctypes.CDLL(str(path))
    loaded.host_switch.argtypes, loaded.host_switch.restype = [ctypes.c_char_p, ctypes.c_int64], ctypes.c_int64
    whole, one = ctypes.c_int64, ctypes.c_int
    loaded.host_plan.argtypes = [whole, one, one, one, one, ctypes.POINTER(whole)]
    loaded.host_plan.restype = ctypes.c_char_p
    loaded.host_forward_parts.argtypes = [whole, whole, whole, one, whole]
    loaded.host_reads_vectors.argtypes = [whole, whole, whole, whole, one]
    return loaded


def plan(library: Any, tokens: int, cluster: int, shared: int = 0) -> tuple[bool, int, int, int, int]:
    """(cluster, blocks, tokens per block, quads kept, bytes of those in shared memory) on 132 multiprocessors."""
    out = (ctypes.c_int64 * 5)()
    error = library.host_plan(tokens, cluster, 132, shared, 17, out)
    if error is not None:
        raise RuntimeError(error.decode())
    return bool(out[0]), *out[1:]


@needs_compiler
def test_small_batches_are_one_cluster(library: Any) -> None:
    """Where the kernel has clusters; a grid has 1024 tokens per block until all multiprocessors have one."""
    before = library.host_switch(b"cluster_tokens", 64 * K)
    try:
        for tokens in (1, 4096, 4097, 60 * K, 64 * K):
            cluster, blocks, chunk, kept, shared = plan(library, tokens, cluster=16)
            assert cluster and blocks <= 16 and blocks * chunk >= tokens and chunk % 128 == 0
            assert kept * 4 >= chunk and shared == 0
        assert plan(library, 64 * K + 1, cluster=16) == (False, 65, 1024, 1024, 0)
        assert plan(library, 64 * K, cluster=0) == (False, 64, 1024, 1024, 0)
        assert plan(library, 1024 * K, cluster=0) == (False, 131, 8064, 1024, 0)
        library.host_switch(b"cluster_tokens", 2**40)
        assert plan(library, 1024 * K, cluster=16) == (True, 16, 64 * K, 1024, 0)
        with pytest.raises(RuntimeError, match="too many tokens"):
            plan(library, 2**40, cluster=16)
        library.host_switch(b"cluster_tokens", 0)
        assert plan(library, 1, cluster=16) == (False, 1, 128, 1024, 0)
    finally:
        library.host_switch(b"cluster_tokens", before)


@needs_compiler
def test_no_block_is_without_tokens_in_a_grid(library: Any) -> None:
    """Chunks are whole warps of quads, so that fewer blocks than multiprocessors may hold all tokens."""
    assert plan(library, 512 * K, cluster=0) == (False, 128, 4096, 1024, 0)
    for tokens in (1, 1025, 135_168, 135_169, 200_000, 4096 * K):
        _, blocks, chunk, _, _ = plan(library, tokens, cluster=0)
        assert (blocks - 1) * chunk < tokens <= blocks * chunk and blocks <= 132


@needs_compiler
def test_shared_memory_keeps_what_no_register_holds(library: Any) -> None:
    """As far as it reaches: a quad takes 17 bytes."""
    assert plan(library, 132 * 5120, cluster=0, shared=10_000) == (False, 132, 5120, 1280, 256 * 17)
    assert plan(library, 132 * 5120, cluster=0, shared=17 * 100 + 16) == (False, 132, 5120, 1124, 1700)


@needs_compiler
def test_rows_are_cut_without_regard_to_their_number_if_asked_to(library: Any) -> None:
    """152 K columns of bf16 on 132 multiprocessors; and misaligned rows, whose vectors their address would decide."""

    def parts(rows: int) -> int:
        return library.host_forward_parts(rows, 2 * 151_936, 264, 8, 8192)

    def vectors(address: int, pitch: int, column: int = 1) -> bool:
        return bool(library.host_reads_vectors(address, 7 * pitch, pitch, column, 2))

    assert [parts(n) for n in (1, 32, 40, 132, 263, 264)] == [8, 8, 8, 2, 2, 1]
    assert library.host_forward_parts(1, 40_000, 264, 8, 8192) == 4
    assert vectors(512, 1024) and vectors(512, 1023) and vectors(514, 1024) and not vectors(512, 1024, column=2)
    library.host_switch(b"row_invariant", 1)
    try:
        assert {parts(n) for n in (1, 40, 1000)} == {1}
        assert vectors(512, 1024) and not vectors(512, 1023) and not vectors(514, 1024)
        assert not vectors(512, 1024, column=2)
    finally:
        library.host_switch(b"row_invariant", 0)


@needs_compiler
def test_python_and_cpp_know_the_same_switches(library: Any) -> None:
    for name, values in native.CUDA_SWITCHES.items():
        before = library.host_switch(name.encode(), values[-1])
        assert before in values and library.host_switch(name.encode(), before) == values[-1]
    assert library.host_switch(b"cluster", 1) == -1


@needs_compiler
def test_a_kernel_is_asked_once_per_device(library: Any) -> None:
    assert library.host_once(1, 3, 2) == 6
    assert library.host_once(8, 3, 100) == 300
    assert library.host_once_after_error() == 2


def test_a_switch_that_is_wrong_is_named() -> None:
    with pytest.raises(
        ValueError, match=r"name: expected one of cluster_tokens, backward_reversed, row_invariant, got 'cluster'"
    ):
        native.set_cuda_switch("cluster", 1)
    for value in (-1, 2**63, 1.0, "1", None):
        with pytest.raises(ValueError, match=rf"value: expected an integer from 0 to {2**63 - 1} .* got {value!r}"):
            native.set_cuda_switch("cluster_tokens", value)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="value: expected an integer from 0 to 1 for backward_reversed, got 2"):
        native.set_cuda_switch("backward_reversed", 2)


@pytest.mark.skipif(native.cuda_load_error is None, reason="this build has the CUDA half")
def test_without_the_cuda_half_there_is_nothing_to_switch() -> None:
    for ask in (native.largest_cluster, lambda: native.set_cuda_switch("cluster_tokens", 1)):
        with pytest.raises(RuntimeError, match="CUDA"):
            ask()


class TestOnHardware:
    """Switches change when or where something is computed, never a bit of it."""

    pytestmark = hardware

    @pytest.fixture(autouse=True)
    def switches_as_before(self) -> Iterator[None]:
        before = {name: native.set_cuda_switch(name, 0) for name in native.CUDA_SWITCHES}
        for name, value in before.items():
            native.set_cuda_switch(name, value)
        yield
        for name, value in before.items():
            native.set_cuda_switch(name, value)

    def test_largest_cluster(self) -> None:
        granted = native.largest_cluster()
        assert granted in ((8, 16) if torch.cuda.get_device_capability() in ((9, 0), (10, 0)) else (0, 1, 2, 4, 8, 16))

    @pytest.mark.parametrize("rows", [1, 5, 700])
    @pytest.mark.parametrize("vocab", [40_000, 40_001])
    def test_backward_reversed(self, vocab: int, rows: int) -> None:
        sample = plain(torch.bfloat16, "cuda", rows=rows, vocab=vocab)
        logits, temperature = sample.logits[None], torch.ones(1, device="cuda")
        options, want = RowOptions(0.0, -100, 0, vocab), bits("logprob", "entropy")
        _, state = native.token_stats_forward(logits, sample.target, temperature, options, want)
        grads = torch.randn(rows, device="cuda").expand(2, rows)

        def gradient(inplace: bool) -> torch.Tensor:
            return native.token_stats_backward(grads, logits, sample.target, temperature, state, options, want, inplace)

        expected = gradient(False)
        assert native.set_cuda_switch("backward_reversed", 1) == 0
        assert torch.equal(gradient(False), expected)
        assert torch.equal(gradient(True), expected)

    @pytest.mark.parametrize("most", [0, 2**31])
    @pytest.mark.parametrize("tokens", [1, 5000, 65_536, 524_288, 1_000_003])
    def test_cluster_tokens(self, tokens: int, most: int) -> None:
        """All covariances as grids; all as clusters."""
        logprob, advantages = torch.randn(2, tokens, generator=torch.Generator().manual_seed(tokens)).cuda()
        native.set_cuda_switch("cluster_tokens", most)
        for values in (logprob, logprob.double()):
            expected = ek.token_covariance(values, advantages, backend="torch")
            assert torch.equal(ek.token_covariance(values, advantages, backend="cuda"), expected)

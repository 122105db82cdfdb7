"""The backend "cuda": when it is there, that "auto" waits for a hardware run, and what only hardware can show.

On a GPU every test with the fixture `on` runs on it too; here is what those do not ask.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch

import entropy_kernels as ek
from calls import bound, check, same_bits, upstream
from conftest import BackendDevice, on_gpu
from entropy_kernels._rows import NAMES, RowOptions, bits
from entropy_kernels.backends import native, registry
from entropy_kernels.backends.eager import softmax_state
from sample import plain
from stub_gpu import add_stub_gpu

REASON = ek.backends()["token_stats"]["cuda"]
hardware = [
    on_gpu("cuda", "token_stats"), pytest.mark.skipif(REASON != "available", reason=f"backend cuda: {REASON}")
]  # fmt: skip


def test_reasons_why_not(forgetful_registry: None, monkeypatch: pytest.MonkeyPatch) -> None:
    add_stub_gpu(monkeypatch, gpu=False)
    assert registry.unavailable("token_stats", "cuda") == "no CUDA device"
    registry.unavailable.cache_clear()
    add_stub_gpu(monkeypatch)
    assert registry.unavailable("token_stats", "cuda") is None
    assert registry.unavailable("kl_cov_mask", "cuda") == "no CUDA kernel kl_cov_mask yet"
    registry.unavailable.cache_clear()
    add_stub_gpu(monkeypatch, (7, 5))
    assert registry.unavailable("token_stats", "cuda") == "needs compute capability 8.0 or higher, this GPU is sm_75"
    registry.unavailable.cache_clear()
    monkeypatch.setattr(native, "cuda_load_error", "built without CUDA")
    with pytest.raises(RuntimeError, match="backend 'cuda' cannot run token_stats here: built without CUDA"):
        registry.resolve("token_stats", "cuda", torch.device("cuda"))


def test_kernel_report_is_read() -> None:
    (kernel,) = native.parse_cuda_kernels("token_stats_forward bf16, softcap\t64\t1024\t0\t90\n")
    assert kernel == native.CudaKernel("token_stats_forward bf16, softcap", 64, 1024, 0, 90)
    with pytest.raises(RuntimeError, match="CUDA kernels: cudaFuncGetAttributes: no CUDA-capable device"):
        native.parse_cuda_kernels("cudaFuncGetAttributes: no CUDA-capable device is detected")


@pytest.mark.skipif(native.cuda_load_error is None, reason="this build has the CUDA half")
def test_kernel_report_without_the_cuda_half_is_a_clear_error() -> None:
    with pytest.raises(RuntimeError, match="CUDA"):
        native.cuda_kernels()


class TestOnHardware:
    pytestmark = hardware
    on = BackendDevice("cuda", "cuda")

    def test_no_kernel_uses_local_memory(self) -> None:
        kernels = native.cuda_kernels()
        names = [kernel.name for kernel in kernels]
        assert len(set(names)) == len(names)
        assert {name.split()[0] for name in names} >= {
            "token_stats_forward", "token_stats_forward_bulk", "token_stats_backward", "selection_grid",
            "covariance_cluster", "covariance_grid", "budget_grid", "step",
        }  # fmt: skip
        assert [kernel for kernel in kernels if kernel.local] == []

    @pytest.mark.parametrize("rows", [1, 2, 7, 40, 150, 600])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
    @pytest.mark.parametrize("vocab", [129_920, 151_936, 151_937])
    def test_any_number_of_parts(
        self, vocab: int, dtype: torch.dtype, rows: int, large_memory: Callable[[float], None]
    ) -> None:
        """From one row, cut into as many parts as there may be, to many whole ones; 151937 misaligns the rows."""
        if rows == 600:
            large_memory(12)  # of fp64 references: a dozen processes at once would not fit
        check(plain(dtype, "cuda", rows=rows, vocab=vocab, temperature=0.8), self.on, "logprob", "entropy")

    @pytest.mark.parametrize("rows", [1, 40, 600])
    def test_double_has_only_plain_loads(self, rows: int) -> None:
        check(plain(torch.float64, "cuda", rows=rows, vocab=32_000), self.on, "logprob", "entropy")

    def test_repeated_runs_are_bitwise_equal(self) -> None:
        """Parts are merged in their order, whichever is done first."""
        for dtype, rows in ((torch.bfloat16, 1), (torch.bfloat16, 40), (torch.float64, 1), (torch.float64, 40)):
            sample = plain(dtype, "cuda", rows=rows, vocab=151_937)
            first = ek.token_stats(sample.logits, sample.target, backend="cuda")
            for _ in range(20):
                again = ek.token_stats(sample.logits, sample.target, backend="cuda")
                assert all(same_bits(a, b) for a, b in zip(first, again, strict=True))

    def test_current_stream_is_used(self) -> None:
        """Behind a long kernel on a side stream the logits are not there yet for any other stream."""
        sample = plain(torch.bfloat16, "cuda", rows=3, vocab=151_936)
        references, late = bound(sample), torch.zeros_like(sample.logits).requires_grad_()
        grads = upstream(sample, "logprob", "entropy")
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            torch.cuda._sleep(200_000_000)
            with torch.no_grad():
                late.copy_(sample.logits)
            out = ek.logprob_entropy(late, sample.target, backend="cuda")
            (gradient,) = torch.autograd.grad(list(out), late, list(grads.values()))
        torch.cuda.current_stream().wait_stream(side)
        references.check_values(**out._asdict())
        references.check_gradient(gradient, **grads)

    @pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
    def test_device_of_the_tensors_is_used(self) -> None:
        check(plain(torch.bfloat16, "cuda:1", rows=3), self.on, "logprob", "entropy")
        assert torch.cuda.current_device() == 0

    @pytest.mark.parametrize("columns", ["contiguous", "strided"])
    @pytest.mark.parametrize("rows", [1, 100])
    def test_graph_of_split_rows_can_be_replayed(self, rows: int, columns: str, undisturbed: None) -> None:
        """Strided columns have no bulk copies: their parts meet in memory, by counters that the graph has to zero."""
        sample = plain(torch.float32, "cuda", rows=rows, vocab=151_937)
        if columns == "strided":
            sample.logits = sample.logits.t().contiguous().t()
        eager = ek.token_stats(sample.logits, sample.target, backend="cuda")
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = ek.token_stats(sample.logits, sample.target, backend="cuda")
        for _ in range(3):
            for output in captured:
                output.fill_(torch.nan)
            graph.replay()
            assert all(same_bits(a, b) for a, b in zip(eager, captured, strict=True))

    def test_invalid_labels_and_temperatures_are_nan_without_a_sync(self, undisturbed: None) -> None:
        sample = plain(torch.bfloat16, "cuda", rows=4)
        sample.target[0], sample.target[1] = 97, -1
        temperature = torch.tensor([1.0, 1.0, 0.0, 1.0], device="cuda")
        ek.token_stats(sample.logits, sample.target, temperature=temperature, backend="cuda")
        torch.cuda.set_sync_debug_mode("error")
        try:
            out = ek.token_stats(sample.logits, sample.target, temperature=temperature, backend="cuda")
        finally:
            torch.cuda.set_sync_debug_mode("default")
        for value in out:
            assert value[:3].isnan().all() and value[3].isfinite()

    @pytest.mark.parametrize("vocab", [300, 40_000])
    def test_states_of_shards_merge_in_torch(self, vocab: int) -> None:
        """One definition of the state across languages: CUDA's shards, merged and finalized in torch, give the row."""
        sample = plain(torch.float32, "cuda", rows=4, vocab=vocab)
        temperature = torch.tensor([1.0, 0.5, 2.0, 0.7], device="cuda")
        cuts, states = (0, 100, 101, vocab), []
        for start, stop in itertools.pairwise(cuts):
            shard = (sample.logits[None, :, start:stop], sample.target, temperature)
            states.append(native.token_stats_forward(*shard, RowOptions(0.0, -100, start, vocab), bits(*NAMES))[1])
        none = torch.zeros(4, dtype=torch.bool, device="cuda")
        merged = softmax_state.merge(torch.stack(states), temperature)
        values = dict(zip(NAMES, softmax_state.finalize(merged, temperature, bits(*NAMES), none, none), strict=True))
        sample.kwargs["temperature"] = temperature
        bound(sample).check_values(**values)

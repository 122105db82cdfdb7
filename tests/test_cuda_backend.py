"""The backend "cuda": when it is there, that "auto" waits for a hardware run, and what only hardware can show.

On a GPU every test with a `place` runs on it too; here is what those do not ask.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import entropy_kernels as ek
from calls import bound, check, same_bits, upstream
from cases import plain
from conftest import Place
from entropy_kernels import doctor
from entropy_kernels.backends import native, registry

REASON = ek.backends()["token_stats"]["cuda"]
on_gpu = [pytest.mark.gpu, pytest.mark.skipif(REASON != "available", reason=f"backend cuda: {REASON}")]


@pytest.fixture
def cleared() -> Iterator[None]:
    """The registry remembers what it found; forget before and after."""
    caches = (registry.unavailable, registry.architecture, registry.resolve, registry._auto)
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


def pretend(monkeypatch: pytest.MonkeyPatch, *, gpu: bool, capability: tuple[int, int] = (9, 0)) -> None:
    """A CUDA half that loads, and a GPU or none."""
    monkeypatch.setattr(native, "cuda_load_error", None)
    monkeypatch.setattr(native, "has_cuda_kernel", lambda name: name.startswith("token_stats"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(registry, "architecture", lambda: "sm_{}{}".format(*capability))


def test_reasons_why_not(cleared: None, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, gpu=False)
    assert registry.unavailable("token_stats", "cuda") == "no CUDA device"
    registry.unavailable.cache_clear()
    pretend(monkeypatch, gpu=True)
    assert registry.unavailable("token_stats", "cuda") is None
    assert registry.unavailable("kl_cov_mask", "cuda") == "no CUDA kernel kl_cov_mask yet"
    registry.unavailable.cache_clear()
    pretend(monkeypatch, gpu=True, capability=(7, 5))
    assert registry.unavailable("token_stats", "cuda") == "needs compute capability 8.0 or higher, this GPU is sm_75"
    registry.unavailable.cache_clear()
    monkeypatch.setattr(native, "cuda_load_error", "built without CUDA")
    with pytest.raises(RuntimeError, match="backend 'cuda' cannot run token_stats here: built without CUDA"):
        registry.resolve("token_stats", "cuda", "cuda")


def test_auto_waits_for_a_hardware_run(cleared: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert registry.VERIFIED == {}, "an entry needs results of that hardware in benchmarks/results"
    pretend(monkeypatch, gpu=True)
    assert registry.resolve("token_stats", "cuda", "cuda") == "cuda"
    assert registry.resolve("token_stats", "auto", "cuda") == "torch"
    reason = registry.unverified("token_stats", "cuda", "cuda")
    assert reason == "no hardware run has verified it on sm_90 yet; backend='cuda' runs it all the same"
    monkeypatch.setattr(doctor, "device_types", lambda: ["cuda"])
    rows = {op: (backend, why) for op, _, backend, why in doctor.auto_choices()}
    assert rows["token_stats"][0] == "torch" and f"not cuda: {reason}" in rows["token_stats"][1]
    assert "not cuda: no CUDA kernel kl_cov_mask yet" in rows["kl_cov_mask"][1]


def test_auto_takes_what_is_verified_where_it_is(cleared: None, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, gpu=True)
    monkeypatch.setattr(registry, "VERIFIED", {("token_stats", "cuda"): ("sm_90",)})
    assert registry.resolve("token_stats", "auto", "cuda") == "cuda"
    assert registry.resolve("kl_cov_mask", "auto", "cuda") == "torch"
    assert registry.unverified("token_stats", "torch", "cuda") is None
    for cached in (registry.resolve, registry._auto):
        cached.cache_clear()
    pretend(monkeypatch, gpu=True, capability=(10, 0))
    assert registry.resolve("token_stats", "auto", "cuda") == "torch"


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
    pytestmark = on_gpu
    place = Place("cuda", "cuda")

    def test_no_kernel_uses_local_memory(self) -> None:
        kernels = native.cuda_kernels()
        assert len(kernels) == 36
        assert [kernel for kernel in kernels if kernel.local] == []

    @pytest.mark.parametrize("rows", [1, 2, 7, 40, 150, 600])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
    @pytest.mark.parametrize("vocab", [129_920, 151_936, 151_937])
    def test_any_number_of_parts(self, vocab: int, dtype: torch.dtype, rows: int) -> None:
        """From one row, cut into as many parts as there may be, to many whole ones; 151937 misaligns the rows."""
        check(plain(dtype, "cuda", rows=rows, vocab=vocab, temperature=0.8), self.place, "logprob", "entropy")

    @pytest.mark.parametrize("rows", [1, 40, 600])
    def test_double_has_only_plain_loads(self, rows: int) -> None:
        check(plain(torch.float64, "cuda", rows=rows, vocab=32_000), self.place, "logprob", "entropy")

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
        check(plain(torch.bfloat16, "cuda:1", rows=3), self.place, "logprob", "entropy")
        assert torch.cuda.current_device() == 0

    @pytest.mark.parametrize("rows", [1, 300])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    def test_graph_of_split_rows_can_be_replayed(self, dtype: torch.dtype, rows: int) -> None:
        """The counters of the parts, which only plain loads (fp64) have on every GPU, are zeroed within the graph."""
        sample = plain(dtype, "cuda", rows=rows, vocab=151_937)
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

    def test_invalid_labels_and_temperatures_are_nan_without_a_sync(self) -> None:
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

    def test_more_than_2_31_logits(self) -> None:
        if torch.cuda.mem_get_info()[0] < 20e9:
            pytest.skip("needs 20 GB")
        rows, vocab = 17_000, 131_072
        logits = torch.zeros(rows, vocab, dtype=torch.bfloat16, device="cuda")
        last = plain(torch.bfloat16, "cuda", rows=1, vocab=vocab)
        logits[-1] = last.logits[0]
        target = torch.zeros(rows, dtype=torch.int64, device="cuda")
        target[-1] = last.target[0]
        logits.requires_grad_()
        out = ek.logprob_entropy(logits, target, backend="cuda", inplace_backward=False)
        (gradient,) = torch.autograd.grad(out.logprob[-1], logits)
        alone = last.logits.clone().requires_grad_()
        expected = ek.logprob_entropy(alone, last.target, backend="cuda")
        assert torch.allclose(out.entropy[-1], expected.entropy[0], rtol=1e-6)
        (expected_gradient,) = torch.autograd.grad(expected.logprob[0], alone)
        assert torch.allclose(gradient[-1], expected_gradient[0], rtol=1e-2) and not gradient[:-1].any()

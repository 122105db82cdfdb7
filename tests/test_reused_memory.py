"""Large CPU gradients get the memory of earlier ones, and only when nobody holds those any more."""

from __future__ import annotations

import gc
import threading

import pytest
import torch

from entropy_kernels._memory import peak_allocated
from entropy_kernels.backends import reused_memory

pytestmark = pytest.mark.skipif(not reused_memory._SUPPORTED, reason="madvise with MADV_FREE is Linux's")

LARGE = torch.Size((3, reused_memory.LARGE_BYTES // 8))  # 1.5 times the threshold in fp32


@pytest.fixture(autouse=True, scope="module")
def no_garbage():
    """Of earlier tests, whose blocks would come back while these run. Once: after hours of torch it takes a second."""
    gc.collect()


@pytest.fixture(autouse=True)
def nothing_kept(no_garbage):
    reused_memory._kept.clear()
    yield
    reused_memory._kept.clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_is_an_ordinary_tensor(dtype):
    tensor = reused_memory.empty(LARGE, dtype)
    assert tensor.shape == LARGE and tensor.dtype == dtype and tensor.is_contiguous() and not tensor.requires_grad
    tensor.fill_(3)
    assert torch.equal(tensor, torch.full(LARGE, 3, dtype=dtype))


def test_memory_is_handed_out_again_once_released():
    first = reused_memory.empty(LARGE, torch.float32)
    address = first.data_ptr()
    del first
    assert reused_memory.empty(LARGE, torch.float32).data_ptr() == address
    # also for another dtype and shape that fit
    assert reused_memory.empty(torch.Size((LARGE.numel() * 3 // 2,)), torch.float16).data_ptr() == address


def test_memory_is_not_shared_while_a_view_lives():
    first = reused_memory.empty(LARGE, torch.float32).fill_(1)
    view = first[1:, ::7].detach()
    del first
    second = reused_memory.empty(LARGE, torch.float32).fill_(2)
    assert second.untyped_storage().data_ptr() != view.untyped_storage().data_ptr()
    assert (view == 1).all() and (second == 2).all()


def test_one_block_at_most_is_kept():
    tensors = [reused_memory.empty(LARGE, torch.float32) for _ in range(3)]
    last = tensors[0].data_ptr()
    while tensors:
        tensors.pop()
    assert len(reused_memory._kept) == 1
    assert reused_memory.empty(LARGE, torch.float32).data_ptr() == last


def test_a_larger_tensor_replaces_the_kept_block():
    del_me = reused_memory.empty(LARGE, torch.float32)
    del del_me
    larger = reused_memory.empty(LARGE, torch.float64).fill_(1)
    assert not reused_memory._kept
    del larger
    assert len(reused_memory._kept[0]) >= LARGE.numel() * 8


def test_small_and_empty_tensors_come_from_torch():
    for shape in ((5, 7), (0, 1 << 30)):
        tensor = reused_memory.empty(torch.Size(shape), torch.float32)
        assert tensor.shape == shape and tensor.untyped_storage().resizable()


def test_threads_never_share_a_block():
    wrong: list[int] = []

    def work(value: int) -> None:
        for _ in range(20):
            tensor = reused_memory.empty(LARGE, torch.float32)
            tensor[:, :: 1 << 12] = value
            if not (tensor[:, :: 1 << 12] == value).all():
                wrong.append(value)

    threads = [threading.Thread(target=work, args=(value,)) for value in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_backward_pass_in_a_loop_uses_one_block():
    import entropy_kernels as ek

    if ek.backends()["token_stats"]["cpu"] != "available":
        pytest.skip(ek.backends()["token_stats"]["cpu"])
    vocab = reused_memory.LARGE_BYTES // 16
    logits = torch.randn(8, vocab, requires_grad=True)
    addresses = set()
    for step in range(3):
        ek.logprob_entropy(logits, torch.arange(8), backend="cpu").logprob.sum().backward()
        assert logits.grad is not None
        addresses.add(logits.grad.data_ptr())
        if step == 1:  # a gradient that the caller keeps stays as it is
            kept = logits.grad
            copy = kept.clone()
        logits.grad = None
    assert len(addresses) == 2 and torch.equal(kept, copy)


def test_a_measured_peak_sees_large_blocks(capfd):
    size = LARGE.numel() * 4

    def call() -> torch.Tensor:
        tensor = reused_memory.empty(LARGE, torch.float32)
        return tensor[0] + 1

    call()  # a block is kept
    address = reused_memory.empty(LARGE, torch.float32).data_ptr()
    assert peak_allocated(call, torch.device("cpu")) == pytest.approx(size + size // 3, abs=1024)
    assert reused_memory.empty(LARGE, torch.float32).data_ptr() == address, "measuring took the block away"
    assert capfd.readouterr().err == "", "the profiler talks"


def test_garbage_of_before_is_no_room_of_the_call() -> None:
    """A cycle that an earlier measured call left, and that Python's collector finds during this one: 4 KB are freed
    that this call never had."""
    collections: list[str] = []
    during: list[int] = []  # collections in a call; around it the profiler's own objects may set one off

    def seen(phase: str, info: object) -> None:
        collections.append(phase)

    def leaves_a_cycle() -> None:
        cycle: list[object] = [torch.zeros(1024)]
        cycle.append(cycle)

    def call() -> torch.Tensor:
        before = len(collections)
        made = [[] for _ in range(3 * gc.get_threshold()[0])]  # enough objects for collections of the youngest
        during.append(len(collections) - before)
        return torch.zeros(1024 + 0 * len(made))

    gc.callbacks.append(seen)
    try:
        assert peak_allocated(leaves_a_cycle, torch.device("cpu")) == 4096
        assert peak_allocated(call, torch.device("cpu")) == 4096
        assert during == [0] and gc.isenabled()
        call()
    finally:
        gc.callbacks.remove(seen)
    assert during[1], "nothing would have been collected"

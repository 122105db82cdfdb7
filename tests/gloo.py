"""Real gloo process groups of a few ranks on this machine, for tests of what is distributed."""

from __future__ import annotations

import datetime
import functools
import io
import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist

# The fork server has imported torch once and has no threads, so a rank starts in milliseconds and forks safely. Without
# parts of the compiler each rank would import those, in 3 s: compiled calls and use_deterministic_algorithms do.
_context = multiprocessing.get_context("forkserver")
_preloaded = ["torch", "torch.distributed", "entropy_kernels", "torch._dynamo", "torch._dynamo.backends.debugging"]
_preloaded += ["torch._functorch.aot_autograd", "torch._inductor.config"]


def preload(*modules: str) -> None:
    """What else ranks need: said at the top of a test module, the fork server imports it, once for all of them."""
    _preloaded.extend(modules)
    _context.set_forkserver_preload(_preloaded)


preload()

TIMEOUT = 300  # seconds that a collective, and a whole run, may take on a busy machine


def _rank(rank: int, world: int, store: str, pipe: Connection, function: Callable, arguments: tuple) -> None:
    try:
        torch.set_num_threads(1)
        torch.use_deterministic_algorithms(True, warn_only=True)  # NaN in uninitialised memory, as in conftest.py
        torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
        dist.init_process_group(
            "gloo",
            store=dist.FileStore(store, world),
            rank=rank,
            world_size=world,
            timeout=datetime.timedelta(seconds=TIMEOUT),
        )
        result = io.BytesIO()
        torch.save(function(rank, world, *arguments), result)
        dist.barrier()
        dist.destroy_process_group()
        pipe.send((True, result.getvalue()))
    except BaseException:
        pipe.send((False, traceback.format_exc()))
    finally:
        pipe.close()
        os._exit(0)  # a rank that failed must not wait in a destructor for those that did not


def run_ranks(world: int, function: Callable, *arguments: Any) -> list[Any]:
    """``function(rank, world, *arguments)`` of a module on ``world`` ranks; its results in the order of the ranks.

    Raises AssertionError with the traceback of a rank that failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        ranks = []
        for rank in range(world):
            ours, theirs = _context.Pipe(duplex=False)
            process = _context.Process(
                target=_rank, args=(rank, world, os.path.join(folder, "store"), theirs, function, arguments)
            )
            process.start()
            theirs.close()
            ranks.append((process, ours))
        results: list[Any] = [None] * world
        failures = []
        for rank, (process, pipe) in enumerate(ranks):
            try:
                good, result = pipe.recv() if pipe.poll(TIMEOUT) else (False, "no answer in time")
            except EOFError:
                good, result = False, f"died with exit code {process.exitcode}"
            if good:
                results[rank] = torch.load(io.BytesIO(result), weights_only=False)
            else:
                failures.append(f"rank {rank}: {result}")
        for process, _ in ranks:
            process.join(5)
            if process.is_alive():
                process.kill()
    assert not failures, "\n".join(failures)
    return results


@functools.cache
def _outcome(world: int, function: Callable, *arguments: Any) -> list[Any] | AssertionError:
    try:
        return run_ranks(world, function, *arguments)
    except AssertionError as error:
        return error


def run_ranks_once(world: int, function: Callable, *arguments: Any) -> list[Any]:
    """:func:`run_ranks`, once for all tests that look at its results, also where it fails."""
    if isinstance(found := _outcome(world, function, *arguments), AssertionError):
        raise found
    return found


def equal_shards(vocab: int, world: int) -> list[int]:
    """The widths of a vocabulary's shards; also :func:`with_empty_shard`, where rank 1 has nothing."""
    return [vocab // world] * world


def with_empty_shard(vocab: int, world: int) -> list[int]:
    return [vocab - 7 * (world - 2), 0, *[7] * (world - 2)]


def collectives_called() -> list[str]:
    """On a rank: the names of all collectives from now on, which the list takes up as they are called."""
    calls: list[str] = []
    names = ("all_gather_single", "all_gather_into_tensor", "all_gather", "all_reduce", "broadcast", "barrier")
    for name in (name for name in names if hasattr(dist, name)):
        original = getattr(dist, name)

        def counted(*args: Any, _name: str = name, _original: Callable = original, **kwargs: Any) -> Any:
            calls.append(_name)
            return _original(*args, **kwargs)

        setattr(dist, name, counted)
    return calls


def one_result(world: int, function: Callable, *arguments: Any) -> Any:
    """What :func:`run_ranks` gives, which is to be the same on all ranks."""
    first, *others = run_ranks(world, function, *arguments)
    assert all(other == first for other in others)
    return first

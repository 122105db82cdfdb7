"""A fake GPU, to rehearse without one what will run on one. Whoever imports this has it: see sitecustomize.py.

Tensors "on cuda" are CPU tensors in a wrapper that says otherwise, and every operation on them comes by here. What is
strict as on a GPU: tensors of two devices in one operation; host syncs under ``set_sync_debug_mode`` and while a graph
is captured; generators of another device; ``numpy()``. A graph is a list of the operations, run again at a replay.
The CUDA backend is served by the C++ kernels, the Triton backend by Triton's interpreter.

It cannot show anything of the kernels themselves, of streams, memory or speed, nor what torch's own CUDA operations
would round or refuse otherwise; torch.compile is the identity.

Faults are planted by ``FAKE_GPU_FAULTS='{"part of a command line or of a test\'s name": fault}'``, with these faults:
wrong   what our kernels return or write is wrong
hang    the next operation never returns, as a wait for a device that hangs: in C, without the GIL
lost    every operation fails from then on, as after an illegal memory access
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
import os
import sys
import time
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode, _len_torch_dispatch_stack, _pop_mode, _push_mode
from torch.utils._pytree import tree_leaves, tree_map_only

aten = torch.ops.aten
CUDA = torch.device("cuda", 0)
SYNC = "called a synchronizing CUDA operation"
#: Operations whose result's size, or a number on the host, depends on values.
WAITING = (
    "_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "equal",
    "bincount", "repeat_interleave",
)  # fmt: skip
#: Beside operations tagged pointwise, these take a 0-d CPU tensor among those of a GPU, without a wait.
TAKES_A_NUMBER = (
    "index_put",
    "index_put_",
    "_index_put_impl_",
    "fill",
    "fill_",
    "where",
    "masked_fill",
    "masked_fill_",
)
MOVES = ("_to_copy", "copy_", "copy", "_copy_from", "set_")

FAULTS: dict[str, str] = json.loads(os.environ.get("FAKE_GPU_FAULTS", "{}"))
if not {*FAULTS.values()} <= {"wrong", "hang", "lost"}:
    raise ValueError(f"FAKE_GPU_FAULTS: expected faults out of wrong, hang, lost, got {FAULTS}")


def _fault() -> str | None:
    """The planted fault that is active now."""
    where = f"{' '.join(sys.orig_argv)} {os.environ.get('PYTEST_CURRENT_TEST', '')}" if FAULTS else ""
    return next((fault for part, fault in FAULTS.items() if part in where), None)


@contextlib.contextmanager
def _no_modes() -> Iterator[None]:
    """As torch's _disable_current_modes, which imports a second's worth of compiler."""
    modes = [_pop_mode() for _ in range(_len_torch_dispatch_stack())]
    try:
        yield
    finally:
        for mode in reversed(modes):
            _push_mode(mode)


class GpuTensor(Tensor):
    """A tensor that says that it is on the GPU; ``behind`` has its values."""

    behind: Tensor

    @staticmethod
    def __new__(cls, real: Tensor) -> GpuTensor:
        made = Tensor._make_wrapper_subclass(
            cls, real.shape, strides=real.stride(), storage_offset=real.storage_offset(), dtype=real.dtype, device=CUDA
        )
        made.behind = real
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return device.dispatch(func, args, kwargs or {})

    def data_ptr(self) -> int:
        return self.behind.data_ptr()

    def untyped_storage(self) -> Any:
        return self.behind.untyped_storage()

    def tolist(self) -> Any:
        return self.detach().cpu().tolist()

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        return self.numpy()

    def __repr__(self, **kwargs: Any) -> str:
        return f"fake {self.behind!r}"

    def __deepcopy__(self, memo: Any) -> Tensor:
        return self.detach().clone().requires_grad_(self.requires_grad)


GpuTensor.__name__ = "Tensor"  # as error messages show it


def real(value: Any) -> Any:
    """What is behind the wrappers, in any structure."""
    return tree_map_only(GpuTensor, lambda tensor: tensor.behind, value)


class Device(TorchDispatchMode):
    """The GPU's state, and what happens to every operation."""

    sync_mode = "default"
    graph: list[Any] | None = None  # the operations of a graph that is being captured
    lost = False

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled: without its wrapper, torch imports no compiler and each operation is quicker."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.dispatch(func, args, kwargs or {})

    def dispatch(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        to = kwargs.get("device")
        if (to is None or to.type != "cuda") and not any(map(_is_here, (*args, *kwargs.values()))):
            self._check_generator(kwargs, to_gpu=False)
            return func(*args, **kwargs)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        here = [isinstance(tensor, GpuTensor) for tensor in tensors]
        self.reach()
        name = func._schema.name.split("::")[1]
        to_gpu = any(here) if to is None else to.type == "cuda"
        if func.namespace == "entropy_kernels":  # one written in Python: on to what it calls
            with self:
                return IN_PYTHON[name](*args, **kwargs)
        if to_gpu and to is not None and to.index not in (None, 0):
            raise RuntimeError("CUDA error: invalid device ordinal")
        self._check_devices(func, name, args, tensors, here)
        self._check_generator(kwargs, to_gpu)
        if _waits(name, args, kwargs, any(here), to_gpu):
            self.sync(name)
        if to is not None:
            kwargs = {**kwargs, "device": torch.device("cpu")}
        if name == "_to_copy" and all(here) != to_gpu:  # between devices it is a copy, always
            kwargs = {k: v for k, v in kwargs.items() if k != "non_blocking"}
        kwargs = {k: v for k, v in kwargs.items() if k != "pin_memory"} if to_gpu else kwargs
        function = INSTEAD.get(func, func)
        if func.namespace == "entropy_kernels_native" and _fault() == "wrong":
            function = _spoiled(function)
        arguments = real((args, kwargs))
        with _no_modes():
            result = function(*arguments[0], **arguments[1])
        if self.graph is not None:
            self.graph.append((function, arguments, result))
        if torch.Tag.inplace_view in func.tags:
            _reshape(func, args, kwargs)
        known = {id(tensor.behind): tensor for tensor in tensors if isinstance(tensor, GpuTensor)}
        for tensor in known.values():
            if tensor.shape != tensor.behind.shape or tensor.stride() != tensor.behind.stride():
                raise NotImplementedError(f"fake GPU: {func} changes the shape of its argument")
        on_gpu = to_gpu if name != "copy_" else here[0]

        def dress(tensor: Tensor) -> Tensor:
            if id(tensor) in known:
                return known[id(tensor)]
            return GpuTensor(tensor) if on_gpu else tensor

        return tree_map_only(Tensor, dress, result)

    def _check_devices(self, func: Any, name: str, args: Any, tensors: list[Tensor], here: list[bool]) -> None:
        if all(here) or not any(here) or name in MOVES:
            return
        strangers = [tensor for tensor, mine in zip(tensors, here, strict=True) if not mine]
        if func.namespace == "entropy_kernels_native":  # which say themselves what they take
            strangers = []
        if torch.Tag.pointwise in func.tags or name in TAKES_A_NUMBER:
            strangers = [tensor for tensor in strangers if tensor.dim() > 0]
        if name in ("index", "index_put", "index_put_", "_index_put_impl_") and here[0]:  # indices may lie on the CPU
            indices = {id(index) for index in args[1]}
            strangers = [tensor for tensor in strangers if id(tensor) not in indices]
        if strangers:
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but found at least two, cuda:0 and cpu ({func})"
            )

    def _check_generator(self, kwargs: dict[str, Any], to_gpu: bool) -> None:
        generator = kwargs.get("generator")
        if generator is not None and (generator._cdata in Generator.of_the_gpu) != to_gpu:
            wanted, found = ("cuda", "cpu") if to_gpu else ("cpu", "cuda")
            raise RuntimeError(f"Expected a '{wanted}' device type for generator but found '{found}'")

    def reach(self) -> None:
        """Before anything that a device has to answer: faults that are planted."""
        fault = _fault()
        if fault == "hang":
            print("fake GPU: hangs", file=sys.stderr, flush=True)
            ctypes.CDLL(None).fake_gpu_hang()
        self.lost = self.lost or fault == "lost"
        if self.lost:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def sync(self, what: str) -> None:
        """The host would wait for the device here."""
        self.reach()
        if self.graph is not None:
            raise RuntimeError(f"CUDA error: operation not permitted when stream is capturing ({what})")
        if self.sync_mode == "error":
            raise RuntimeError(f"{SYNC} ({what})")
        if self.sync_mode == "warn":
            warnings.warn(f"{SYNC} ({what})", stacklevel=2)


def _spoiled(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """The kernel, but wrong in all numbers and masks that it returns or writes."""

    def call(*args: Any, **kwargs: Any) -> Any:
        given = [getattr(leaf, "base", leaf) for leaf in tree_leaves((args, kwargs))]  # a Triton descriptor has a base
        given = [leaf for leaf in given if isinstance(leaf, Tensor)]
        before = [tensor.clone() for tensor in given]
        result = kernel(*args, **kwargs)
        same = functools.partial(torch.allclose, rtol=0, atol=0, equal_nan=True)
        written = [tensor for tensor, old in zip(given, before, strict=True) if not same(tensor, old)]
        for tensor in {id(tensor): tensor for tensor in (*tree_leaves(result), *written)}.values():
            if isinstance(tensor, Tensor) and tensor.dtype in (torch.bool, torch.int8):  # Triton's masks are int8
                tensor.copy_(tensor == 0)
            elif isinstance(tensor, Tensor) and tensor.is_floating_point():
                tensor.mul_(1.25).add_(0.25)
        return result

    return call


def _reshape(func: Any, args: Any, kwargs: Any) -> None:
    """What ``squeeze_`` does, to the wrapper: as torch's own return_and_correct_aliasing does it."""
    before = torch._C._meta_in_tls_dispatch_include()
    with no_dispatch():
        torch._C._set_meta_in_tls_dispatch_include(True)
        try:
            func(*args, **kwargs)
        finally:
            torch._C._set_meta_in_tls_dispatch_include(before)


def _is_here(value: Any) -> bool:
    return isinstance(value, GpuTensor) or (isinstance(value, (list, tuple)) and any(map(_is_here, value)))


def _waits(name: str, args: Any, kwargs: dict[str, Any], from_gpu: bool, to_gpu: bool) -> bool:
    if name in WAITING:
        return name != "repeat_interleave" or kwargs.get("output_size") is None
    if name == "_to_copy":
        return from_gpu != to_gpu and not kwargs.get("non_blocking") and args[0].numel() > 0
    if name == "copy_":
        apart = isinstance(args[0], GpuTensor) != isinstance(args[1], GpuTensor)
        return apart and not (args[2] if len(args) > 2 else kwargs.get("non_blocking")) and args[1].numel() > 0
    if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
        indices = [index for index in args[1] if index is not None]
        if any(not isinstance(index, GpuTensor) for index in indices):
            return True
        number = name != "index" and args[2].numel() == 1  # then it is masked_fill
        return not number and any(index.dtype in (torch.bool, torch.uint8) for index in indices)
    return False


def _mm(a: Tensor, b: Tensor, out_dtype: torch.dtype, **out: Tensor) -> Tensor:
    return torch.mm(a.to(out_dtype), b.to(out_dtype), **out)


def _addmm(
    c: Tensor, a: Tensor, b: Tensor, out_dtype: torch.dtype, *, beta: Any = 1, alpha: Any = 1, **out: Any
) -> Any:
    return torch.addmm(c.to(out_dtype), a.to(out_dtype), b.to(out_dtype), beta=beta, alpha=alpha, **out)


def _without_padding(product: Any) -> Any:
    """oneDNN's bfloat16 kernel with AMX reads what lies behind short rows, and one NaN there makes the result NaN."""

    def call(*args: Any, **kwargs: Any) -> Any:
        padded = [isinstance(x, Tensor) and x.dtype == torch.bfloat16 and x.stride(-1) == 1 for x in args]
        return product(
            *(x.contiguous() if is_padded else x for x, is_padded in zip(args, padded, strict=True)), **kwargs
        )

    return call


#: Operations that torch has on GPUs only, or that differ there.
INSTEAD = {
    aten.mm.dtype: _mm,
    aten.mm.dtype_out: _mm,
    aten.addmm.dtype: _addmm,
    aten.addmm.dtype_out: _addmm,
    **{op: _without_padding(op) for op in (aten.mm.default, aten.mm.out, aten.addmm.default, aten.addmm.out)},
}

#: Our operators that are written in Python, by name.
IN_PYTHON: dict[str, Any] = {}
device = Device()


class Stream:
    """Of all that is asked of a stream, that it is there."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.device, self.cuda_stream = CUDA, 0

    def wait_stream(self, other: Any) -> None: ...
    def wait_event(self, event: Any) -> None: ...

    def synchronize(self) -> None:
        device.sync("Stream.synchronize")

    def record_event(self, event: Any = None) -> Any:
        event = event or Event()
        event.record()
        return event


class Event:
    """The host's clock: the fake device is never behind."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def record(self, stream: Any = None) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None:
        device.reach()

    def wait(self, stream: Any = None) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: Event) -> float:
        return 1e3 * max(end.at - self.at, 1e-6)


class Graph:
    """The operations of a call with the tensors that they took and made."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.calls: list[Any] = []

    def replay(self) -> None:
        device.reach()
        with _no_modes(), torch.no_grad():
            for function, (args, kwargs), made in self.calls:
                again = function(*args, **kwargs)
                for old, new in zip(tree_leaves(made), tree_leaves(again), strict=True):
                    if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)

    def reset(self) -> None:
        self.calls = []


@contextlib.contextmanager
def capture(graph: Graph, *args: Any, **kwargs: Any) -> Iterator[None]:
    device.graph = graph.calls
    try:
        yield
    finally:
        device.graph = None


@contextlib.contextmanager
def on_stream(stream: Any) -> Iterator[None]:
    yield


class Generator(torch.Generator):
    """One of the CPU that remembers what it was made for."""

    of_the_gpu: ClassVar[set[int]] = set()

    def __new__(cls, device: Any = "cpu") -> Generator:
        made = super().__new__(cls)
        (cls.of_the_gpu.add if torch.device(device).type == "cuda" else cls.of_the_gpu.discard)(made._cdata)
        return made

    @property
    def device(self) -> torch.device:
        return CUDA if self._cdata in self.of_the_gpu else torch.device("cpu")


def _launcher(run: Any) -> Any:
    """A Triton kernel in the interpreter, on what is behind its arguments."""

    def bare(value: Any) -> Any:
        if isinstance(value, (tuple, list)):
            return type(value)(map(bare, value)) if not hasattr(value, "_fields") else type(value)(*map(bare, value))
        if hasattr(value, "block_shape"):
            return type(value)(bare(value.base), *(getattr(value, n) for n in ("shape", "strides", "block_shape")))
        return value.behind if isinstance(value, GpuTensor) else value

    def launch(self: Any, *args: Any, **kwargs: Any) -> None:
        device.reach()
        arguments = tuple(map(bare, args)), {name: bare(value) for name, value in kwargs.items()}
        call = functools.partial(run, self)
        if _fault() == "wrong":
            call = _spoiled(call)
        with _no_modes():
            call(*arguments[0], **arguments[1])
        if device.graph is not None:
            device.graph.append((call, arguments, None))

    return launch


def _set_sync_debug_mode(mode: Any) -> None:
    device.sync_mode = ("default", "warn", "error")[mode] if isinstance(mode, int) else mode


def _synchronize(*args: Any) -> None:
    device.reach()
    if device.graph is not None:
        device.sync("synchronize")


def _patch_torch() -> None:
    properties = types.SimpleNamespace(
        name="Fake H100", major=9, minor=0, multi_processor_count=132, warp_size=32, total_memory=4 << 30,
        L2_cache_size=50 << 20, shared_memory_per_block=48 << 10, shared_memory_per_block_optin=227 << 10,
    )  # fmt: skip
    answers: dict[str, Any] = {
        "is_available": True, "is_initialized": True, "device_count": 1, "current_device": 0, "_lazy_init": None,
        "init": None, "get_device_name": properties.name, "get_device_capability": (9, 0),
        "get_device_properties": properties, "mem_get_info": (1 << 30, 4 << 30), "memory_allocated": 0,
        "memory_reserved": 0, "max_memory_allocated": 0, "max_memory_reserved": 0, "reset_peak_memory_stats": None,
        "empty_cache": None, "_sleep": None, "is_bf16_supported": True, "current_stream": Stream(),
        "default_stream": Stream(), "set_stream": None, "set_device": None, "_is_in_bad_fork": False,
        "manual_seed": None, "manual_seed_all": None,
    }  # fmt: skip
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *args, _answer=answer, **kwargs: _answer)
    torch.cuda.get_sync_debug_mode = lambda: ("default", "warn", "error").index(device.sync_mode)
    torch.cuda.set_sync_debug_mode, torch.cuda.synchronize = _set_sync_debug_mode, _synchronize
    torch.cuda.is_current_stream_capturing = lambda: device.graph is not None
    torch.cuda.Stream, torch.cuda.Event, torch.cuda.CUDAGraph = Stream, Event, Graph
    torch.cuda.graph, torch.cuda.stream = capture, on_stream
    torch.cuda.device_of = torch.cuda.device = lambda *args: contextlib.nullcontext()
    # numbers of the fake device are drawn from the CPU's generator
    torch.cuda.get_rng_state = lambda *args: torch.get_rng_state()
    torch.cuda.set_rng_state = lambda state, *args: torch.set_rng_state(state)
    torch.cuda.get_rng_state_all = lambda: [torch.get_rng_state()]
    torch.cuda.set_rng_state_all = lambda states: torch.set_rng_state(states[0])
    torch.Generator = Generator
    torch.version.cuda = "13.0"
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(1, device="cuda"): made on the CPU, then copied
    torch.compile = lambda function=None, **options: function or (lambda f: f)


def _remember_python_ops() -> None:
    implement = torch.library.Library.impl

    def impl(self: Any, name: Any, function: Any, key: str = "", **options: Any) -> None:
        if self.ns == "entropy_kernels" and key == "CompositeExplicitAutograd":
            IN_PYTHON[name] = function
        implement(self, name, function, key, **options)

    torch.library.Library.impl = impl


def _patch_interpreter(interpreter: Any) -> None:
    interpreter.GridExecutor.__call__ = _launcher(interpreter.GridExecutor.__call__)


def _patch_tiling(tiling: Any) -> None:
    tiling.hardware = lambda device: tiling.Hardware(1, 256, True)  # what the interpreter is fastest with


def _patch_native(native: Any) -> None:
    native.cuda_load_error = native.load_error
    native.has_cuda_kernel = lambda name: True
    native.set_cuda_switch = lambda name, value: 0
    native.largest_cluster = lambda: 16
    native.cuda_kernels = list


def _patch_arguments(arguments: Any) -> None:
    unusual = arguments._unusual
    arguments._unusual = lambda value: None if isinstance(value, GpuTensor) else unusual(value)  # as plain as any


#: By module, what sitecustomize.py does after its import.
PATCHES = {
    "triton.runtime.interpreter": _patch_interpreter,
    "entropy_kernels.backends.triton.tiling": _patch_tiling,
    "entropy_kernels.backends.native": _patch_native,
    "entropy_kernels._arguments": _patch_arguments,
}
_patch_torch()
_remember_python_ops()
device.__enter__()

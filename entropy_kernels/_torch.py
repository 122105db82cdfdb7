"""What the package uses of torch that torch does not document, each for a reason. tests/test_torch_private.py knows the
versions that have it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch._C import _functorch as functorch
from torch.autograd import forward_ad

_Function = TypeVar("_Function", bound=Callable)

#: Inside, an operator's autograd calls the operator itself. torch.library.register_autograd costs 70 µs more per call.
below_autograd = torch._C._AutoDispatchBelowAutograd

#: Keeps a compiler out of a function. torch.compiler.disable imports the compiler, and triton with it, right there.
not_compiled = torch._disable_dynamo

#: Raises in compiled code and on a GPU where a condition does not hold, without waiting for the device.
assert_async = torch._assert_async

#: A scripted method, which is no nn.Module and no function either.
ScriptMethod = torch._C.ScriptMethod

#: Of every kind of dropout.
Dropout = torch.nn.modules.dropout._DropoutNd

_FAKE = torch._C._TorchDispatchModeKey.FAKE


def constant_when_compiled(function: _Function) -> _Function:
    """A compiler calls the function and takes the result for a constant.

    torch.compiler.assume_constant_result does no more, but imports the compiler.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def fake_mode() -> bool:
    """Whether a FakeTensorMode is at work: no tensor has values. There is no public question for it."""
    return torch._C._get_dispatch_mode(_FAKE) is not None


def in_transform() -> bool:
    """Whether a transform of torch.func (vmap, grad, ...) is at work, of which an operator of ours would not know."""
    return functorch.maybe_current_level() is not None


def mapped(value: torch.Tensor) -> bool:
    """Whether torch.vmap runs over it."""
    return functorch.is_batchedtensor(value)


def in_functional_grad(value: torch.Tensor) -> bool:
    """Whether torch.func differentiates it, which does not ask for an operator's autograd."""
    return functorch.is_gradtrackingtensor(value)


def in_forward_mode() -> bool:
    """Whether a dual level is entered. Outside of one a tensor cannot be asked for its tangent, and need not be."""
    return forward_ad._current_level >= 0


def schema_arguments(name: str) -> Any:
    """Of an operator that has no kernel yet: torch.ops finds only those that have."""
    return torch._C._get_schema(name, "").arguments


def has_kernel(name: str, key: str) -> bool:
    """Whether an operator has a kernel of its own for a dispatch key; torch.ops answers for every operator alike."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(name, key)


def process_group(name: Any) -> Any:
    """The process group of a name, which is all that an operator's schema can hold."""
    return dist.distributed_c10d._resolve_process_group(name)


def default_device(group: Any) -> torch.device:
    """Where the tensors of a group's collectives lie, for whoever has none to ask."""
    return torch.device(dist.distributed_c10d._get_pg_default_device(group))


def driver_version() -> int | None:
    """Of the CUDA driver; None where torch does not say, as in a build without CUDA."""
    query = getattr(torch._C, "_cuda_getDriverVersion", None)
    return None if query is None else query()

"""FSDP2: one of our functions run as the forward of sharded modules, which then gather, cast and reduce as ever.

``FSDPModule`` and ``register_fsdp_forward_method`` are public in torch. Two things are not, which nothing public tells:
the state that a module is in (``_get_fsdp_state()._training_state``), and the mark on modules whose parameters FSDP
holds (``_is_fsdp_managed_module``).
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from entropy_kernels._arguments import is_dtensor
from entropy_kernels._dtensor import CURE as CURE
from entropy_kernels._dtensor import whole

_NAME = "_entropy_kernels_forward"


def sharded(modules: Iterable[nn.Module]) -> list[Any]:
    """Those of ``modules`` that ``fully_shard`` was applied to; nothing is imported to find out."""
    if not _may_be_used():
        return []
    fsdp = sys.modules["torch.distributed.fsdp"]
    return [module for module in modules if isinstance(module, fsdp.FSDPModule)]


def is_managed(module: nn.Module) -> bool:
    """Whether FSDP holds parameters of ``module``: as a unit of its own, in it or around it."""
    return _may_be_used() and any(getattr(part, "_is_fsdp_managed_module", False) for part in module.modules())


def _may_be_used() -> bool:
    """Without a process group it cannot be, and no walk over a model is needed; many libraries import it."""
    return "torch.distributed.fsdp" in sys.modules and torch.distributed.is_initialized()


def around(root: nn.Module, part: nn.Module) -> list[nn.Module]:
    """The modules from ``root`` down to the one that has ``part`` as a child."""
    for path, module in root.named_modules():
        if module is part:
            names = path.split(".") if path else []
            return [root.get_submodule(".".join(names[:depth])) for depth in range(len(names))]
    return []


def as_forward(
    modules: Iterable[nn.Module],
    function: Callable[..., Any],
    *args: Any,
    called: nn.Module | None = None,
    **kwargs: Any,
) -> Any:
    """``function(*args, **kwargs)`` as if it were the forward of ``modules``, the outermost first.

    FSDP2 gathers what they hold before, and frees it after as it does after their forward. It casts tensors among the
    arguments as if each module, or only the one ``called``, had been called with them. Its hooks on the results gather
    again for the backward pass, and reduce the gradients. The results come as ``function`` gives them, not cast to an
    ``output_dtype``; in a list, views are copied, which could lose the hooks. Modules that are no FSDP modules need
    nothing; those that are in their forward already cast if they are ``called``.
    """
    units = sharded(modules)
    for module in reversed(units):
        if module is called or _state(module) != "FORWARD":
            function = _method(module, function, called is None or module is called)
    with _outside_inference_mode() if units else contextlib.nullcontext():
        return function(*args, **kwargs)


def settle(modules: Iterable[nn.Module]) -> None:
    """Free what FSDP2 modules have kept gathered after their forward.

    Used as a plain tensor it would have a gradient that nobody reduces, if nothing else of that forward needs one.
    """
    for module in sharded(modules):
        if _state(module) == "IDLE":
            module.reshard()


def _state(module: Any) -> str:
    return module._get_fsdp_state()._training_state.name  # type: ignore[no-any-return]


@contextlib.contextmanager
def _outside_inference_mode() -> Iterator[None]:
    """What FSDP gathers under torch.inference_mode() it could not use in a later forward with gradients."""
    if not torch.is_inference_mode_enabled():
        yield
        return
    with torch.inference_mode(False), torch.no_grad():
        yield


def _method(module: Any, function: Callable[..., Any], casts: bool) -> Callable[..., Any]:
    from torch.distributed.fsdp import register_fsdp_forward_method

    def call(*args: Any, **kwargs: Any) -> Any:
        results: list[Any] = []
        errors: list[Exception] = []

        def run(*cast: Any, **casts_too: Any) -> Any:
            try:
                found = function(*cast, **casts_too) if casts else function(*args, **kwargs)
                if isinstance(found, list):
                    found = [value if value._base is None else value.clone() for value in found]
                results.append(found)
                return found
            except Exception as error:  # FSDP's own forward ends none the less, else its next one would be off
                errors.append(error)
                return None

        setattr(module, _NAME, run)
        try:
            register_fsdp_forward_method(module, _NAME)
            method = getattr(module, _NAME)
        finally:
            delattr(module, _NAME)
        with gathered_once([module] if _state(module) == "FORWARD" else []):
            method(*args, **kwargs) if casts else method()
        if errors:
            raise errors.pop()
        return results.pop()

    return call


@contextlib.contextmanager
def gathered_once(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Calls of ``modules``, which :func:`as_forward` has gathered, cast as ever, and leave them gathered.

    As when a checkpoint calls them again in the backward pass: it is the state of that in which they do so.
    """
    states = [module._get_fsdp_state() for module in sharded(modules)]
    before = [state._training_state for state in states]
    try:
        for state in states:
            state._training_state = type(state._training_state).PRE_BACKWARD
        yield
    finally:
        for state, old in zip(states, before, strict=True):
            state._training_state = old


def with_whole_parameters(head: Any) -> tuple[Any, dict[Tensor, Tensor]]:
    """``head`` and its parameters, as they are but for those that FSDP holds in a unit around it: no call gathers them.

    They are gathered here, once, and ``head`` is called with views of them. The keys of what is returned are those, the
    values what they are views of, whose gradients go to the shards (:func:`entropy_kernels._dtensor.whole`).
    """
    parts = [part for part, _ in _shards(head)]
    if not parts:
        return head, {parameter: parameter for parameter in head.parameters()}
    for part in parts:
        # FSDP's hooks then put the shards in place of what reshard_after_forward=2 keeps until the backward pass, whose
        # gradients nobody reads. Only where they do so for no other unit
        if not [*part.children()]:
            part.state_dict(keep_vars=True)
    sources = {shard: whole(shard) for _, shard in _shards(head)}
    views = {shard: source.detach().requires_grad_(source.requires_grad) for shard, source in sources.items()}
    named_views = {name: views[p] for name, p in head.named_parameters() if p in views}
    parameters = {views.get(p, p): sources.get(p, p) for p in head.parameters()}
    return named("weight", lambda hidden: torch.func.functional_call(head, named_views, (hidden,))), parameters


def _shards(head: nn.Module) -> list[tuple[nn.Module, Tensor]]:
    """Parameters that FSDP holds, but not those that are shards of tensor parallelism, whose hooks expect them.

    In an order that is the same on all ranks, which gather them together.
    """
    return [
        (part, parameter)
        for part in (head.modules() if is_managed(head) else ())
        if getattr(part, "_is_fsdp_managed_module", False) and not getattr(part, "_distribute_module_applied", False)
        for parameter in part.parameters(recurse=False)
        if is_dtensor(parameter)
    ]


def named(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``; what torch says of shards beside tensors, or of their dtypes, names FSDP2 and the cure."""

    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except RuntimeError as error:
            if "DTensor" not in str(error) and "dtype" not in str(error):
                raise
            expected, got = (
                ("that FSDP2 has gathered", "that a module around it holds in shards")
                if "DTensor" in str(error)
                else (
                    "of the dtype of what it is called with",
                    "of another, which FSDP2's MixedPrecisionPolicy casts "
                    "only in a call of the module that it was given for",
                )
            )
            raise RuntimeError(f"{name}: expected parameters {expected}, got some {got}; {CURE} ({error})") from error

    return call


class Forward(nn.Module):
    """``module``, called as a part of the forward of ``modules``."""

    def __init__(self, module: nn.Module, modules: Iterable[nn.Module]) -> None:
        super().__init__()
        self.module, self._around = module, list(modules)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with _outside_inference_mode():
            found = named("model", as_forward)(self._around, self.module, *args, **kwargs)
        settle(self._around)
        return found

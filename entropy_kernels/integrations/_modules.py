"""What the call of a module does beyond the forward of its class: hooks, wrappers, forwards put in its place."""

from __future__ import annotations

import contextlib
import functools
import inspect
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as every_module

from entropy_kernels import _torch

_HOOKS = ("forward_pre_hooks", "forward_hooks", "backward_pre_hooks", "backward_hooks")
#: Packages whose hooks and wrappers of a whole model leave its logits as they are: they move, gather, record, or make
#: them in another way.
_HARMLESS = {"torch", "transformers", "accelerate", "peft", "deepspeed", "liger_kernel", "wandb"}

_CONTAINERS = (nn.Module, torch.jit.ScriptFunction, _torch.ScriptMethod)


def weight_of(head: Any) -> Tensor | None:
    """The weight of a head whose call is ``hidden @ weight.T + bias`` and nothing else; None for any other.

    A DTensor is a weight, too; the hooks of FSDP2 gather it, as we do. To be read once: a parametrised weight is
    computed each time, and by spectral_norm not as the one before.
    """
    forward = type(head).forward
    is_linear = forward is nn.Linear.forward and _origin(forward) == "torch.nn.modules.linear"  # nothing patched in
    if "forward" in vars(head) or not is_linear or _own_call(head):
        return None
    if global_hooks() or not all(_origin(hook).startswith("torch.distributed.fsdp.") for hook in hooks(head)):
        return None
    weight = head.weight
    kind = type(weight)
    is_plain = kind in (Tensor, nn.Parameter) or hasattr(weight, "full_tensor") or kind.__name__ == "FakeTensor"
    return weight if is_plain and weight.is_floating_point() else None


def hooks(module: nn.Module) -> list[Callable[..., Any]]:
    """That a call of the module runs, forward and backward."""
    return [hook for kind in _HOOKS for hook in getattr(module, f"_{kind}").values()]


def global_hooks() -> list[Callable[..., Any]]:
    """That a call of any module runs."""
    return [hook for kind in _HOOKS for hook in getattr(every_module, f"_global_{kind}").values()]


def is_harmless(function: Any) -> bool:
    """Whether a hook or wrapper of a model is known to leave its logits as they are."""
    return all(map(_is_known, _layers(function)))


def added_to(model: nn.Module) -> list[str]:
    """What a call of ``model`` does, in words, that a call of its parts does not."""
    found = [f"the hook {name_of(hook)}" for hook in hooks(model) if not is_harmless(hook)]
    if "_orig_mod" in model._modules:  # torch.compile's, whose forward is the call of the module inside
        return found
    accelerates = getattr(model, "_hf_hook", None)  # of add_hook_to_module, which puts it into forward
    for hook in getattr(accelerates, "hooks", [accelerates]):
        if hook is not None and not is_harmless(type(hook)):
            found.append(f"the hook {type(hook).__qualname__}")
    call = _own_call(model)
    if call and not is_harmless(call):
        found.append(f"{name_of(call)} in place of its call")
    kinds = [kind for kind in type(model).__mro__ if "forward" in vars(kind) and kind is not nn.Module]
    layers = _layers(vars(kinds[0])["forward"]) if kinds else []
    if "forward" in vars(model):
        replaced = _layers(vars(model)["forward"])
        wraps = bool(layers) and replaced[-1] is layers[-1]
        if not all(map(_is_known, replaced[:-1] if wraps else replaced)):
            found.append(f"{name_of(replaced[0])} in place of its forward")
        if not wraps:
            return found
    # The forward of a class from anywhere is the model's; around or in place of that of another class it is more
    own = bool(kinds) and not _is_known(kinds[0]) and len(kinds) == 1 and _origin(layers[-1]) == kinds[0].__module__
    if not own and not all(map(_is_known, layers)):
        found.append(f"{name_of(layers[0])} in place of the forward of {kinds[-1].__name__}")
    return found


def in_call_of(model: nn.Module) -> bool:
    """Whether a call of ``model`` is under way, in which all that is added to it has its part."""
    calls = [type(model).forward, vars(model).get("forward"), type(model).__call__, nn.Module._call_impl]
    codes = {_place(layer.__code__) for call in calls for layer in _layers(call) if hasattr(layer, "__code__")}
    frame = inspect.currentframe()
    while frame is not None:
        code = frame.f_code
        # a function of the user's that is given the model is no call of it
        if code.co_argcount and _place(code) in codes and frame.f_locals.get(code.co_varnames[0]) is model:
            return True
        frame = frame.f_back
    return False


def autocast_of(*models: nn.Module) -> contextlib.AbstractContextManager:
    """The autocast that a forward of these is wrapped in, as accelerate's mixed precision does; or none."""
    for layer in (layer for model in models for layer in _layers(model.forward)):
        if _origin(layer) == "torch.amp.autocast_mode":
            given = inspect.getclosurevars(layer).nonlocals["autocast_instance"]
            return torch.autocast(given.device, given.fast_dtype, given._enabled, given._cache_enabled)
    return contextlib.nullcontext()


def name_of(function: Any) -> str:
    """Where the code of a function stands."""
    function = _bare(function)
    return f"{_origin(function)}.{getattr(function, '__qualname__', type(function).__qualname__)}"


def _place(code: types.CodeType) -> tuple[str, int, str]:
    """Of a function's code, which torch.compile puts other code in the place of."""
    return code.co_filename, code.co_firstlineno, code.co_name


def _is_known(function: Any) -> bool:
    if isinstance(function, _CONTAINERS):  # of torch, around anybody's code
        return False
    return _origin(function).split(".")[0] in _HARMLESS


def _own_call(module: nn.Module) -> Callable[..., Any] | None:
    call = type(module).__call__
    is_torchs = call is nn.Module.__call__ and _origin(call) == "torch.nn.modules.module"  # nothing patched in
    return None if is_torchs else call


def _layers(function: Any) -> list[Any]:
    """A function and those that it wraps."""
    found = []
    while function is not None:
        found.append(_bare(function))
        function = getattr(function, "__wrapped__", None)
    return found


def _bare(function: Any) -> Any:
    while isinstance(function, functools.partial):
        function = function.func
    owner = getattr(function, "__self__", None)
    function = getattr(function, "__func__", function)
    torchs = isinstance(owner, _CONTAINERS) and _stands_in(function).split(".")[0] in ("torch", "builtins")
    return owner if torchs else function  # a call that is torch's, of a module that need not be


def _origin(function: Any) -> str:
    """The module in which the code of a function, or the class of an object, stands."""
    return _stands_in(_bare(function))


def _stands_in(function: Any) -> str:
    space = getattr(function, "__globals__", None)
    if space is not None:
        return space.get("__name__", "")
    return (function if isinstance(function, type) else type(function)).__module__

"""What our integrations rely on of verl and TRL, as stubs of the same names and signatures.

One table: the targets of all patches, which carry their signatures, and :data:`RELIED_ON`. The main suite applies the
patches to stubs that are made of it, so that it needs neither package; ``tests/integrations/test_contract.py`` holds
the table against the packages as they are installed.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import inspect
import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import entropy_kernels
from entropy_kernels.integrations._patch import patches

_TRL = "trl.trainer.grpo_trainer:GRPOTrainer."
_METHOD = ".__wrapped__"  # below a decorator

#: What ours call of theirs, are called like, or override, beside what they replace: signatures as Patch compares them.
#: None: only that it is there.
RELIED_ON: dict[str, str | None] = {
    # verl
    "verl.trainer.ppo.core_algos:register_policy_loss": "(name)",
    "verl.trainer.ppo.core_algos:compute_policy_loss_vanilla": "(old_log_prob, log_prob, advantages, response_mask, "
    "loss_agg_mode='token-mean', config=None, rollout_is_weights=None)",  # what a registered loss looks like
    "verl.utils.device:get_device_id": "()",
    "verl.utils.device:get_device_name": "()",
    "verl.utils.tensordict_utils:assign_non_tensor": "(tensor_dict, **kwargs)",
    "verl.utils.tensordict_utils:get": "(tensordict, key, default=None)",
    "verl.utils.tensordict_utils:get_non_tensor_data": "(data, key, default)",
    "verl.workers.engine.fsdp.transformer_impl:FSDPEngine._gather_and_unpad_packed": "(self, tensor, pad_size)",
    "verl.workers.utils.losses:ppo_loss": "(config, model_output, data, dp_group=None)",
    "verl.workers.utils.padding:no_padding_2_padding": "(tensor, data)",
    "verl.workers.utils.padding:response_to_nested": "(tensor, response_mask)",
    "omegaconf:OmegaConf.is_config": "(obj)",
    "omegaconf:OmegaConf.to_container": "(cfg, *, resolve=False, throw_on_missing=False, enum_to_str=False, "
    "structured_config_mode=<SCMode.DICT: 1>)",
    # TRL
    "trl.models.utils:disable_gradient_checkpointing" + _METHOD: "(model, gradient_checkpointing_kwargs=None)",
    _TRL + "_compute_loss": "(self, model, inputs)",
    _TRL + "_generate_and_score_completions": "(self, inputs)",
    _TRL + "_get_per_token_logps_and_entropies" + _METHOD: "(self, model, input_ids, attention_mask, logits_to_keep, "
    "batch_size=None, compute_entropy=False, compute_aux_loss=False, pixel_values=None, image_grid_thw=None, "
    "num_images=None, pixel_attention_mask=None, spatial_shapes=None, num_tiles=None, image_sizes=None, "
    "token_type_ids=None, mm_token_type_ids=None, image_position_ids=None)",
    _TRL + "_load_optimizer_and_scheduler": "(self, checkpoint)",
    _TRL + "_prepare_inputs" + _METHOD: "(self, generation_batch)",
    _TRL + "_save_checkpoint": "(self, model, trial)",
}


def table() -> dict[str, str | None]:
    """ "module:name" or "module:Class.name" -> signature, of all that is relied on."""
    replaced = {one.signature_of or one.target: one.signature for one in patches()}
    return {**{one.target: None for one in patches()}, **replaced, **RELIED_ON}


def missing() -> set[str]:
    """ "module:name" of what the integrations take from verl or TRL by a ``from``, and the table does not have."""
    folder = Path(entropy_kernels.__file__).parent / "integrations"
    taken = {name for file in folder.rglob("*.py") for name in _taken(ast.parse(file.read_text()))}
    return taken - {target.replace(_METHOD, "") for target in table()}


def _taken(tree: ast.Module) -> Iterator[str]:
    """What is imported, and of an imported module what is used."""
    modules = {target.partition(":")[0] for target in table()}
    aliases = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in ("verl", "trl"):
            for name in node.names:
                path = f"{node.module}.{name.name}"
                if path in modules:
                    aliases[name.asname or name.name] = path
                else:
                    yield f"{node.module}:{name.name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in aliases:
            yield f"{aliases[node.value.id]}:{node.attr}"


class _Default:
    """A default value that is known by how it is shown."""

    def __init__(self, shown: str) -> None:
        self.shown = shown

    def __repr__(self) -> str:
        return self.shown


def _function(name: str, signature: str | None, behaviour: Any) -> Any:
    """Of this signature; without a behaviour it raises that theirs ran."""

    def call(*args: Any, **kwargs: Any) -> Any:
        if behaviour is None:
            raise AssertionError(f"theirs ran: {name}")
        return behaviour(*args, **kwargs)

    if signature is not None:
        scope: dict[str, Any] = {"Default": _Default}
        shown = re.sub(r"<[^>]*>", lambda found: f"Default({found[0]!r})", signature)
        exec(f"def like{shown}: ...", scope)
        call.__signature__ = inspect.signature(scope["like"])  # type: ignore[attr-defined]
    return call


def _decorated(function: Any) -> Any:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return call


@contextlib.contextmanager
def stubs(behaviour: dict[str, Any]) -> Iterator[None]:
    """Stand-ins for all in the table in ``sys.modules``.

    Args:
        behaviour: "name" or "Class.name" -> function, where ours needs theirs.
    """
    made: dict[str, types.ModuleType] = {}
    for target, signature in table().items():
        module, _, attributes = target.replace(_METHOD, "").partition(":")
        *classes, name = attributes.split(".")
        holder: Any = _module(module, made)
        for each in classes:
            if each not in vars(holder):
                setattr(holder, each, type(each, (), {}))
            holder = getattr(holder, each)
        function = _function(name, signature, behaviour.get(attributes))
        for _ in range(target.count(_METHOD)):
            function = _decorated(function)
        static = (signature or "").startswith(("(ctx", "(obj", "(cfg"))
        setattr(holder, name, staticmethod(function) if static else function)
    before = {name: found for name, found in sys.modules.items() if name.partition(".")[0] in made}
    for name in before:
        del sys.modules[name]
    sys.modules.update(made)
    try:
        yield
    finally:
        for name in made:
            del sys.modules[name]
        sys.modules.update(before)


def _module(path: str, made: dict[str, types.ModuleType]) -> types.ModuleType:
    parent, _, name = path.rpartition(".")
    if path not in made:
        made[path] = types.ModuleType(path)
        if parent:
            setattr(_module(parent, made), name, made[path])
    return made[path]

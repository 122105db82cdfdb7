"""A CPU as a platform of verl, by verl's own means (``VERL_USE_EXTERNAL_MODULES=verl_cpu``): gloo, no accelerator.

verl registers its FSDP engine for cuda and npu; ``VERL_ENGINE_DEVICE=cuda`` makes its registry give out that one.
Nothing else of verl is changed: engine, workers, Ray and collectives are its own.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import types
from collections.abc import Iterator
from typing import Any

import torch
from verl.plugin.platform import PlatformBase, set_platform
from verl.utils import distributed

ENVIRONMENT = {
    "VERL_USE_EXTERNAL_MODULES": "verl_cpu", "VERL_ENGINE_DEVICE": "cuda", "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "", "RAY_DEDUP_LOGS": "0", "TOKENIZERS_PARALLELISM": "false",
}  # fmt: skip


def _nothing(*_: Any, **__: Any) -> int:
    return 0


class Module(types.ModuleType):
    """In the place of ``torch.cuda``: memory is 0, nothing waits."""

    def mem_get_info(self) -> tuple[int, int]:
        return 0, 0

    def get_device_name(self) -> str:
        return "CPU"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(torch.cpu, name, _nothing)


class CPU(PlatformBase):
    device_name = property(lambda self: "cpu")
    vendor_name = property(lambda self: "nvidia")  # whose engine the registry gives out
    device_module = property(lambda self: Module("cpu"))

    def is_available(self) -> bool:
        return True

    def is_platform_available(self, use_smi_check: bool = False) -> bool:
        return True

    def current_device(self) -> Any:
        return torch.device("cpu")

    def device_count(self) -> int:
        return 1

    def communication_backend_name(self) -> str:
        return "gloo"

    def visible_devices_envvar(self) -> str:
        return "CUDA_VISIBLE_DEVICES"

    def get_device_capability(self, device_index: int = 0) -> tuple[None, None]:
        return None, None

    @contextlib.contextmanager
    def nvtx_range(self, msg: str) -> Iterator[None]:
        yield

    def ray_resource_name(self) -> str:
        return "CPU"

    def ray_noset_envvars(self) -> list[str]:
        return []

    def ray_resource_options(self, num_gpus: float) -> dict[str, Any]:
        return {}

    def is_ipc_supported(self) -> bool:
        return False

    def cudart(self) -> Any:
        return None

    set_device = synchronize = manual_seed = manual_seed_all = set_allocator_settings = empty_cache = _nothing
    profiler_start = profiler_stop = _nothing


set_platform(CPU())
# verl asks for "cpu:gloo" beside the platform's backend, which is the same here
distributed.initialize_global_process_group_ray = functools.partial(
    distributed.initialize_global_process_group_ray, backend="gloo"
)
# the value head of an older TRL, which verl looks for wherever some TRL is installed
_value_head = types.ModuleType("trl.experimental.ppo")
_value_head.AutoModelForCausalLMWithValueHead = type("AutoModelForCausalLMWithValueHead", (), {})  # type: ignore[attr-defined]
sys.modules.setdefault(_value_head.__name__, _value_head)

"""`ek.hf` on models that FSDP2 shards, over real gloo ranks, against one process: values, and gradients as reduced."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import entropy_kernels as ek
from gloo import run_ranks

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

VOCAB, LENGTH = 97, 11


def llama(tied: bool = False) -> Any:
    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, bos_token_id=1, eos_token_id=2, pad_token_id=0, tie_word_embeddings=tied,
        attn_implementation="eager",
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def lora(*targets: str, dora: bool = False) -> Any:
    import peft

    model = llama()
    torch.manual_seed(1)
    options = {"r": 4, "init_lora_weights": False, "task_type": "CAUSAL_LM", "use_dora": dora}
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=[*targets], **options)).train()


def ids(rows: int) -> Tensor:
    return torch.randint(3, VOCAB, (rows, LENGTH), generator=torch.Generator().manual_seed(1))


def weigh(outputs: Any, row: int | None = None) -> Tensor:
    """A loss of all rows, or of one."""
    weights = torch.randn(2, 8, LENGTH, generator=torch.Generator().manual_seed(3))
    weights = weights[:, : outputs[0].shape[0]] if row is None else weights[:, row : row + 1]
    return sum((x * w).sum() for x, w in zip(outputs, weights, strict=True))  # type: ignore[return-value]


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return {name: x.full_tensor() if hasattr(x, "full_tensor") else x for name, x in found.items()}


# ---- layouts --------------------------------------------------------------------------------------------------------

#: What is a unit of FSDP, in the order of the calls of fully_shard
LAYOUTS: dict[str, Callable[[Any, Any], list[Any]]] = {
    "root": lambda model, base: [model],
    "layers": lambda model, base: [*base.model.layers, model],
    "layers, backbone": lambda model, base: [*base.model.layers, base.model, model],
    "layers, backbone, head, no root": lambda model, base: [*base.model.layers, base.model, base.lm_head],
    "layers, head": lambda model, base: [*base.model.layers, base.lm_head, model],
    "torchtitan": lambda model, base: [
        base.model.embed_tokens, *base.model.layers, [base.model.norm, base.lm_head], model,
    ],  # accelerate's, too
    "accelerate, tied": lambda model, base: [
        *base.model.layers, [base.model.norm, base.model.embed_tokens, base.lm_head], model,
    ],
    "base of PEFT": lambda model, base: [*base.model.layers, base],
    "PEFT's policy": lambda model, base: [
        *[m for m in base.modules() if not [*m.children()] and hasattr(m, "weight") and m.weight.requires_grad],
        *base.model.layers, base, model,
    ],
}  # fmt: skip


@dataclass
class Case:
    make: Callable[[], Any]
    layout: str
    options: Callable[[], dict[str, Any]] = dict  # of fully_shard
    mesh: tuple[int, ...] | None = None
    tolerance: float = 1e-4


def half(**options: Any) -> dict[str, Any]:
    from torch.distributed.fsdp import MixedPrecisionPolicy

    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, **options)
    return {"mp_policy": policy}


def reshard(how: bool | int) -> Callable[[], dict[str, Any]]:
    return functools.partial(dict, reshard_after_forward=how)


TIED = functools.partial(llama, True)
TWO_RANKS = {
    **{name: Case(llama, name) for name in [*LAYOUTS][:6]},
    **{f"{name}, resharded": Case(llama, name, reshard(True)) for name in ("root", "layers", "layers, head")},
    "layers, not resharded": Case(llama, "layers, head", reshard(False)),
    "tied, layers": Case(TIED, "layers", reshard(True)),
    "tied, accelerate": Case(TIED, "accelerate, tied"),
    **{f"bf16, {name}": Case(llama, name, half, tolerance=0.05) for name in ("layers", "layers, head", "torchtitan")},
    **{
        f"bf16, {dtype}, {name}": Case(llama, name, functools.partial(half, output_dtype=dtype), tolerance=0.05)
        for name in ("layers, head", "torchtitan")
        for dtype in (torch.float32, torch.bfloat16)
    },
}
ADAPTERS = {
    f"{', '.join(targets)}{', DoRA' * dora}, {name}": Case(functools.partial(lora, *targets, dora=dora), name)
    for name in ("layers", "layers, head", "base of PEFT", "PEFT's policy")
    for targets, dora in ((("q_proj",), False), (("q_proj", "lm_head"), False), (("lm_head",), True))
}
FOUR_RANKS = {
    "HSDP": Case(llama, "layers, head", mesh=(2, 2)),
    "HSDP, tied": Case(TIED, "layers", mesh=(2, 2)),
    "resharded to 2": Case(llama, "layers, head", reshard(2)),
    "root resharded to 2": Case(llama, "layers", reshard(2)),
}


def shard(model: Any, case: Case, world: int) -> Any:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(
        "cpu", case.mesh or (world,), mesh_dim_names=("replicate", "shard")[-len(case.mesh or (1,)) :]
    )
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    for unit in LAYOUTS[case.layout](model, base):
        fully_shard(unit, mesh=mesh, **case.options())
    return model


def on_ranks(rank: int, world: int, cases: str) -> dict[str, Any]:
    found = {}
    for name, case in globals()[cases].items():
        model = shard(case.make(), case, world)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            outputs = ek.hf.causal_lm_logprob_entropy(model, ids(world)[rank : rank + 1])
        assert outputs.logprob.dtype == outputs.entropy.dtype == torch.float32
        weigh(outputs, rank).backward()
        found[name] = [x.detach() for x in outputs], gradients(model)
    return found


@pytest.mark.parametrize(("world", "cases"), [(2, "TWO_RANKS"), (2, "ADAPTERS"), (4, "FOUR_RANKS")])
def test_layouts(world: int, cases: str) -> None:
    if cases == "ADAPTERS":
        pytest.importorskip("peft", reason="peft is not installed")
    ranks = run_ranks(world, on_ranks, cases)
    for name, case in globals()[cases].items():
        model, input_ids = case.make(), ids(world)
        outputs = ek.logprob_entropy(model(input_ids).logits, ek.hf.next_tokens(input_ids))
        (weigh(outputs) / world).backward()
        right = gradients(model)
        for rank, found in enumerate(ranks):
            values, grads = found[name]
            compare(
                name, case, dict(enumerate(values)), {i: x[rank : rank + 1].detach() for i, x in enumerate(outputs)}
            )
            compare(name, case, grads, right)


def compare(name: str, case: Case, got: dict[Any, Tensor], want: dict[Any, Tensor]) -> None:
    assert got.keys() == want.keys(), f"{name}: {got.keys() ^ want.keys()}"
    for key, right in want.items():
        rtol, atol = case.tolerance, case.tolerance * (0.2 if case.tolerance < 0.01 else 1)
        torch.testing.assert_close(
            got[key], right, rtol=rtol, atol=atol, msg=lambda text, k=key: f"{name}, {k}: {text}"
        )

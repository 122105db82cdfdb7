"""`ek.hf` on models that FSDP2 shards, over real gloo ranks, against one process: values, and gradients as reduced."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import entropy_kernels as ek
from gloo import preload, run_ranks

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
preload("transformers.models.llama.modeling_llama", "torch.distributed.fsdp", "peft")  # five seconds for each rank

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


def by_logits(model: Any, input_ids: Tensor) -> Any:
    return ek.logprob_entropy(model(input_ids).logits, ek.hf.next_tokens(input_ids))


def ours(model: Any, input_ids: Tensor) -> Any:
    return ek.hf.causal_lm_logprob_entropy(model, input_ids)


@dataclass
class Case:
    make: Callable[[], Any]
    layout: str
    options: Callable[[], dict[str, Any]] = dict  # of fully_shard
    call: Callable[[Any, Tensor], Any] = ours
    mesh: tuple[int, ...] | None = None
    tolerance: float = 1e-4
    right: Callable[[Any, Tensor], Any] = by_logits  # on a model that is not sharded


def half(**options: Any) -> dict[str, Any]:
    from torch.distributed.fsdp import MixedPrecisionPolicy

    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, **options)
    return {"mp_policy": policy}


def reshard(how: bool | int) -> Callable[[], dict[str, Any]]:
    return functools.partial(dict, reshard_after_forward=how)


# ---- ways to call, all of which give the same ------------------------------------------------------------------------


def base_of(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def hidden_of(model: Any, input_ids: Tensor) -> Tensor:
    return ek.hf.causal_lm_parts(model).backbone(input_ids, use_cache=False)[0]


def the_head(model: Any, input_ids: Tensor) -> Any:
    """Outside of the forward of everything, as a module."""
    hidden = hidden_of(model, input_ids)
    return ek.linear_logprob_entropy(hidden, base_of(model).lm_head, ek.hf.next_tokens(input_ids))


def the_weight(model: Any, input_ids: Tensor) -> Any:
    parts = ek.hf.causal_lm_parts(model)
    hidden = parts.backbone(input_ids, use_cache=False)[0]
    return ek.linear_logprob_entropy(hidden, parts.weight, ek.hf.next_tokens(input_ids))


def the_weight_between(model: Any, input_ids: Tensor) -> Any:
    """Forward and backward pass of the model, where FSDP has tensors of other meshes in the place of parameters."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the model returns views
        hidden = model(input_ids, output_hidden_states=True).hidden_states[-1]
    target = ek.hf.next_tokens(input_ids)
    with pytest.raises(
        ValueError, match=r"weight: expected a parameter, got what FSDP2 .*register_fsdp_forward_method"
    ):
        ek.linear_logprob_entropy(hidden, model.lm_head.weight, target)
    model.reshard()
    return ek.linear_logprob_entropy(hidden, model.lm_head.weight, target)


def after_scoring(model: Any, input_ids: Tensor) -> Any:
    with torch.no_grad():
        ours(model, input_ids)
    return the_weight(model, input_ids)


def after_inference_mode(model: Any, input_ids: Tensor) -> Any:
    with torch.inference_mode():
        ours(model, input_ids)
        the_head(model, input_ids)
        the_weight(model, input_ids)
    return ours(model, input_ids)


def after_an_error(model: Any, input_ids: Tensor) -> Any:
    """Of ours, in the middle of the model's forward."""
    with pytest.raises(ValueError, match="temperature"):
        ek.hf.causal_lm_logprob_entropy(model, input_ids, temperature=-1.0)
    return ours(model, input_ids)


def beside_the_model(model: Any, input_ids: Tensor) -> Any:
    """In one step with a call of the model."""
    return [(a + b) / 2 for a, b in zip(ours(model, input_ids), by_logits(model, input_ids), strict=True)]


def under_a_checkpoint(model: Any, input_ids: Tensor) -> Any:
    return checkpoint(lambda x: tuple(ours(model, x)), input_ids, use_reentrant=False)


def checkpointed_layers(model: Any, input_ids: Tensor) -> Any:
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return ours(model.train(), input_ids)


def in_a_method(model: Any, input_ids: Tensor) -> Any:
    """That FSDP was told of; half with each function."""

    def method(self: Any, input_ids: Tensor) -> Any:
        return [(a + b) / 2 for a, b in zip(ours(self, input_ids), the_weight(self, input_ids), strict=True)]

    from torch.distributed.fsdp import register_fsdp_forward_method

    type(model).scores = method
    register_fsdp_forward_method(model, "scores")
    return model.scores(input_ids)


def accumulated(model: Any, input_ids: Tensor) -> Any:
    """Half of the gradient in a first backward pass that reduces nothing."""
    model.set_requires_gradient_sync(False)
    (weigh(ours(model, input_ids), dist.get_rank()) / 2).backward()
    model.set_requires_gradient_sync(True)
    return [(x + x.detach()) / 2 for x in ours(model, input_ids)]


def policy_loss(model: Any, input_ids: Tensor, head: str = "weight") -> Any:
    """Whose gradients are made in the forward pass."""
    parts = ek.hf.causal_lm_parts(model)
    hidden, target = parts.backbone(input_ids, use_cache=False)[0], ek.hf.next_tokens(input_ids)
    batch = target, torch.full(target.shape, -3.0), torch.ones(target.shape), None
    weight = parts.weight if head == "weight" else base_of(model).lm_head
    loss = ek.linear_policy_loss(hidden, weight, *batch, entropy_coef=0.1, loss_agg_mode="token-sum").loss
    return [loss * torch.ones(1, LENGTH), loss.detach() * torch.ones(1, LENGTH)]


def policy_loss_of_the_module(model: Any, input_ids: Tensor) -> Any:
    return policy_loss(model, input_ids, "module")


def policy_loss_in_a_method(model: Any, input_ids: Tensor) -> Any:
    from torch.distributed.fsdp import register_fsdp_forward_method

    type(model).loss = policy_loss
    register_fsdp_forward_method(model, "loss")
    return model.loss(input_ids)


def frozen() -> Any:
    """All but the head: nothing before the head has a backward pass."""
    model = llama()
    model.requires_grad_(False).lm_head.requires_grad_(True)
    return model


class Quantised(nn.Module):
    """Bytes and scales in buffers, and an adapter in parameters."""

    def __init__(self, head: nn.Linear) -> None:
        super().__init__()
        self.out_features, weight = head.out_features, head.weight.detach()
        scale = weight.abs().amax(1, keepdim=True) / 127
        self.register_buffer("scale", scale)
        self.register_buffer("bytes", (weight / scale).round().to(torch.int8))
        torch.manual_seed(2)
        self.down, self.up = nn.Linear(16, 3, bias=False), nn.Linear(3, VOCAB, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return nn.functional.linear(hidden, self.bytes * self.scale) + self.up(self.down(hidden))


def quantised() -> Any:
    model = llama()
    model.lm_head = Quantised(model.lm_head)
    return model


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
    **{
        f"{call.__name__}, {name}": Case(llama, name, options, call)
        for i, call in enumerate((
            the_head, the_weight, after_scoring, after_inference_mode, after_an_error, beside_the_model,
            under_a_checkpoint, checkpointed_layers, in_a_method, accumulated,
        ))
        for name, options in (("layers, head", reshard(True)), (("layers", "torchtitan")[i % 2], dict))
    },
    **{
        f"{call.__name__}, {name}": Case(llama, name, reshard(True), call, right=policy_loss)
        for call in (policy_loss, policy_loss_of_the_module, policy_loss_in_a_method)
        for name in ("layers", "layers, head")
    },
    **{
        f"{make.__name__}, {call.__name__}, {name}": Case(make, name, dict, call)
        for make in (frozen, quantised)
        for call, name in ((ours, "layers"), (the_head, "layers, head"))
    },
    "frozen, the weight": Case(frozen, "layers", dict, the_weight),
}  # fmt: skip
ADAPTERS = {
    f"{', '.join(targets)}{', DoRA' * dora}, {name}, {call.__name__}": Case(
        functools.partial(lora, *targets, dora=dora), name, dict, call
    )
    for name, calls in (
        ("layers", (ours, the_head)), ("layers, head", (ours,)), ("base of PEFT", (ours,)),
        ("PEFT's policy", (ours, the_head)),
    )
    for call in calls
    for targets, dora in ((("q_proj",), False), (("q_proj", "lm_head"), False), (("lm_head",), True))
}  # fmt: skip
FOUR_RANKS = {
    "HSDP": Case(llama, "layers, head", mesh=(2, 2)),
    "HSDP, tied": Case(TIED, "layers", mesh=(2, 2)),
    "HSDP, the weight": Case(llama, "layers", call=the_weight, mesh=(2, 2)),
    "resharded to 2, the weight": Case(llama, "layers", reshard(2), the_weight_between),
    **{
        f"resharded to 2, {name}, {call.__name__}": Case(llama, name, reshard(2), call)
        for name in ("layers", "layers, head")
        for call in (ours, the_head, the_weight)
    },
}


def shard(model: Any, case: Case, world: int) -> Any:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    names = ("replicate", "shard")[-len(case.mesh or (1,)) :]
    mesh = init_device_mesh("cpu", case.mesh or (world,), mesh_dim_names=names)
    for unit in LAYOUTS[case.layout](model, base_of(model)):
        fully_shard(unit, mesh=mesh, **case.options())
    return model


def on_ranks(rank: int, world: int, cases: str) -> dict[str, Any]:
    found = {}
    for name, case in globals()[cases].items():
        model = shard(case.make(), case, world)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "FSDP2-wrapped module")
            outputs = case.call(model, ids(world)[rank : rank + 1])
        assert outputs[0].dtype == outputs[1].dtype == torch.float32
        weigh(outputs, rank).backward()
        found[name] = [x.detach() for x in outputs], gradients(model)
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("world", "cases"), [(2, "TWO_RANKS"), (2, "ADAPTERS"), (4, "FOUR_RANKS")])
def test_equals_one_process(world: int, cases: str) -> None:
    """With tokens of its own on each rank, whose mean the gradients are."""
    if cases == "ADAPTERS":
        pytest.importorskip("peft", reason="peft is not installed")
    ranks = run_ranks(world, on_ranks, cases)
    for name, case in globals()[cases].items():
        model = case.make()
        rows = [case.right(model, row[None]) for row in ids(world)]
        (sum(weigh(row, rank) for rank, row in enumerate(rows)) / world).backward()
        right = gradients(model)
        for found, row in zip(ranks, rows, strict=True):
            values, grads = found[name]
            compare(name, case, dict(enumerate(values)), {i: x.detach() for i, x in enumerate(row)})
            compare(name, case, grads, right)


def compare(name: str, case: Case, got: dict[Any, Tensor], want: dict[Any, Tensor]) -> None:
    assert got.keys() == want.keys(), f"{name}: {got.keys() ^ want.keys()}"
    for key, right in want.items():
        rtol, atol = case.tolerance, case.tolerance * (0.2 if case.tolerance < 0.01 else 1)
        torch.testing.assert_close(
            got[key], right, rtol=rtol, atol=atol, msg=lambda text, k=key: f"{name}, {k}: {text}"
        )


# ---- errors ----------------------------------------------------------------------------------------------------------


class Around(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model


def errors(rank: int, world: int) -> list[str]:
    from torch.distributed.fsdp import fully_shard

    input_ids = ids(1)
    around = Around(llama())  # FSDP's unit is a module that is not handed over
    for unit in (*around.model.model.layers, around):
        fully_shard(unit, mesh=torch.distributed.device_mesh.init_device_mesh("cpu", (world,)))
    halves = shard(llama(), Case(llama, "layers", half), world)
    calls: list[Callable[[], Any]] = [
        lambda: ours(around.model, input_ids),
        lambda: hidden_of(around.model, input_ids),
        lambda: the_weight(halves, input_ids),
        lambda: the_head(halves, input_ids),
    ]
    found = []
    for call in calls:
        with pytest.raises((TypeError, RuntimeError)) as error:
            call()
        found.append(str(error.value))
    return found


def test_errors_name_the_cure() -> None:
    messages = run_ranks(2, errors)[0]
    for message in messages:
        assert "FSDP2" in message and "register_fsdp_forward_method" in message, message
    assert "dtype" in messages[-1] and "MixedPrecisionPolicy" in messages[-1] and "shards" not in messages[-1]

"""verl's own FSDP engine on a CPU around a tiny model: its inputs, its outputs, its forward step; no FSDP, no Ray."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM
from verl.models.transformers.monkey_patch import patch_forward_with_backends
from verl.utils import tensordict_utils as tu
from verl.utils import torch_functional as verl_F
from verl.workers.engine.fsdp import transformer_impl
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

VOCAB, LENGTHS = 97, (7, 4, 9)
CONFIG = LlamaConfig(
    vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0,
)  # fmt: skip


def engine(
    *, head: str | None = None, dtype: torch.dtype = torch.float64, checkpoint: bool = False, chunks: bool = False,
    compiled: bool = False, pad_to_length: bool = False,
) -> FSDPEngineWithLMHead:  # fmt: skip
    """``head``: backend of verl's fused kernels, "torch" or "triton"; None: logits."""
    torch.manual_seed(0)
    model = type("Model", (LlamaForCausalLM,), {})(CONFIG).to(dtype)  # verl changes the class
    with torch.no_grad():
        model.lm_head.weight.mul_(30)  # entropies that differ
    if head is not None:
        patch_forward_with_backends(model, use_fused_kernels=True, fused_kernels_backend=head)
    made = object.__new__(FSDPEngineWithLMHead)
    made.module = model
    made.engine_config = SimpleNamespace(
        entropy_checkpointing=checkpoint, entropy_from_logits_with_chunking=chunks, entropy_from_logits_chunk_size=5,
    )  # fmt: skip
    entropy = verl_F.entropy_from_logits_with_chunking if chunks else verl_F.entropy_from_logits
    made.compute_entropy_from_logits = torch.compile(entropy, dynamic=True) if compiled else entropy
    made.ulysses_sequence_parallel_size, made.use_ulysses_sp = 1, False
    made.pad_to_length, made.pad_to_length_bucket = pad_to_length, 16
    made._autocast_dtype = torch.float32  # none
    made.get_data_parallel_group = lambda: None
    return made


def micro_batch(temperature: Any = 0.75, **asked: Any) -> TensorDict:
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(1, VOCAB, (n,), generator=generator) for n in LENGTHS]
    positions = [torch.arange(n) for n in LENGTHS]
    nested = {"input_ids": ids, "position_ids": positions}
    batch = TensorDict(
        {name: torch.nested.nested_tensor(rows, layout=torch.jagged) for name, rows in nested.items()},
        batch_size=[len(LENGTHS)],
    )
    if isinstance(temperature, Tensor):
        batch["temperature"] = temperature
        temperature = {}
    else:
        temperature = {"temperature": temperature}
    return tu.assign_non_tensor(batch, **temperature, **asked)


def inner() -> Tensor:
    """Which tokens, flat, have a next one. The others' labels are another sequence's token, or padding."""
    return torch.cat([torch.arange(n) < n - 1 for n in LENGTHS])


def loss(model_output: dict[str, Any], data: TensorDict, dp_group: Any) -> tuple[Tensor, dict[str, Any]]:
    """Of log-probs and, where they are asked for, entropies, with weights of both signs, 0 at ends of sequences."""
    total = torch.zeros((), dtype=torch.float64)
    for name, phase in (("log_probs", 1.0), ("entropy", 2.0)):
        if name in model_output:
            values = model_output[name].values()
            weights = torch.cos(phase + torch.arange(len(values))) * inner()
            total = total + (values * weights).sum().double()
    return total, {}


LOSS = loss  # a test may put another in its place


def step(made: FSDPEngineWithLMHead, batch: TensorDict, forward_only: bool = False) -> tuple[dict[str, Tensor], Any]:
    """Values of the output by name, flat, of tokens that have a next one; gradients by name of the parameter."""
    made.module.zero_grad()
    with torch.set_grad_enabled(not forward_only):
        total, found = made.forward_step(batch, LOSS, forward_only)
        if not forward_only:
            total.backward()
    grads = {name: p.grad.clone() for name, p in made.module.named_parameters() if p.grad is not None}
    output = {name: value.values()[inner()] for name, value in found["model_output"].items()}
    assert all(value.offsets().equal(batch["input_ids"].offsets()) for value in found["model_output"].values())
    return output, grads


class Reads(TorchDispatchMode):
    """Counts the passes over V of our operators, and those of torch."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[function.name().partition(".")[0]] += 1
        return function(*args, **(kwargs or {}))

    @property
    def forward(self) -> int:
        return self.calls["entropy_kernels::token_stats"]

    @property
    def in_place(self) -> int:
        return self.calls["entropy_kernels::token_stats_backward_"]

    @property
    def backward(self) -> int:
        return self.in_place + self.calls["entropy_kernels::token_stats_backward"]

    @property
    def of_torch(self) -> int:
        return sum(n for name, n in self.calls.items() if "softmax" in name or "logsumexp" in name)


def on_cpu(monkeypatch: Any) -> None:
    """verl asks for an accelerator's index; what it calls is told the CPU."""
    monkeypatch.setattr(transformer_impl, "get_device_id", lambda: "cpu")
    monkeypatch.setattr(transformer_impl, "get_device_name", lambda: "cpu")
